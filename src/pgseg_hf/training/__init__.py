"""Training on image-text pairs: batches, gradient caching, schedules, checkpoints. Requires `pgseg-hf[train]`."""
