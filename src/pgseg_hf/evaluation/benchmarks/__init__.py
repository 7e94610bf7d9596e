"""Benchmarks: images with masks, the supported benchmarks by name, and masks prepared from their downloads."""
