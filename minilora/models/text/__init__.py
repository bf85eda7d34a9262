"""Texts to ids and back: tokenizers, and the templates of chats."""
