"""What stands on the body of a model: classes of texts and of tokens, and their losses."""
