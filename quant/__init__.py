"""Quantization: integer codecs, recipes as data, and what they make of named weights. Imports nothing else of ours."""
