"""Gemma 3 in plain PyTorch: its configuration, checkpoint, tokenizer and network. Imports nothing else of ours."""
