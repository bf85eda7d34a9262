"""Whole checkpoints: a folder with config.json and tensors, read and written. What differs between models is in `families`."""
