"""What watches a run's numbers: collapse, steps that are not finite."""
