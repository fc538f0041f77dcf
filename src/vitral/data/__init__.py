"""Reads images from datasets and turns them into batches on the device."""
