"""Quantization-aware training: fake quantization, the distillation loss, the training loop and its saved state."""
