"""Whether a run fits its GPUs, how fast it can be there, and which settings fit: computed without weights or GPUs."""
