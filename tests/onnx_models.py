"""Tiny models as .onnx files, for the tests of the exporter and of the session."""

from dataclasses import dataclass
from pathlib import Path

import torch

from export.to_onnx import OnnxReport, export_onnx
from gemma3.cache import CacheLayout, cache_layout
from gemma3.config import ModelConfig
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

    def eager_logits(self, ids: list[int]) -> torch.Tensor:
        """[len(ids), V] of the eager model with the same integers and float activations."""
        model = with_integer_weights(random_model(self.config), self.weights.integers, "float")
        with torch.no_grad():
            return model(torch.tensor([ids]))[0]


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
