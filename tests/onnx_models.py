"""Tiny models as .onnx files, for the tests of the exporter and of the session."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.to_onnx import OnnxReport, export_onnx
from gemma3.cache import CacheLayout, cache_layout
from gemma3.config import ModelConfig
from gemma3.images import network_input
from quant.activations import with_integer_weights
from quant.recipe import QuantizedWeights, preset, quantize
from tests.shapes import random_model


@dataclass(frozen=True)
class TinyOnnx:
    path: Path
    config: ModelConfig
    layout: CacheLayout
    weights: QuantizedWeights
    report: OnnxReport

    def eager(self) -> nn.Module:
        """The eager model with the same integers and float activations."""
        return with_integer_weights(random_model(self.config), self.weights.integers, "float")

    @torch.no_grad()
    def eager_logits(self, ids: list[int], images: Sequence[NDArray[np.uint8]] = ()) -> torch.Tensor:
        """[len(ids), V] of it, fed at once."""
        model = self.eager()
        soft_tokens = None
        if images:
            soft_tokens = model.encode_images(torch.cat([torch.from_numpy(network_input(image)) for image in images]))
        return model(torch.tensor([ids]), soft_tokens=soft_tokens)[0]


def quantized_weights(config: ModelConfig, scheme: str, embedding: str | None) -> QuantizedWeights:
    state = random_model(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return quantize(state.items(), preset(scheme, embedding))


def tiny_onnx(
    config: ModelConfig,
    directory: Path,
    scheme: str = "fp32",
    embedding: str | None = None,
    *,
    context: int = 128,
    accuracy_level: int = 1,
) -> TinyOnnx:
    weights = quantized_weights(config, scheme, embedding)
    layout = cache_layout(config, "compacting", context, chunk=8)
    path = directory / "model.onnx"
    report = export_onnx(config, weights.tensors, layout, path, accuracy_level=accuracy_level)
    return TinyOnnx(path, config, layout, weights, report)
