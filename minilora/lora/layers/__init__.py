"""Frozen layers with adapters beside them: what all share, then each kind."""
