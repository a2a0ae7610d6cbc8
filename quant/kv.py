"""Int8 keys and values: how the kernels of exported files round them for the cache, and how scales are calibrated.

ONNX Runtime's GroupQueryAttention rounds with fixed scales, one for each channel of each key/value head. So these
scales are chosen before the export, from what the model's keys and values are on some text. Keys are normalized by
QK-norm and rotated, so they are bounded; values are not. A value beyond the largest code is clipped.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gemma3.checkpoint import resolve_checkpoint
from gemma3.data import Rows, pack
from gemma3.images import network_input
from gemma3.model import RoundHeads, steps_of
from quant.source import QuantizedCheckpoint, Source
from quant.streamed import Streamed, Variant

log = logging.getLogger(__name__)

LARGEST, SMALLEST = 127, -128  # codes
# How far beyond the largest value seen in calibration the codes reach. Text to come has larger ones, which are clipped.
MARGIN = 1.5
# Without text of the user's own: the training sample of a demo checkpoint, which is English prose, code and questions.
SAMPLES = ("qat.txt", "qat.jsonl", "qat_images.jsonl")
TOKENS, ROW_TOKENS = 2048, 256


@dataclass(frozen=True)
class PerChannel:
    """Rounds keys and values as GroupQueryAttention does with PER_CHANNEL scales: float32 [K, D] each, positive.

    The code of a value is the integer nearest to value · (1 / scale), ties to even, within −128 … 127. A key or value
    is code · scale from then on, also for the queries of the same call. (Source: QuantizeInt8 in
    onnxruntime/core/mlas/lib/qkv_quant.cpp; tests/export/onnx compares the codes with the kernel's, bit for bit.)
    """

    keys: Tensor
    values: Tensor

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return queries, rounded(keys, self.keys), rounded(values, self.values)

    def equal(self, other: RoundHeads | None) -> int:
        """How many scales are equal in both."""
        if not isinstance(other, PerChannel):
            return 0
        pairs = ((self.keys, other.keys), (self.values, other.values))
        return sum(int((one == two).sum()) if one.shape == two.shape else 0 for one, two in pairs)

    @property
    def count(self) -> int:
        return self.keys.numel() + self.values.numel()


def codes_of(x: Tensor, scales: Tensor) -> Tensor:
    """The codes of x [B, K, S, D] under ``scales`` [K, D], in x's dtype."""
    return (x * (1.0 / scales[:, None].to(x.dtype))).round().clamp(SMALLEST, LARGEST)


def rounded(x: Tensor, scales: Tensor) -> Tensor:
    """x [B, K, S, D] after rounding to its codes under ``scales`` [K, D]."""
    return codes_of(x, scales) * scales[:, None].to(x.dtype)


class _Largest:
    """Remembers the largest absolute value of each channel, and rounds nothing."""

    def __init__(self) -> None:
        self.keys = self.values = torch.zeros(())

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.keys = torch.maximum(self.keys, keys.abs().amax((0, 2)))
        self.values = torch.maximum(self.values, values.abs().amax((0, 2)))
        return queries, keys, values


def calibration_rows(source: Source, data: Sequence[Path] = (), tokens: int = TOKENS) -> Rows:
    """About ``tokens`` tokens of the files ``data`` (see ``gemma3.data.pack``), in rows that each begin with BOS.

    They are spread evenly over the data. Without data they are those of the sample that comes with the checkpoint, or
    else with the demo checkpoint. Raises BadInput for data that cannot be used.
    """
    files = data or _samples(source.path) or _samples(resolve_checkpoint("demo"))
    length = min(ROW_TOKENS, source.config.max_position_embeddings)
    rows = pack(files, source.tokenizer, length, source.config, chat=source.chat)
    total, count = len(rows.tokens), max(1, tokens // length)
    chosen = sorted({number * total // count for number in range(count)})
    return Rows(rows.tokens[chosen], [rows.images[number] for number in chosen])


def calibrate(checkpoint: QuantizedCheckpoint, rows: Rows) -> dict[int, PerChannel]:
    """The scales of each layer, from the keys and values of ``rows``."""
    config = checkpoint.config
    log.info("calibrating the scales of keys and values on %d tokens", rows.tokens.size)
    model = Streamed(config, checkpoint.weights, [Variant()])
    seen = {index: _Largest() for index in range(config.num_layers)}
    x, steps = [], []
    with torch.inference_mode():
        for tokens, images in zip(rows.tokens, rows.images, strict=True):
            ids = torch.from_numpy(tokens).long()[None]
            pixels = np.concatenate([network_input(image) for image in images]) if images else None
            soft_tokens = None if pixels is None else model.soft_tokens(torch.from_numpy(pixels))
            x += model.embed(ids, soft_tokens)
            steps.append(steps_of(config, ids, torch.float32, images=bool(images)))
        for index, _, layer in model.layers():
            layer.self_attn.round_heads = seen[index]
            x = [layer(one, step[config.layers[index]], None) for one, step in zip(x, steps, strict=True)]
    return {index: PerChannel(scales_of(one.keys), scales_of(one.values)) for index, one in seen.items()}


def scales_of(largest: Tensor, margin: float = MARGIN) -> Tensor:
    """float32 [K, D]: the scales for channels whose largest absolute values [K, D] were seen in calibration.

    A channel that was always (nearly) 0 gets a scale by the largest value of its layer, so that no scale is 0.
    """
    floor = float(largest.max()) / LARGEST or 1.0
    return (largest.float().clamp(min=floor) * (margin / LARGEST)).contiguous()


def _samples(directory: Path) -> list[Path]:
    return [directory / name for name in SAMPLES if (directory / name).is_file()]
