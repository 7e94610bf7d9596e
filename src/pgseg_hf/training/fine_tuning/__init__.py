"""`pgseg train`: a checkpoint fine-tuned on a folder of photos, with a report."""
