"""LoRAs: merged into weights, written to files, or computed from a full change."""
