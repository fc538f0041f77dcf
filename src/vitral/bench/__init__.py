"""Measurements for users: the model, the input, and training."""
