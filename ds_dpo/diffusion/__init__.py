"""The forward process: noise schedules and flows, targets, timestep distributions, squared errors."""
