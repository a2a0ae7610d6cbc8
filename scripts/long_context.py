"""Compare a bundle's graph with the eager model far out in its context, without feeding all that comes before.

    python -m scripts.long_context BUNDLE --checkpoint CHECKPOINT --format onnx
    python -m scripts.long_context BUNDLE --checkpoint CHECKPOINT --starts 32760 131064

The caches of the file and of the eager model are filled with the same random keys and values, as if so many positions
had been fed. Then both take a few steps: across the first wrap of the bounded caches, across 32 768 where the context
reaches so far, and up to the context's last position. Keys are large, so that each query attends to few of them, and a
wrong angle of RoPE or a wrong row shows in the logits. Prints the differences at every position.

An .onnx is compared with its integers multiplied in float32 (see runtime_py/proof/exact_onnx.py), and over 4096 columns
of a large vocabulary, so the differences should be float error. A .pte rounds its activations as its reference does.
"""

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.bundle import stored_kv, weights_behind
from export.executorch.caches import by_position
from export.manifest import Manifest, read_manifest
from export.onnx.file import exact_twin
from export.target import FLOAT, rounding_of
from gemma3.cache import CacheLayout, cache_layout, first_row
from gemma3.model import Gemma3, LayerKV, RoundHeads, new_cache
from quant.eager import quantized_model
from quant.kv import LARGEST, PerChannel
from runtime_py.api import open_checkpoint
from runtime_py.backends import backend_of, open_session
from runtime_py.proof.golden import COLUMNS, FULL_VOCABULARY, log_sum_exp
from runtime_py.proof.prove import targets_of
from runtime_py.report import table
from runtime_py.sessions.onnx import OnnxSession
from runtime_py.sessions.protocol import Logits, Rewindable, Session

STEPS = 8
SHARP = 3.0  # the standard deviation of a key's elements


@dataclass(frozen=True)
class Rows:
    """A layer's keys and values at the last n of the positions fed so far: float32 [K, n, D] each, and int8 codes."""

    values: tuple[Tensor, Tensor]
    codes: tuple[Tensor, Tensor] | None


def random_rows(layer: int, count: int, shape: tuple[int, int], round_heads: RoundHeads | None) -> Rows:
    """``count`` rows of the layer of that number, [K, count, D] for a ``shape`` [K, D]. They depend on nothing else.

    With the scales of int8 keys and values they are codes, evenly distributed, and what these stand for.
    """
    generator = torch.Generator().manual_seed(layer)
    size = (shape[0], count, shape[1])
    if round_heads is None:
        keys, values = (torch.randn(size, generator=generator) for _ in "kv")
        return Rows((SHARP * keys, values), None)
    assert isinstance(round_heads, PerChannel)
    codes = [torch.randint(-LARGEST, LARGEST + 1, size, generator=generator, dtype=torch.int8) for _ in "kv"]
    scales = (round_heads.keys, round_heads.values)
    keys, values = (code * scale[:, None] for code, scale in zip(codes, scales, strict=True))
    return Rows((keys, values), (codes[0], codes[1]))


class Far:
    """A file's session and the eager model with the same weights, both put at any position."""

    def __init__(self, session: Rewindable, layout: CacheLayout, model: Gemma3, kv: Mapping[int, RoundHeads]) -> None:
        self._session, self._layout, self._model, self._kv = session, layout, model, kv
        self._ring = cache_layout(model.config, "ring", layout.context, layout.chunk)
        self._cache: list[LayerKV] = []

    def go(self, fed: int) -> None:
        """Fill all caches, as if ``fed`` positions had been fed."""
        self._session.reset()
        buffers = list(self._session.live(self._layout.context).values())  # keys, values of each layer in turn
        self._cache = new_cache(self._ring)
        for index, spec in enumerate(self._model.config.layers):
            slots, own = self._layout.layers[index].slots, self._cache[index]
            ring = own.keys.shape[2]
            count = min(fed, max(slots, ring))
            rows = random_rows(index, count, (spec.num_key_value_heads, spec.head_dim), self._kv.get(index))
            places = torch.arange(fed - min(count, ring), fed) % ring
            for part, values in zip((own.keys, own.values), rows.values, strict=True):
                part[0, :, places] = values[:, count - len(places) :]
            caches: Sequence[NDArray[Any]] = buffers[2 * index : 2 * index + 2]
            if self._layout.style == "ring":
                caches = by_position(self._layout.layers[index], *caches)
            for buffer, part in zip(caches, rows.codes or rows.values, strict=True):
                if self._layout.style == "compacting":
                    first = 0 if spec.window is None else first_row(slots, fed, spec.window)
                    buffer[0, :, : fed - first] = part[:, count - (fed - first) :].numpy()
                else:
                    held = min(fed, slots)
                    buffer[np.arange(fed - held, fed) % slots] = part[:, count - held :].transpose(0, 1).numpy()
        self._session.resume(range(fed), np.empty(0, np.float32))

    @torch.inference_mode()
    def steps(self, ids: Sequence[int]) -> Iterator[tuple[int, Logits, Logits]]:
        """Feed ``ids`` one at a time. Yields (position, the file's logits [V], the model's)."""
        for token in ids:
            position = self._session.position
            expected = self._model(torch.tensor([[token]]), self._cache, position)[0, 0].numpy()
            yield position, self._session.step(token), expected


def starts(layout: CacheLayout, window: int, steps: int) -> list[int]:
    """How many positions to fill before each of the comparisons."""
    bounded = min(layer.slots for layer in layout.layers)
    wanted = (window - 2, bounded - 2, 2 * bounded - window - 1, 2**15 - 2, layout.context - steps)
    return sorted({start for start in wanted if 0 < start <= layout.context - steps})


def compare(
    far: Far, beginnings: Sequence[int], vocabulary: int, columns: NDArray[np.int32] | None
) -> Iterator[Sequence[str]]:
    """Rows of the table: the position, the largest difference of a logit, the KL divergence, whether the top agrees."""
    random = np.random.default_rng(0)
    for start in beginnings:
        far.go(start)
        for position, found, whole in far.steps(random.integers(0, vocabulary, STEPS).tolist()):
            expected = whole if columns is None else whole[columns]
            p, q = (one.astype(np.float64) - log_sum_exp(one.astype(np.float64)) for one in (expected, found))
            largest = float(np.abs(found - expected).max())
            kl = float((np.exp(p) * (p - q)).sum())
            same = "yes" if int(found.argmax()) == int(expected.argmax()) else "no"
            yield f"{position}", f"{largest:.2g}", f"{kl:.2g}", same, f"{float(expected.std()):.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--format", choices=["onnx", "pte"])
    parser.add_argument("--starts", type=int, nargs="+", help="positions to fill before each comparison")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    manifest = read_manifest(arguments.bundle)
    format = arguments.format or next(iter(manifest.artifacts))
    layout, config = manifest.artifacts[format].cache, manifest.model
    beginnings = arguments.starts or starts(layout, config.sliding_window, STEPS)
    columns = None
    if format == "onnx" and config.vocab_size > FULL_VOCABULARY:
        columns = np.sort(np.random.default_rng(0).choice(config.vocab_size, COLUMNS, replace=False)).astype(np.int32)
    with ExitStack() as opened:
        far = _far(arguments.bundle, manifest, format, arguments.checkpoint, columns, opened)
        rows = list(compare(far, beginnings, config.vocab_size, columns))
    print(table(("position", "max |Δlogit|", "KL", "same top", "deviation of logits"), rows))


def _far(
    bundle: Path, manifest: Manifest, format: str, checkpoint: str, columns: NDArray[np.int32] | None, opened: ExitStack
) -> Far:
    targets = targets_of(manifest)
    weights = weights_behind(manifest, open_checkpoint(checkpoint), targets)
    own = stored_kv(bundle, manifest, weights, targets)[format]
    artifact = manifest.artifacts[format]
    name = FLOAT if format == "onnx" else artifact.references[0]
    rounding = rounding_of(backend_of(format).target, name, artifact.float_activations)
    model = quantized_model(manifest.model, own, rounding)
    if format == "onnx":
        twin = opened.enter_context(exact_twin(bundle / artifact.file, columns))
        session: Session = OnnxSession(
            twin, artifact.cache, manifest.model, logits=manifest.model.vocab_size if columns is None else len(columns)
        )
    else:
        session = open_session(bundle, format)
    assert isinstance(session, Rewindable)
    return Far(session, artifact.cache, model, own.kv)


if __name__ == "__main__":
    main()
