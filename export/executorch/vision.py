"""Gemma 3's vision model written for ExecuTorch: the arithmetic of gemma3.vision, in a form that XNNPACK delegates.

These are the differences, besides those of export/executorch/layers.py, and their reasons:

* A permutation cuts the patches out of the image, and one matrix product embeds them. A convolution would need passes
  of XNNPACK's backend that export/executorch/partition.py leaves out.
* QUERIES_AT_ONCE patches at a time attend to all. The scores of all 4096 would take 1.07 GB, these take 67 MB.
  ``llama.custom_sdpa``, which holds few scores too, makes the whole model take 1.8 times as long (in int8).
* The norm and MLP after attention take ROWS_AT_ONCE patches at a time, because an MLP's hidden values are the largest
  tensor of all. XNNPACK packs the weights of each delegate separately, so the parts must become equal delegates, which
  export/executorch/lower.py unites into one. The blocks of attention, which have no weights, are in one delegate.

Shapes: S pixels per side, G patches per side, P = G² patches, C SigLIP's hidden size, H heads, T soft tokens per image,
E the text model's hidden size. No shape is dynamic.
"""

import math
from dataclasses import replace
from itertools import count
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.executorch.layers import GELU_A, GELU_B, Later, Linear, Mean, RMSNorm, as_integers, floating, project
from gemma3 import names
from gemma3.config import ModelConfig, VisionConfig
from gemma3.names import PROJECTOR, VISION_TOWER
from quant.weights import Weight, Weights

ROWS_AT_ONCE = 1024
# With 512, the vision model of the 4B is 5 % faster, and takes 70 MB more.
QUERIES_AT_ONCE = 256


def linear(weights: Weights, name: str) -> Linear:
    return Linear(weights[f"{name}.weight"], floating(weights, f"{name}.bias"))


class LayerNorm(nn.Module):
    """(x − mean(x)) / √(variance(x) + eps) · weight + bias, over the last axis."""

    def __init__(self, weights: Weights, name: str, eps: float) -> None:
        super().__init__()
        gain = floating(weights, f"{name}.weight").float()
        self.register_buffer("gain", gain)
        self.register_buffer("bias", floating(weights, f"{name}.bias").float())
        self.mean = Mean(gain.numel(), gain.numel())
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.mean(x)
        return x * torch.rsqrt(self.mean(x * x) + self.eps) * self.get_buffer("gain") + self.get_buffer("bias")


class Patches(nn.Module):
    """pixels [1, 3, S, S] in 0 … 1 → [P, C], with the position embeddings added."""

    def __init__(self, config: VisionConfig, weights: Weights) -> None:
        super().__init__()
        self.side, self.size = config.patches_per_side, config.patch_size
        name = f"{VISION_TOWER}.embeddings"
        kernel = floating(weights, f"{name}.patch_embedding.weight")
        self.embedding = Linear(kernel.flatten(1), floating(weights, f"{name}.patch_embedding.bias"))
        self.register_buffer("positions", floating(weights, f"{name}.position_embedding.weight").float())

    def forward(self, pixels: Tensor) -> Tensor:
        grid = (pixels * 2.0 - 1.0).view(3, self.side, self.size, self.side, self.size)
        patches = grid.permute(1, 3, 0, 2, 4).reshape(self.side**2, -1)
        return project(patches, self.embedding)[0] + self.get_buffer("positions")


class SelfAttention(nn.Module):
    """x [P, C] → [P, C]. Every patch attends to every patch."""

    def __init__(self, config: VisionConfig, weights: Weights, name: str) -> None:
        super().__init__()
        self.by_head = (config.patches_per_side**2, config.num_attention_heads, -1)
        self.blocks = equal_parts(config, QUERIES_AT_ONCE)
        self.query, self.key, self.value, self.output = (
            linear(weights, f"{name}.{which}_proj") for which in ("q", "k", "v", "out")
        )

    def forward(self, x: Tensor) -> Tensor:
        projected = project(x, self.query, self.key, self.value)
        queries, keys, values = (part.view(self.by_head).permute(1, 0, 2) for part in projected)
        queries, keys = queries * queries.shape[-1] ** -0.5, keys.permute(0, 2, 1)
        blocks = slices(queries, self.blocks, dim=1)
        attended = [torch.bmm(torch.bmm(block, keys).softmax(-1), values) for block in blocks]
        return project(join(attended, dim=1).permute(1, 0, 2).reshape(x.shape), self.output)[0]


class MLP(nn.Module):
    """x [rows, C] → [rows, C], with GELU in its tanh form."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = (linear(weights, f"{name}.{which}") for which in ("fc1", "fc2"))

    def forward(self, x: Tensor) -> Tensor:
        (x,) = project(x, self.fc1)
        return project(x * torch.sigmoid(x * (GELU_A + GELU_B * (x * x))), self.fc2)[0]


class NormedMLP(nn.Module):
    """x + mlp(norm(x)) for some of the patches: [rows, C] → [rows, C]."""

    def __init__(self, config: VisionConfig, weights: Weights, name: str) -> None:
        super().__init__()
        self.norm = LayerNorm(weights, f"{name}.layer_norm2", config.layer_norm_eps)
        self.mlp = MLP(weights, f"{name}.mlp")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Layer(nn.Module):
    """A residual block on x [P, C]: x + attention(norm(x)), then x + mlp(norm(x)), for parts of the patches."""

    def __init__(self, config: VisionConfig, weights: Weights, name: str) -> None:
        super().__init__()
        self.norm = LayerNorm(weights, f"{name}.layer_norm1", config.layer_norm_eps)
        self.attention = SelfAttention(config, weights, f"{name}.self_attn")
        # One module for each part of the patches, because a delegate must own the weights it multiplies with.
        parts = range(equal_parts(config, ROWS_AT_ONCE))
        self.parts = nn.ModuleList(NormedMLP(config, aliases(weights, name), name) for _ in parts)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        # Chunks are cut outside XNNPACK, which keeps the parts in delegates of their own.
        rows = x.chunk(len(self.parts)) if len(self.parts) > 1 else (x,)
        return join([part(some) for part, some in zip(self.parts, rows, strict=True)])


def equal_parts(config: VisionConfig, most: int) -> int:
    """The number of equal parts into which the patches are split, so that each has at most ``most`` patches."""
    patches = config.patches_per_side**2
    return next(n for n in count(math.ceil(patches / most)) if patches % n == 0)


def slices(x: Tensor, parts: int, dim: int) -> list[Tensor]:
    """``x`` in equal parts, by operators that XNNPACK takes. A single part is ``x`` itself: it would become a copy."""
    size = x.shape[dim] // parts
    return [x.narrow(dim, start, size) for start in range(0, x.shape[dim], size)] if parts > 1 else [x]


def join(parts: list[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def aliases(weights: Weights, prefix: str) -> dict[str, Weight]:
    """The weights below ``prefix`` as new tensors over the same memory, which torch.export treats as different."""
    return {name: alias(weight) for name, weight in weights.items() if name.startswith(f"{prefix}.")}


def alias(weight: Weight) -> Weight:
    if isinstance(weight, Later):
        return cast(Weight, Later(weight.form, weight.read))
    if isinstance(weight, Tensor):
        return weight.detach()
    integers = as_integers(weight)
    return replace(integers, codes=integers.codes.detach(), scales=integers.scales.detach())


class Projector(nn.Module):
    """[P, C] → soft tokens [1, T, E], row by row of the image: averages each square of patches, then projects."""

    def __init__(self, config: VisionConfig, weights: Weights) -> None:
        super().__init__()
        size, width = config.pool_size, config.hidden_size
        self.squares = (config.patches_per_side // size, size, config.patches_per_side // size, size, width)
        self.soft_tokens = (1, config.tokens_per_image, -1)
        self.mean = Mean(size**2, size**2)
        self.norm = RMSNorm(floating(weights, f"{PROJECTOR}.mm_soft_emb_norm.weight"), config.layer_norm_eps)
        # Transposed, because the checkpoint stores it as [C, E].
        self.projection = Linear(floating(weights, f"{PROJECTOR}.mm_input_projection_weight").T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        size, width = self.squares[1], self.squares[-1]
        pooled = self.mean(x.view(self.squares).permute(0, 2, 4, 1, 3).reshape(-1, size**2))
        return project(self.norm(pooled.view(-1, width)), self.projection)[0].view(self.soft_tokens)


class VisionEncoder(nn.Module):
    """pixels float32 [1, 3, S, S] in 0 … 1 → soft tokens float32 [1, T, E + 1], with 1 (image) in the last channel."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        vision = config.vision
        assert vision is not None
        self.patches = Patches(vision, weights)
        self.layers = nn.ModuleList(
            Layer(vision, weights, names.vision_layer(index)) for index in range(vision.num_hidden_layers)
        )
        self.norm = LayerNorm(weights, f"{VISION_TOWER}.post_layernorm", vision.layer_norm_eps)
        self.projector = Projector(vision, weights)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels)
        for layer in self.layers:
            x = layer(x)
        return F.pad(self.projector(self.norm(x)), (0, 1), value=1.0)
