"""The calculus that every network needs: a product, a copy, a choice, a softmax, a norm."""
