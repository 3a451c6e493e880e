"""A folder that all ranks make in units: locked, planned, continued after a kill, finished by a record written last."""
