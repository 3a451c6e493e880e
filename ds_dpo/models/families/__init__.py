"""What sets families apart: text encoders, conditioning, how a configuration tells its family (SDXL, SD1.5 ...;
SD3.5 and FLUX next).
"""
