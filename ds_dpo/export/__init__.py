"""From a run's ZeRO shards to what people load, verified before it is there."""
