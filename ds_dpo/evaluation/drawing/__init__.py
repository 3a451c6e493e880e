"""Models that draw prompts: found, loaded, sampled from shared noise."""
