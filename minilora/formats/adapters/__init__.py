"""Adapter files as values, without a model."""
