"""What is measured: images with masks, the field's benchmarks by name, and masks prepared from their downloads."""
