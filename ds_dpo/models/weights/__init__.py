"""Where weights lie: folders, the hub, single files; names, shapes, derived configurations."""
