"""What a run writes: its folder, log, metrics and curves."""
