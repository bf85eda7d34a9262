"""One run in several processes: each computes a part of every batch, and all hold the same numbers."""
