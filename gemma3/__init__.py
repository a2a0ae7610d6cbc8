"""Gemma 3 in plain PyTorch: configuration, checkpoint, tokenizer, network. Imports no other package of this project."""
