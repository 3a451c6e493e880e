"""Turn a run's ZeRO shards into models that other programs load, and verify them first."""
