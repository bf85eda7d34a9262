"""Transformers without heads, and the language models that need none but their table: a file a family, its config beside."""
