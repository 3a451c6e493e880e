"""What all launched tests have in common."""

import sys
from pathlib import Path

import torch

# Ranks are launched with one thread. What a test computes beside them takes one too, because sums of floats differ with
# the number of threads, by 1e-6 and more in a prediction.
torch.set_num_threads(1)

# Tests take functions of each other and of the workers beside them.
sys.path.insert(0, str(Path(__file__).parent))
