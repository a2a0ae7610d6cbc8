"""Quantization: integer codecs, recipes as data, methods and training. Of this project it imports gemma3 alone."""
