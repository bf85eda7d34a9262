"""A step as a CUDA graph: taking it, its memory and its inputs, and playing it again."""
