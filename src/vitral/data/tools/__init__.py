"""Checking, packing, previewing and measuring data sets."""
