"""From sources of images and texts to endless batches: reading, mixing, texts, views, cached features."""
