"""Files that exist or do not: manifests, replacement in one step, checkpoint files before they are written, logs
that outlive a full disk.
"""
