"""Adapter files and models: which module is meant, load and save."""
