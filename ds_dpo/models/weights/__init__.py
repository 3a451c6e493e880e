"""The files of weights: folders, the hub, single files; their names, shapes and configurations."""
