"""Lower Gemma 3 to one .pte: one method takes prompts and single tokens, holds the caches, and runs on XNNPACK.

    forward(tokens int64 [1, S], start_pos int64 [1]) → logits float32 [1, 1, V] of the last token; 1 ≤ S ≤ chunk

With a start_pos of the position + (k − 1) · LOGITS_STRIDE it returns the logits [1, k, V] of the last k tokens instead.

A multimodal model has three methods in the same file, which ExecuTorch's multimodal runners look for by name. The last
of the E + 1 channels says whether an embedding belongs to an image:

    vision_encoder(pixels float32 [1, 3, size, size] in 0 … 1) → soft tokens float32 [1, T, E + 1]
    token_embedding(tokens int64 [1, S]) → embeddings float32 [1, S, E + 1]
    text_decoder(embeddings float32 [1, S, E + 1], start_pos int64 [1]) → logits float32 [1, 1, V]

The constant methods are those that ExecuTorch's stock runners ask for, and two for readers of
our own: get_most_logits, the largest k, and tie_word_embeddings.

``to_edge_transform_and_lower``, the usual way to lower a model, traces the whole model four times and runs XNNPACK's 17
graph passes (for images, batch norms, stock attention) over every delegate: 128 s for six tiny layers. The way below
takes under 20 s, for these reasons:

* ``to_edge`` with linear layers preserved decomposes once; ``to_backend`` then only partitions.
* One of XNNPACK's passes runs instead of 17 (see export/executorch/partition.py).
* Activations are two-dimensional in the model. Tracing a linear layer with a three-dimensional input of dynamic length
  costs several symbolic reshapes.

Every step on the way copies all constants of a program. So the matrices of a model are hollow (see ``layers.Later``)
until XNNPACK's backend packs them, one delegate after another. The bytes of the file are in memory once.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir._serialize._serialize import serialize_for_executorch
from executorch.exir.lowered_backend_module import get_lowered_submodules
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.schema import BackendDelegate, DelegateCall, ExecutionPlan, KernelCall
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ExportGraphSignature
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from export.executorch.caches import cache_shapes
from export.executorch.file import WRITES, PteFile, cache_shapes_pte, early_reads, kernel_counts
from export.executorch.layers import fill, flatten, later
from export.executorch.partition import LevelPartitioner
from export.executorch.text import ExecutorchModel, TokenEmbedding
from export.executorch.vision import VisionEncoder
from export.target import (
    FORWARD,
    TEXT_DECODER,
    TOKEN_EMBEDDING,
    VISION_ENCODER,
    ExportReport,
    Method,
    TensorSpec,
    most_logits,
    second_table,
)
from gemma3.cache import CacheLayout
from gemma3.config import ModelConfig
from gemma3.errors import BadInput, VerificationFailed
from gemma3.host.memory import give_back
from quant.weights import Weights

log = logging.getLogger(__name__)


def export_pte(
    config: ModelConfig, weights: Weights, layout: CacheLayout, eos_ids: Sequence[int], path: Path
) -> ExportReport:
    """Write the .pte ``path``. It is the target's exporter (see ``export.target.Export``).

    ``weights`` are by checkpoint name, and asked for one at a time: float tensors (written as float32), or
    IntegerWeight of 4 bits, or of 8 bits per channel. Linear layers with integer weights round their input to int8 per
    token. ``layout`` must be of the ring style, and its chunk must be at least an image's soft tokens. Raises BadInput
    for weights that XNNPACK has no kernel for and for a smaller chunk, and VerificationFailed when the file's caches
    are not the layout's, or are read before they are written. The same arguments give the same bytes.
    """
    if config.vision and layout.chunk < config.vision.tokens_per_image:
        raise BadInput(
            f"chunk {layout.chunk} is smaller than an image's {config.vision.tokens_per_image} tokens, which go into "
            f"one call; use --chunk {config.vision.tokens_per_image} or more"
        )
    with torch.no_grad():
        programs = trace(config, weights, layout)
    executorch = lower(programs, constant_methods(config, layout, eos_ids))
    del programs
    with path.open("wb") as stream:
        executorch.write_to_file(stream)
    forget(executorch)
    del executorch
    give_back()

    file = PteFile(path)
    expected = [list(shape) for layer in layout.layers for shape in cache_shapes(layer)]
    if cache_shapes_pte(file) != expected:
        raise VerificationFailed(f"{path}: its caches are {cache_shapes_pte(file)}, the layout asks for {expected}")
    early = {plan.name: calls for plan in file.networks if (calls := early_reads(plan))}
    if early:
        raise VerificationFailed(f"{path}: these calls of its methods read a cache before the step writes it: {early}")
    details = {
        "second_table_bytes": second_table(config, weights),
        "delegates": sum(len(plan.delegates) for plan in file.networks),
        "undelegated": kernel_counts(file),  # operator → calls
    }
    return ExportReport(methods_of(config, path.name), (path.name,), details=details)


@dataclass(frozen=True)
class Traced:
    """The traced graph of a method, and the model that fills its hollow buffers."""

    program: ExportedProgram
    model: nn.Module


def trace(config: ModelConfig, weights: Weights, layout: CacheLayout) -> dict[str, Traced]:
    """The traced graph of each method, by name. The number of tokens is symbolic, from 1 to the layout's chunk."""
    length = min(3, layout.chunk)
    tokens, start_pos = torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    held = later(weights)
    if config.vision is None:
        return {FORWARD: _trace(ExecutorchModel(config, held, layout), (tokens, start_pos), layout.chunk)}
    embeddings = torch.zeros(1, length, config.hidden_size + 1)
    return {
        **trace_encoder(config, weights),
        TOKEN_EMBEDDING: _trace(TokenEmbedding(config, held), (tokens,), layout.chunk),
        TEXT_DECODER: _trace(ExecutorchModel(config, held, layout), (embeddings, start_pos), layout.chunk),
    }


def trace_encoder(config: ModelConfig, weights: Weights) -> dict[str, Traced]:
    """The traced graph of the vision model's method alone, by name."""
    assert config.vision is not None
    size = config.vision.image_size
    return {VISION_ENCODER: _trace(VisionEncoder(config, later(weights)), (torch.zeros(1, 3, size, size),), 1)}


def _trace(model: nn.Module, inputs: tuple[Tensor, ...], longest: int) -> Traced:
    """The traced graph. If ``longest`` is over 1, axis 1 of the first input is dynamic: 1 to ``longest`` tokens."""
    dynamic = None
    if longest > 1:
        dynamic = ({1: Dim("length", min=1, max=longest)}, *(None for _ in inputs[1:]))
    return Traced(torch.export.export(model.eval(), inputs, dynamic_shapes=dynamic, strict=False), model)


def methods_of(config: ModelConfig, file: str) -> tuple[Method, ...]:
    """The methods of the .pte ``file``. The dimension "length" may be 1 to the chunk.

    "logits_to_keep" is 1, unless start_pos asks for more (see ``ExecutorchModel``).
    """

    def method(name: str, inputs: list[TensorSpec], output: TensorSpec) -> Method:
        return Method(name, file, tuple(inputs), (output,))

    tokens, start = TensorSpec("tokens", "int64", (1, "length")), TensorSpec("start_pos", "int64", (1,))
    logits = TensorSpec("logits", "float32", (1, "logits_to_keep", config.vocab_size))
    if config.vision is None:
        return (method(FORWARD, [tokens, start], logits),)
    size, channels = config.vision.image_size, config.hidden_size + 1
    pixels = TensorSpec("pixels", "float32", (1, 3, size, size))
    soft_tokens = TensorSpec("soft_tokens", "float32", (1, config.vision.tokens_per_image, channels))
    embeddings = TensorSpec("embeddings", "float32", (1, "length", channels))
    return (
        method(VISION_ENCODER, [pixels], soft_tokens),
        method(TOKEN_EMBEDDING, [tokens], embeddings),
        method(TEXT_DECODER, [embeddings, start], logits),
    )


# Inputs stay in the caller's memory. If memory was planned for them, they would be copied there.
PLANNING = {"alloc_graph_input": False}


class CachesApart(MemoryPlanningPass):  # type: ignore[misc]
    """Plans separate memory for the caches, which only the method with the caches asks for.

    Methods loaded from one program share the rest of their memory and overwrite one another's values there.
    """

    def __init__(self) -> None:
        super().__init__(**PLANNING, share_mutable_buffers=True)

    def run(self, graph_module: GraphModule, graph_signature: ExportGraphSignature | None = None) -> PassResult:
        result = super().run(graph_module, graph_signature)
        if graph_signature is not None and not graph_signature.buffers_to_mutate:
            self.state.graph_modules.pop()  # this graph must not get the caches' memory
        return result


def lower(programs: ExportedProgram | dict[str, Traced], constants: dict[str, Any]) -> Any:
    """The methods in ExecuTorch's final form, with XNNPACK's part delegated: an ExecutorchProgramManager.

    ``constants`` are the values of the constant methods, by name. A single program becomes the method "forward".
    """
    methods = programs if isinstance(programs, dict) else {FORWARD: Traced(programs, nn.Module())}
    edge = to_edge(
        {name: method.program for name, method in methods.items()},
        constant_methods=constants,
        compile_config=EdgeCompileConfig(
            # The validity check would refuse the caches' custom operators, which are not in the edge dialect.
            _check_ir_validity=False,
            # Only the contiguous memory format occurs, and tracking formats would add an operator per copy.
            _skip_dim_order=True,
            preserve_ops=[torch.ops.aten.linear.default],
        ),
    )
    config = ExecutorchBackendConfig(
        memory_planning_pass=MemoryPlanningPass(**PLANNING) if len(methods) == 1 else CachesApart(),
        # So that a session can read the caches by name.
        emit_mutable_buffer_names=True,
    )
    models = {name: method.model for name, method in methods.items()}
    for name, model in models.items():
        flatten(edge.exported_program(name).state_dict, model)
    with filling(models):
        edge = edge.to_backend({name: LevelPartitioner(apart=name == VISION_ENCODER) for name in methods})
    give_back()
    for name, model in models.items():  # what XNNPACK did not get: the embedding table
        fill(edge.exported_program(name).state_dict, model)
    manager = edge.to_executorch(config)
    plans = manager.executorch_program.execution_plan
    changed = [unite_equal_delegates(plan) for plan in plans] + [name_only_caches(plan) for plan in plans]
    if any(changed):
        manager._pte_data, _ = serialize_for_executorch(
            manager._emitter_output, config, manager._data_serializer, manager._named_data
        )
    return manager


def forget(manager: Any) -> None:
    """Drop the constants of a lowered program, because caches of the compiler keep its graphs alive."""
    for name in manager.methods:
        program = manager.exported_program(name)
        program.state_dict.clear()
        for node in program.graph.nodes:
            node.meta.clear()  # its "spec" holds the storage of a constant
        for _, delegate, _ in get_lowered_submodules(program.graph_module):
            delegate.named_data_store_output.buffers.clear()


@contextmanager
def filling(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """In the block, XNNPACK's backend gets each delegate's constants filled by the method's model, and drops them.

    The backend takes the programs of all delegates at once, so this cannot be done before it is called.
    """

    def preprocess_all(programs: Mapping[str, Sequence[ExportedProgram]], specs: Mapping[str, Sequence[Any]]) -> Any:
        results: dict[str, list[Any]] = {}
        for method, delegates in programs.items():
            results[method] = []
            for program, spec in zip(delegates, specs[method], strict=True):
                fill(program.state_dict, models[method])
                if method == VISION_ENCODER:
                    depth_first(program.graph)
                results[method].append(XnnpackBackend.preprocess(program, spec))
                program.state_dict.clear()
        return results

    XnnpackBackend.preprocess_multimethod = staticmethod(preprocess_all)
    try:
        yield
    finally:
        del XnnpackBackend.preprocess_multimethod  # the inherited one is back


def depth_first(graph: Graph) -> None:
    """Put the nodes in the order in which the result's inputs need them, one input after another.

    Partitioning leaves them breadth-first, and XNNPACK computes and plans its memory in that order. The scores of all
    blocks of the vision model's attention would then be in memory at the same time.
    """
    (end,) = graph.find_nodes(op="output")
    waiting, seen = [end], set[Node]()
    while waiting:
        node = waiting[-1]
        missing = [source for source in node.all_input_nodes if source not in seen and source.op != "placeholder"]
        if missing:
            waiting.append(missing[0])
            continue
        seen.add(waiting.pop())
        if node is not end:
            end.prepend(node)


def unite_equal_delegates(plan: ExecutionPlan) -> bool:
    """Make every call of equal delegates use the first of them. Returns whether there were equal delegates.

    When a method is loaded, each delegate packs its own copy of its weights, even if another has packed the same ones.
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


def name_only_caches(plan: ExecutionPlan) -> bool:
    """Take the names of caches from their views, so that a name means one tensor. Returns whether there were views."""
    instructions = (instruction.instr_args for instruction in plan.chains[0].instructions)
    calls = [call for call in instructions if isinstance(call, KernelCall)]
    caches = {call.args[1] for call in calls if plan.operators[call.op_index].name.startswith(WRITES)}
    changed = False
    for index, value in enumerate(plan.values):
        info = getattr(value.val, "extra_tensor_info", None)
        if info is not None and info.fully_qualified_name and index not in caches:
            value.val.extra_tensor_info, changed = None, True
    return changed


def constant_methods(config: ModelConfig, layout: CacheLayout, eos_ids: Sequence[int]) -> dict[str, Any]:
    """The values of the constant methods by name. The stock runners' name for the chunk is get_max_seq_len."""
    return {
        "get_max_seq_len": layout.chunk,
        "get_max_context_len": layout.context,
        "get_vocab_size": config.vocab_size,
        "get_bos_id": config.bos_token_id,
        "get_eos_ids": list(eos_ids),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": layout.chunk > 1,
        # Not for stock runners: how many rows of logits a session may ask for, and what read_back.py needs to name the
        # head's weight.
        "get_most_logits": most_logits(layout),
        "tie_word_embeddings": config.tie_word_embeddings,
    }
