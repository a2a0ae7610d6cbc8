"""The integer weights that a .pte holds, read from its bytes.

The weights have no names in the file, but their matrix multiplications are in the order of the networks' code. In the
text model this is LAYER_LINEARS for each layer, then the head. In the vision model it is the patch embedding,
VISION_LINEARS for each layer, then the projection into the text model.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.executorch.file import PteFile, StoredLinear, cache_shapes_pte, unpack_nibbles
from export.target import TOKEN_EMBEDDING, VISION_ENCODER
from gemma3.errors import BadInput
from gemma3.names import EMBEDDING, HEAD, PROJECTOR, VISION_TOWER, layer, vision_layer
from quant.integers import IntegerWeight

# The linear layers of a layer in order. The query and the key projection are two linear layers each: the first and the
# second half of the rows of every head.
LAYER_LINEARS: tuple[str, ...] = (
    "self_attn.q_proj",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
VISION_LINEARS: tuple[str, ...] = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)


def read_back_pte(path: Path) -> Iterator[tuple[str, IntegerWeight]]:
    """Every integer weight in the file by checkpoint name. A tied table comes twice, once for each use.

    Raises BadInput when the file's linear layers are not those of this network.
    """
    return stored_integers(PteFile(path))


def stored_integers(file: PteFile) -> Iterator[tuple[str, IntegerWeight]]:
    """``read_back_pte`` for an opened file."""
    for name, arguments in file.kernels():
        if name.startswith("quantized_decomposed::embedding"):
            yield EMBEDDING, embedding_integers(file, name, arguments)
    head_dim = cache_shapes_pte(file)[1][-1]  # of the first layer's values
    for name, linears in groupby(named_linears(file), key=lambda pair: pair[0]):
        parts = [linear.read() for _, linear in linears if linear.read is not None]
        if len(parts) == 2:
            yield name, join_halves(parts[0], parts[1], head_dim)
        elif parts:
            yield name, parts[0]


def named_linears(file: PteFile) -> Iterator[tuple[str, StoredLinear]]:
    """Each matrix multiplication with the checkpoint name of its weight. The two halves of a projection share a name.

    Raises BadInput when the number of matrix multiplications is not that of this network.
    """
    for plan in file.networks:
        if plan.name == TOKEN_EMBEDDING:
            continue
        if plan.name == VISION_ENCODER:
            first, prefix, in_layer = (
                [f"{VISION_TOWER}.embeddings.patch_embedding.weight"],
                vision_layer,
                VISION_LINEARS,
            )
            last = f"{PROJECTOR}.mm_input_projection_weight"
        else:
            first, prefix, in_layer = [], layer, LAYER_LINEARS
            last = EMBEDDING if file.constant_method("tie_word_embeddings") else HEAD
        linears = list(file.linears(plan.name))
        layers, rest = divmod(len(linears) - len(first) - 1, len(in_layer))
        if rest:
            raise BadInput(
                f"{file.path}: {plan.name} has {len(linears)} linear layers, expected {len(in_layer)} per layer "
                f"and {last}; export it again"
            )
        inner = [f"{prefix(index)}.{place}.weight" for index in range(layers) for place in in_layer]
        yield from zip([*first, *inner, last], linears, strict=True)


def embedding_integers(file: PteFile, kernel: str, arguments: list[Any]) -> IntegerWeight:
    """The table that a call of an embedding kernel reads."""
    table, scales = arguments[:2]
    bits = 8 if "embedding_byte" in kernel else 4
    codes = file.constant(table)
    if bits == 4:
        codes = unpack_nibbles(codes, first="high")
    return IntegerWeight(codes, file.constant(scales).float().view(len(codes), -1), bits)


def join_halves(first: IntegerWeight, second: IntegerWeight, head_dim: int) -> IntegerWeight:
    """The projection [heads · head_dim, K] whose rows were split into the first and the second half of every head."""

    def join(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([x.view(-1, head_dim // 2, x.shape[1]) for x in (a, b)], dim=1).view(-1, a.shape[1])

    return IntegerWeight(join(first.codes, second.codes), join(first.scales, second.scales), first.bits)
