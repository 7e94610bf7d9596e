"""Sources of images and texts: folders, Hub datasets, tar shards, synthetic scenes. Requires `pgseg-hf[train]`."""
