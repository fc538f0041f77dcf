"""Tools that check, pack, preview and measure datasets."""
