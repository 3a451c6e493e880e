"""One micro-batch: batch in, loss and per-pair quantities out; its preflight, its record, its examination."""
