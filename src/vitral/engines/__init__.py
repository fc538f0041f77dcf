"""Ways to run a forward pass."""
