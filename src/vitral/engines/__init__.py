"""Alternative implementations of the forward pass."""
