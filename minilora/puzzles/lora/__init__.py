"""The low-rank update: its gradients, its scaling, its start, and what is merged, shared, dropped and joined."""
