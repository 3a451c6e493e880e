"""The one reader of ZeRO shards; unpickles by an allow-list."""
