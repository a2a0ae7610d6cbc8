"""Gemma 3's vision model: SigLIP, and the projector into the text model, to be read top to bottom.

Shapes: N images, S pixels per side, P = (S / patch size)² patches, C SigLIP's hidden size, T soft tokens per image,
E the text model's hidden size. Parameter names are the released checkpoints'.

Sources: SigLIP (arXiv 2303.15343), the Gemma 3 report (arXiv 2503.19786); equality with transformers is tested in
tests/gemma3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma3.config import VisionConfig
from gemma3.norm import RMSNorm


class Embeddings(nn.Module):
    """pixels [N, 3, S, S] in 0 … 1 → patch embeddings [N, P, C], with the position embeddings added."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding(config.patches_per_side**2, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels * 2.0 - 1.0)  # (x − 0.5) / 0.5, as SigLIP was trained
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight


class SelfAttention(nn.Module):
    """x [N, P, C] → [N, P, C]. Every patch attends to every patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(queries, keys, values)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """x [N, P, C] → [N, P, C], with GELU in its tanh form."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Layer(nn.Module):
    """A residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """Holds the layers under the checkpoint's names; ``VisionTower`` runs them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class VisionModel(nn.Module):
    """Holds SigLIP's parts under the checkpoint's names; ``VisionTower`` runs them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class VisionTower(nn.Module):
    """SigLIP: pixels float32 [N, 3, S, S] in 0 … 1 → [N, P, C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision_model = VisionModel(config)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.vision_model.embeddings(pixels)
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        return self.vision_model.post_layernorm(x)


class MultiModalProjector(nn.Module):
    """SigLIP's output [N, P, C] → soft tokens [N, T, E], row by row of the image.

    Averages each square of patches, normalizes the averages, and projects them to the text model's hidden size.
    """

    def __init__(self, config: VisionConfig, text_hidden_size: int) -> None:
        super().__init__()
        self.side, self.pool_size = config.patches_per_side, config.pool_size
        self.mm_soft_emb_norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.mm_input_projection_weight = nn.Parameter(torch.zeros(config.hidden_size, text_hidden_size))

    def forward(self, patches: Tensor) -> Tensor:
        images, _, width = patches.shape
        grid = patches.transpose(1, 2).reshape(images, width, self.side, self.side)
        pooled = F.avg_pool2d(grid, self.pool_size).flatten(2).transpose(1, 2)
        return self.mm_soft_emb_norm(pooled) @ self.mm_input_projection_weight
