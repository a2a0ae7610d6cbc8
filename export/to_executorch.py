"""Lower Gemma 3 to one .pte: one method for prompts and single tokens, caches inside, XNNPACK delegates.

    forward(tokens int64 [1, S], start_pos int64 [1]) → logits float32 [1, 1, V] of the last token; 1 ≤ S ≤ chunk

A model that sees has three methods in the same file, which ExecuTorch's multimodal runners look for by name; the last
channel of E + 1 says whether an embedding is an image's:

    vision_encoder(pixels float32 [1, 3, size, size] in 0 … 1) → soft tokens float32 [1, T, E + 1]
    token_embedding(tokens int64 [1, S]) → embeddings float32 [1, S, E + 1]
    text_decoder(embeddings float32 [1, S, E + 1], start_pos int64 [1]) → logits float32 [1, 1, V]

The constant methods are those that ExecuTorch's stock runners ask for. ``to_edge_transform_and_lower``, the usual way
here, traces the whole model four times and runs XNNPACK's 17 graph passes (for images, batch norms, stock attention)
over every delegate: 128 s for six tiny layers, where the way below takes under 20 s. What makes the difference:

* ``to_edge`` with linears preserved decomposes once, ``to_backend`` then only partitions.
* One pass of XNNPACK's instead of 17 (see export/xnnpack_partition.py).
* Activations are two-dimensional in the model, since the fake linear of a three-dimensional input of dynamic
  length costs several symbolic reshapes.
"""

import logging
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir._serialize._serialize import serialize_for_executorch
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.schema import BackendDelegate, DelegateCall, ExecutionPlan
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ExportGraphSignature
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from export.executorch_model import ExecutorchModel, TokenEmbedding, Weights
from export.executorch_vision import VisionEncoder
from export.manifest import FORWARD, TEXT_DECODER, TOKEN_EMBEDDING, VISION_ENCODER
from export.pte_file import (
    EMBEDDING,
    PteFile,
    cache_bytes_pte,
    cache_shapes_pte,
    kernel_counts,
    read_back_pte,
    stored_integers,
)
from export.xnnpack_partition import LevelPartitioner
from gemma3.cache import CacheLayout
from gemma3.config import ModelConfig
from gemma3.errors import BadInput, VerificationFailed
from quant.integers import IntegerWeight, equal_codes

__all__ = ["PteReport", "cache_bytes_pte", "export_pte", "read_back_pte"]

log = logging.getLogger(__name__)


Shapes = dict[str, list[int | str]]


@dataclass(frozen=True)
class Signature:
    inputs: Shapes
    outputs: Shapes


@dataclass(frozen=True)
class PteReport:
    """What was written, what reading it back showed, and what making it took."""

    methods: dict[str, Signature]
    bytes: int
    ideal_bytes: int  # integers at their bits, scales at two bytes, other weights at four
    second_table_bytes: int  # the tied table again: a gather and a matrix multiplication cannot share one
    delegates: int
    undelegated: dict[str, int]  # operator → calls
    integers_equal: dict[str, int]  # weight → codes equal to the quantizer's, under equal scales
    integers_unequal: dict[str, int]
    seconds: float
    peak_rss_bytes: int  # of this process so far

    def to_dict(self) -> dict[str, Any]:
        """What describes the file: equal for equal files, so without time and memory. Integers are totals."""
        fields = asdict(self)
        for counts in ("integers_equal", "integers_unequal"):
            fields[counts] = sum(fields[counts].values())
        del fields["seconds"], fields["peak_rss_bytes"]
        return fields


def export_pte(
    config: ModelConfig, weights: Weights, layout: CacheLayout, path: Path, *, eos_ids: Sequence[int]
) -> PteReport:
    """Write ``path``, then read its integers back and compare.

    ``weights`` by checkpoint name: float tensors (written as float32) or IntegerWeight of 4 bits, or of 8 bits per
    channel; integer linears multiply with activations rounded to int8 per token. ``layout`` must be of the ring
    style, and its chunk hold an image's soft tokens. Raises BadInput for weights that XNNPACK has no kernel for or a
    shorter chunk, and VerificationFailed when an integer in the file is not the quantizer's. The same arguments give
    the same bytes.
    """
    if config.vision and layout.chunk < config.vision.tokens_per_image:
        raise BadInput(
            f"chunk {layout.chunk} is smaller than an image's {config.vision.tokens_per_image} tokens, which go into "
            f"one call; use --chunk {config.vision.tokens_per_image} or more"
        )
    started = time.perf_counter()
    with torch.no_grad():
        programs = trace(config, weights, layout)
    executorch = lower(programs, constant_methods(config, layout, eos_ids))
    del programs
    with path.open("wb") as stream:
        executorch.write_to_file(stream)
    del executorch
    seconds = time.perf_counter() - started

    file = PteFile(path)
    equal, unequal = compare_integers(weights, file)
    if any(unequal.values()):
        raise VerificationFailed(
            f"{path}: {sum(unequal.values())} integers are not the quantizer's, the first in "
            f"{next(name for name, count in unequal.items() if count)}; do not use this file"
        )
    _check_caches(file, layout)
    table = weights[EMBEDDING]
    report = PteReport(
        methods=signatures(config, layout),
        bytes=path.stat().st_size,
        ideal_bytes=sum(_ideal_bytes(weight) for weight in weights.values()),
        second_table_bytes=_ideal_bytes(table) if config.tie_word_embeddings else 0,
        delegates=sum(len(plan.delegates) for plan in file.networks),
        undelegated=kernel_counts(file),
        integers_equal=equal,
        integers_unequal=unequal,
        seconds=seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    log.info(
        "%s: %.1f MB, %d delegates, undelegated: %s; %.0f s, %.1f GB at most",
        path.name,
        report.bytes / 1e6,
        report.delegates,
        ", ".join(f"{count} {name}" for name, count in report.undelegated.items()),
        report.seconds,
        report.peak_rss_bytes / 1e9,
    )
    return report


def trace(config: ModelConfig, weights: Weights, layout: CacheLayout) -> dict[str, ExportedProgram]:
    """Each method's graph; the number of tokens is a symbol."""
    length = min(3, layout.chunk)
    tokens, start_pos = torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    if config.vision is None:
        return {FORWARD: _trace(ExecutorchModel(config, weights, layout), (tokens, start_pos), layout.chunk)}
    embeddings = torch.zeros(1, length, config.hidden_size + 1)
    return {
        **trace_encoder(config, weights),
        TOKEN_EMBEDDING: _trace(TokenEmbedding(config, weights), (tokens,), layout.chunk),
        TEXT_DECODER: _trace(ExecutorchModel(config, weights, layout), (embeddings, start_pos), layout.chunk),
    }


def trace_encoder(config: ModelConfig, weights: Weights) -> dict[str, ExportedProgram]:
    """The image encoder's method alone."""
    assert config.vision is not None
    size = config.vision.image_size
    return {VISION_ENCODER: _trace(VisionEncoder(config, weights), (torch.zeros(1, 3, size, size),), 1)}


def _trace(model: nn.Module, inputs: tuple[Tensor, ...], longest: int) -> ExportedProgram:
    """With ``longest`` over 1, the first input has 1 to so many tokens."""
    dynamic = None
    if longest > 1:
        dynamic = ({1: Dim("length", min=1, max=longest)}, *(None for _ in inputs[1:]))
    return torch.export.export(model.eval(), inputs, dynamic_shapes=dynamic, strict=False)


def signatures(config: ModelConfig, layout: CacheLayout) -> dict[str, Signature]:
    length, logits = f"1..{layout.chunk}", Shapes(logits=[1, 1, config.vocab_size])
    if config.vision is None:
        return {FORWARD: Signature({"tokens": [1, length], "start_pos": [1]}, logits)}
    size, channels = config.vision.image_size, config.hidden_size + 1
    return {
        VISION_ENCODER: Signature(
            {"pixels": [1, 3, size, size]}, {"soft_tokens": [1, config.vision.tokens_per_image, channels]}
        ),
        TOKEN_EMBEDDING: Signature({"tokens": [1, length]}, {"embeddings": [1, length, channels]}),
        TEXT_DECODER: Signature({"embeddings": [1, length, channels], "start_pos": [1]}, logits),
    }


# Inputs are the caller's memory: planned, they would be copied in.
PLANNING = {"alloc_graph_input": False}


class CachesApart(MemoryPlanningPass):  # type: ignore[misc]
    """Caches in memory of their own, which only the method that has them asks for.

    Methods loaded from one program share the rest of their memory, and overwrite what another has left there.
    """

    def __init__(self) -> None:
        super().__init__(**PLANNING, share_mutable_buffers=True)

    def run(self, graph_module: GraphModule, graph_signature: ExportGraphSignature | None = None) -> PassResult:
        result = super().run(graph_module, graph_signature)
        if graph_signature is not None and not graph_signature.buffers_to_mutate:
            self.state.graph_modules.pop()  # the graphs that get the caches' memory
        return result


def lower(programs: ExportedProgram | dict[str, ExportedProgram], constants: dict[str, Any]) -> Any:
    """The methods with XNNPACK's part delegated, in ExecuTorch's final form (an ExecutorchProgramManager).

    A program without a name becomes the method "forward".
    """
    methods = programs if isinstance(programs, dict) else {FORWARD: programs}
    edge = to_edge(
        methods,
        constant_methods=constants,
        compile_config=EdgeCompileConfig(
            # The caches' custom operators are not in the edge dialect's list.
            _check_ir_validity=False,
            # Memory formats other than contiguous do not occur; tracking them adds an operator per copy.
            _skip_dim_order=True,
            preserve_ops=[torch.ops.aten.linear.default],
        ),
    )
    config = ExecutorchBackendConfig(
        memory_planning_pass=MemoryPlanningPass(**PLANNING) if len(methods) == 1 else CachesApart(),
        # So that a session can look into the caches by name.
        emit_mutable_buffer_names=True,
    )
    partitioners = {name: LevelPartitioner(apart=name == VISION_ENCODER) for name in methods}
    manager = edge.to_backend(partitioners).to_executorch(config)
    united = [unite_equal_delegates(plan) for plan in manager.executorch_program.execution_plan]
    if any(united):
        manager._pte_data, _ = serialize_for_executorch(
            manager._emitter_output, config, manager._data_serializer, manager._named_data
        )
    return manager


def unite_equal_delegates(plan: ExecutionPlan) -> bool:
    """Let every call of equal delegates go to the first of them; whether there were any.

    Each delegate packs its weights for itself when the method is loaded, whatever else has packed the same.
    """
    every, kept = plan.delegates, list[BackendDelegate]()
    for delegate in every:
        if delegate not in kept:
            kept.append(delegate)
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if isinstance(call, DelegateCall):
            call.delegate_index = kept.index(every[call.delegate_index])
    plan.delegates = kept
    return len(kept) < len(every)


def constant_methods(config: ModelConfig, layout: CacheLayout, eos_ids: Sequence[int]) -> dict[str, Any]:
    """What stock runners ask a file. get_max_seq_len is their word for the largest call: the chunk."""
    return {
        "get_max_seq_len": layout.chunk,
        "get_max_context_len": layout.context,
        "get_vocab_size": config.vocab_size,
        "get_bos_id": config.bos_token_id,
        "get_eos_ids": list(eos_ids),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": layout.chunk > 1,
        # Ours: which name the head's weight goes by when the file is read back.
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def compare_integers(weights: Weights, file: PteFile) -> tuple[dict[str, int], dict[str, int]]:
    """By name, how many of the integers are (equal, unequal) in every place where the file holds them.

    An integer under another scale counts as unequal, like those of a weight that the file does not hold.
    """
    expected = {name: weight for name, weight in weights.items() if isinstance(weight, IntegerWeight)}
    equal: dict[str, int] = {}
    for name, stored in stored_integers(file):
        count = equal_codes(stored, expected[name]) if name in expected else 0
        equal[name] = min(count, equal.get(name, count))
    unequal = {name: weight.codes.numel() - equal.get(name, 0) for name, weight in expected.items()}
    return equal, unequal


def _check_caches(file: PteFile, layout: CacheLayout) -> None:
    expected = [[1, layer.slots, layout.num_key_value_heads, layout.head_dim] for layer in layout.layers for _ in "kv"]
    assert cache_shapes_pte(file) == expected, "the caches in the file are not the layout's"


def _ideal_bytes(weight: torch.Tensor | IntegerWeight) -> int:
    return weight.ideal_bytes if isinstance(weight, IntegerWeight) else 4 * weight.numel()
