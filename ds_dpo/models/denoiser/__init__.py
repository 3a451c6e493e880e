"""The network that is trained, UNet or transformer: one call, attention kernels, adapters, trained parts,
compilation.
"""
