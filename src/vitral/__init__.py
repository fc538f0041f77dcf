"""Train, resume and evaluate modern Vision Transformers, exactly reproducibly."""
