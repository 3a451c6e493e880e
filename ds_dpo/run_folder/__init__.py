"""What a run leaves: its folder, log, metrics and curves."""
