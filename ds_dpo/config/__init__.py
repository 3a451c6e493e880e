"""The run configuration: presets, files, command line, into one frozen RunConfig; imports no torch."""
