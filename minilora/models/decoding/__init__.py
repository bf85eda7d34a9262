"""Text from a causal model, token by token: what it remembers of those before, how the next is drawn."""
