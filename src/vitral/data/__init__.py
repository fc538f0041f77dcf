"""Where images come from, and how they become batches on the device."""
