"""What a run amounts to before it starts: in words, against known recipes; memory, time and bytes next."""
