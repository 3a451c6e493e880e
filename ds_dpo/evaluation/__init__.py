"""How good images are: scorers, prompt sets, win rates, one page (most of it next)."""
