"""The other ways to train few numbers: vectors in front of the tokens, or of each layer, and a subspace of all weights."""
