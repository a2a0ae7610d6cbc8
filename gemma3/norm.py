"""The normalization that the text layers and the vision model's projector share."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + weight) over the last axis, in x's dtype. It is computed at least in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.to(wide.dtype))).to(x.dtype)
