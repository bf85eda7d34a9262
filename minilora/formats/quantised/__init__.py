"""Bases whose weights are held in four bits, as bitsandbytes lays them out: read, written, made, and turned back."""
