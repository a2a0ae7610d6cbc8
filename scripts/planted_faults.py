"""Plant faults in exported files, and count which of them the proof finds.

    python -m scripts.planted_faults
    python -m scripts.planted_faults --format onnx --layers 3 26 --deviations 1 2 4 8
    python -m scripts.planted_faults --checkpoint DIRECTORY --format pte --scheme int4-channel

Without --checkpoint the models are small and random, with norms as large as those of a trained Gemma and with logits of
the given standard deviations. The right file must pass, and each faulty one must not. Prints a table: for each fault
the checks that found it. docs/validation.md has the results.
"""

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file

from export import bundle
from export.bundle import draft_bundle
from export.checks import Check
from export.target import Export, Target
from gemma3.cache import CacheDtype, CacheLayout, cache_layout
from gemma3.config import SLIDING, ModelConfig
from quant.integers import IntegerWeight
from quant.kv import PerChannel, calibrate, calibration_rows
from quant.quantize import in_recipe
from quant.recipe import scheme_recipe
from quant.source import open_source
from runtime_py.backends import backend_of
from runtime_py.proof import prove
from runtime_py.report import table
from runtime_py.sessions.protocol import Image, Logits, Session
from scripts.random_checkpoint import IMAGE_PIECES, as_released, as_trained, made_up_tokenizer, random_weights

CONTEXT, CHUNK = 256, 32
SMALL: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 16,
    "sliding_window_pattern": 3,
    "max_position_embeddings": CONTEXT,
    "query_pre_attn_scalar": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
}
MARKERS = dict(zip((4093, 4094), IMAGE_PIECES.values(), strict=True)) | {4095: "<image_soft_token>"}
SEEING: dict[str, Any] = {
    "model_type": "gemma3",
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
        "vision_use_head": False,
    },
    "mm_tokens_per_image": 4,
    "boi_token_index": 4093,
    "eoi_token_index": 4094,
    "image_token_index": 4095,
}


def small_checkpoint(directory: Path, layers: int, deviation: float, images: bool = False) -> Path:
    """Write a small random checkpoint with trained-looking norms and logits of the given standard deviation."""
    text = SMALL | {"num_hidden_layers": layers}
    config = SEEING | {"text_config": text} if images else text
    weights = random_weights(config, seed=1)
    as_trained(weights, deviation, seed=1)
    directory.mkdir()
    named = {as_released(name) if images else name: weight for name, weight in weights.items()}
    save_file(named, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.model").write_bytes(made_up_tokenizer(4096, MARKERS if images else None))
    return directory


class Wrapped:
    """A session with a fault, over a right one. Everything that is not overridden is the right one's."""

    def __init__(self, session: Any) -> None:
        self._right = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._right, name)

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        logits: Logits = self._right.prefill(ids, images)
        return logits


class StaleReset(Wrapped):
    """After its second reset, the logits are larger by one unit in the last place."""

    resets = 0

    def reset(self) -> None:
        self._right.reset()
        self.resets += 1

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        logits = super().prefill(ids, images)
        return np.nextafter(logits, np.float32(np.inf)) if self.resets > 1 else logits


class OneBadPosition(Wrapped):
    """The logits at one position are those of other tokens: at 50, and in large models one past the window of 512."""

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        logits = super().prefill(ids, images)
        return logits[::-1].copy() if self._right.position in (51, 514) else logits


class SwappedImages(Wrapped):
    """The order of a call's images is reversed."""

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        return super().prefill(ids, images[::-1])


Scales = Mapping[int, PerChannel]


@dataclass(frozen=True)
class Fault:
    """A fault: in what the exporter is given, in the layout of the caches, or in the session that runs the file."""

    name: str
    config: Callable[[ModelConfig], ModelConfig] = lambda config: config
    weights: Callable[[dict[str, Any]], dict[str, Any]] = lambda weights: weights
    layout: Callable[[CacheLayout, ModelConfig], CacheLayout] = lambda layout, _: layout
    session: Callable[[Session], Any] = lambda session: session
    images: bool = False
    style: str | None = None  # the style of cache that can have it; None: any
    kv: Callable[[Scales], Scales] | None = None  # the scales of an int8 cache; None: a float32 cache


def shifted_scales(weights: dict[str, Any]) -> dict[str, Any]:
    """One row of scales of one weight is that of the next row."""
    name = next(name for name, weight in weights.items() if isinstance(weight, IntegerWeight) and "mlp" in name)
    scales = weights[name].scales.clone()
    scales[3] = scales[4]
    return weights | {name: replace(weights[name], scales=scales)}


def shorter_window(config: ModelConfig) -> ModelConfig:
    return replace(config, sliding_window=config.sliding_window - 1)


def short_ring(layout: CacheLayout, config: ModelConfig) -> CacheLayout:
    """Rings that hold the window, but not also the chunk that is written before its first query reads."""
    slots = max(config.sliding_window + 2, layout.chunk)
    layers = (replace(one, slots=slots) if one.kind == SLIDING else one for one in layout.layers)
    return replace(layout, layers=tuple(layers))


def of_next_layer(scales: Scales) -> Scales:
    """The keys of the first layer have the scales of the second."""
    return {**scales, 0: replace(scales[0], keys=scales[1].keys)}


def swapped(scales: Scales) -> Scales:
    """The keys of the first layer have the scales of its values, and the other way round."""
    return {**scales, 0: PerChannel(scales[0].values, scales[0].keys)}


def one_larger(scales: Scales) -> Scales:
    """One scale of the last layer's values is larger by one unit in the last place."""
    last = max(scales)
    values = scales[last].values.clone()
    values[0, 0] = torch.nextafter(values[0, 0], torch.tensor(torch.inf))
    return {**scales, last: replace(scales[last], values=values)}


RIGHT = Fault("none: the right file")
FAULTS = (
    RIGHT,
    Fault("window − 1", config=shorter_window),
    Fault("window + 1", config=lambda config: replace(config, sliding_window=config.sliding_window + 1)),
    Fault("short ring", layout=short_ring, style="ring"),
    Fault("local RoPE base 11 000 for 10 000", config=lambda config: replace(config, local_rope=other_rope(config))),
    Fault("one row of scales shifted", weights=shifted_scales),
    Fault("stale reset", session=StaleReset),
    Fault("one bad position", session=OneBadPosition),
    Fault("swapped images", session=SwappedImages, images=True),
    Fault("none: the right file with an int8 cache", kv=lambda scales: scales, style="compacting"),
    Fault("int8 cache: k_scale of the next layer", kv=of_next_layer, style="compacting"),
    Fault("int8 cache: k_scale and v_scale swapped", kv=swapped, style="compacting"),
    Fault("int8 cache: one v_scale off by one unit", kv=one_larger, style="compacting"),
    Fault("int8 cache: window − 1", config=shorter_window, kv=lambda scales: scales, style="compacting"),
)


def other_rope(config: ModelConfig) -> Any:
    return replace(config.local_rope, theta=1.1 * config.local_rope.theta)


def proof_of(checkpoint: Path, format: str, scheme: str, fault: Fault, context: int, chunk: int) -> list[Check]:
    """The checks of a file of ``format`` with ``fault``, exported from ``checkpoint`` in ``scheme``."""
    backend = backend_of(format)
    quantized = in_recipe(open_source(checkpoint), scheme_recipe(scheme))
    right = backend.target.export

    dtype: CacheDtype = "float32" if fault.kv is None else "int8"

    def export(config: ModelConfig, weights: Any, *rest: Any) -> Any:
        scales = rest[-1] if fault.kv is None else fault.kv(rest[-1])
        return right(fault.config(config), fault.weights(dict(weights)), *(*rest[:-1], scales))

    target = replace(backend.target, export=cast(Export, export))

    def layouts(config: ModelConfig, targets: Sequence[Target], *_: Any) -> dict[str, CacheLayout]:
        layout = cache_layout(config, target.cache_style, context, bundle.largest_call(config, context, chunk), dtype)
        return {format: fault.layout(layout, config)}

    def opened(*arguments: Any) -> Any:
        from runtime_py.backends import open_session

        return fault.session(open_session(*arguments))

    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as directory, ExitStack() as patches:
        patches.enter_context(patch.object(bundle, "cache_layouts", layouts))
        patches.enter_context(patch.object(prove, "open_session", opened))
        out = Path(directory) / "out"
        scales = None if fault.kv is None else calibrate(quantized, calibration_rows(quantized))
        with not_sealed(), draft_bundle(quantized, out, targets=[target], kv=dtype, kv_scales=scales) as draft:
            checks = prove.prove(draft)
    return checks


@contextmanager
def not_sealed() -> Iterator[None]:
    """The draft is thrown away."""
    try:
        yield
    except RuntimeError as error:
        if "was not sealed" not in str(error):
            raise


def found_by(checks: Sequence[Check]) -> str:
    """The kinds of checks that did not pass, most telling first; "passes" if all did."""
    failed = {check.id.partition("/")[0] for check in checks if not check.passed}
    order = ("integers", "kv-scales", "float32", "single-steps", "reset", "soft-tokens", "walk", "landmark")
    return ", ".join(sorted(failed, key=order.index)) or "passes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--format", nargs="+", choices=["onnx", "pte"], default=["onnx", "pte"])
    parser.add_argument("--scheme", nargs="+", default=["int4-block32"])
    parser.add_argument("--layers", nargs="+", type=int, default=[3])
    parser.add_argument("--deviations", nargs="+", type=float, default=[1, 2, 4, 8])
    parser.add_argument("--checkpoint", type=Path, help="this one instead of small ones")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--faults", nargs="+", help="only those whose names contain one of these")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    warnings.simplefilter("ignore")
    chosen = [one for one in FAULTS if not arguments.faults or any(part in one.name for part in arguments.faults)]
    for format in arguments.format:
        style = backend_of(format).target.cache_style
        for scheme in arguments.scheme:
            for layers in arguments.layers if arguments.checkpoint is None else [0]:
                deviations = arguments.deviations if arguments.checkpoint is None else [0]
                columns: list[list[str]] = []
                faults = [one for one in chosen if one.style in (None, style)]
                if arguments.checkpoint is not None:
                    faults = [one for one in faults if not one.images]
                for deviation in deviations:
                    column = []
                    for fault in faults:
                        with tempfile.TemporaryDirectory() as directory:
                            checkpoint = arguments.checkpoint or small_checkpoint(
                                Path(directory) / "checkpoint", layers, deviation, fault.images
                            )
                            checks = proof_of(checkpoint, format, scheme, fault, arguments.context, arguments.chunk)
                        column.append(found_by(checks))
                        print(format, scheme, layers, deviation, fault.name, "->", column[-1], flush=True)
                    columns.append(column)
                title = arguments.checkpoint or f"{layers} layers"
                print(f"\n.{format}, {scheme}, {title}")
                names = [fault.name for fault in faults]
                header = ("fault", *(f"deviation {deviation:g}" for deviation in deviations))
                print(table(header, [(name, *row) for name, *row in zip(names, *columns, strict=True)], left=9), "\n")


if __name__ == "__main__":
    main()
