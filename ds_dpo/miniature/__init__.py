"""The toy world: drawing, reward, pre-training, pairs."""
