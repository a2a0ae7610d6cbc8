"""Quantization-aware training: fake quantization, the distillation loss, the training loop, its saved state."""
