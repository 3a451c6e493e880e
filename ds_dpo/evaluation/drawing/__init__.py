"""Find and load models, and draw prompts with them from shared noise."""
