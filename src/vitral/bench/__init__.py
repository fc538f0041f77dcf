"""Benchmarks for users: the model, the input pipeline, and training."""
