"""Adapters into the files of a base, tensor by tensor and row by row, and out of them again: no model, no second copy."""
