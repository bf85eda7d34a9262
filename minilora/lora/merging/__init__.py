"""An update into a weight, and out of it again to the last bit. Knows weights, updates and what a mergeable layer answers."""
