"""The normalization that the text layers and the vision model's projector share."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + weight) over the last axis, computed in float32 and returned in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)
