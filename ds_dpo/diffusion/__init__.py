"""The forward process: noise schedules, targets, timestep distributions, squared errors."""
