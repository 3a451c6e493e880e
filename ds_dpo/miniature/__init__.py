"""The miniature, a toy world: its drawings, reward, pre-training and pairs."""
