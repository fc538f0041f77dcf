"""Reports and figures of training runs."""
