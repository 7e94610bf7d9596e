"""`pgseg train`: fine-tunes a checkpoint on a folder of photos and writes a report."""
