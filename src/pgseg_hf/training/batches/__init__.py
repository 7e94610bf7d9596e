"""Infinite streams of training batches: reading and mixing sources, choosing texts and views, caching features."""
