"""The evaluation program: models x prompt sets x seeds, drawn and scored on any number of ranks, then compared."""
