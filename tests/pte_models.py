"""Tiny models as .pte files, for the tests of the exporter and of the session."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from export.executorch.lower import export_pte
from export.executorch.read_back import read_back_pte
from export.executorch.target import PTE
from export.integers import IntegerCounts, compare_integers
from export.target import ExportReport
from gemma3.cache import CacheLayout, cache_layout
from gemma3.config import ModelConfig
from gemma3.images import Pixels
from gemma3.model import Gemma3
from quant.activations import per_token
from quant.eager import quantized_model, with_integer_weights
from quant.integers import IntegerWeight
from quant.methods import quantize_weights
from quant.recipe import scheme_recipe
from quant.weights import QuantizedWeights, Weights
from runtime_py.sessions.pte import PteSession
from tests.seeing import eager_logits
from tests.shapes import random_model

CHUNK = 8


@dataclass(frozen=True)
class TinyPte:
    path: Path
    config: ModelConfig
    layout: CacheLayout
    weights: QuantizedWeights
    report: ExportReport

    def counts(self, weights: Weights | None = None) -> IntegerCounts:
        """How many of the integers of ``weights`` (None: the model's own) are in the file."""
        return compare_integers(weights or self.weights.tensors, PTE, self.path)

    def stored(self) -> dict[str, IntegerWeight]:
        return dict(read_back_pte(self.path))

    def session(self, threads: int | None = None) -> PteSession:
        return PteSession(self.path, self.layout, self.config, threads)

    def eager(self) -> Gemma3:
        """The eager model with the same integers. It rounds the inputs of integer linear layers as XNNPACK does."""
        model = random_model(self.config)
        with_integer_weights(model, self.weights.integers, per_token)
        return model

    def wide(self) -> Gemma3:
        """``eager`` in float64."""
        return quantized_model(self.config, self.weights, per_token, torch.float64)

    def eager_logits(self, ids: list[int], images: Sequence[Pixels] = ()) -> torch.Tensor:
        """The eager model's, [len(ids), V], all ids in one call."""
        return eager_logits(self.eager(), ids, images)


def tiny_pte(
    config: ModelConfig, directory: Path, scheme: str = "fp32", embedding: str | None = None, *, context: int = 128
) -> TinyPte:
    state = random_model(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    weights = quantize_weights(state.items(), scheme_recipe(scheme, embedding))
    chunk = CHUNK if config.vision is None else max(CHUNK, config.vision.tokens_per_image)
    layout = cache_layout(config, "ring", context, chunk)
    path = directory / "model.pte"
    report = export_pte(config, weights.tensors, layout, [1, 106], path)
    return TinyPte(path, config, layout, weights, report)
