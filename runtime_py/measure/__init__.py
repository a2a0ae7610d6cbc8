"""Measures what quantization cost, and how fast the files are."""
