"""Training on image-text pairs: data, losses' gradients in chunks, schedules, checkpoints. Needs `pgseg-hf[train]`."""
