"""The parts that watch a run's numbers: held-out pairs, collapse, steps that are not finite."""
