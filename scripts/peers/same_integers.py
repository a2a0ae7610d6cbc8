"""The integers of a bundle as the tensors of a GGUF file: Q4_0 for 4 bits in blocks of 32, Q8_0 for 8 bits per row.

llama.cpp then multiplies exactly the bundle's values: (n − 8) · d in Q4_0, n · d in Q8_0. Our scales are on the
bfloat16 grid and at least 2⁻¹⁷, so float16 holds them. ``export_tensors`` writes the tensors and the metadata into a
folder, and scripts/peers/write_gguf.py makes a file of them, in an environment that has the package gguf.
``export_floats`` does the same with a full-precision checkpoint, which llama.cpp can then quantize by itself.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.manifest import read_manifest
from export.onnx.file import load_graph, read_initializer
from export.onnx.read_back import stored_integers
from gemma3.checkpoint import Checkpoint
from gemma3.config import ModelConfig
from gemma3.errors import BadInput
from quant.integers import IntegerWeight

BLOCK = 32
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
OTHER_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def export_tensors(bundle: Path, folder: Path) -> None:
    """Write tensors.json and a .npy of each tensor of ``bundle`` into ``folder``.

    Raises BadInput when the bundle has no .onnx, and for weights that are neither Q4_0 nor Q8_0.
    """
    manifest = read_manifest(bundle)
    if "onnx" not in manifest.artifacts:
        raise BadInput(f"{bundle}: holds no .onnx, from which the integers are read; export it with --format both")
    _write(folder, manifest.model, _tensors(bundle / manifest.artifacts["onnx"].file))


def export_floats(checkpoint: Checkpoint, folder: Path) -> None:
    """Write tensors.json and a .npy of each tensor of a text-only, tied checkpoint into ``folder``, all in float32."""
    weights = ((name, weight.float() + name.endswith("norm.weight")) for name, weight in checkpoint.items())
    _write(folder, checkpoint.config, ((gguf_name(name), "F32", weight.numpy()) for name, weight in weights))


def _write(folder: Path, config: ModelConfig, tensors: Iterable[tuple[str, str, NDArray[Any]]]) -> None:
    entries = {}
    for index, (name, kind, data) in enumerate(tensors):
        np.save(folder / f"{index}.npy", data)
        entries[name] = {"file": f"{index}.npy", "type": kind}
    (folder / "tensors.json").write_text(json.dumps({"metadata": metadata(config), "tensors": entries}))


def _tensors(graph: Path) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """(name in GGUF, type, data) of every tensor."""
    for name, weight in dict(stored_integers(graph)).items():  # a tied table comes twice
        yield gguf_name(name), *packed(name, weight)
    for tensor in load_graph(graph).graph.initializer:
        if tensor.name.endswith("norm.weight"):  # both formats store 1 + weight
            yield gguf_name(tensor.name), "F32", np.array(read_initializer(graph, tensor))


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return OTHER_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def packed(name: str, weight: IntegerWeight) -> tuple[str, NDArray[np.uint8]]:
    """The GGUF type of a weight, and its rows as bytes. Raises BadInput when no type holds its integers."""
    if weight.bits == 4 and weight.group_size == BLOCK:
        return "Q4_0", q4_0(weight)
    if weight.bits == 8 and weight.per_channel and weight.codes.shape[1] % BLOCK == 0:
        return "Q8_0", q8_0(weight)
    raise BadInput(
        f"{name} has {weight.bits} bits in groups of {weight.group_size}, which neither Q4_0 nor Q8_0 holds; "
        "export with --scheme int4-block32"
    )


def q4_0(weight: IntegerWeight) -> NDArray[np.uint8]:
    """Blocks of 32: a float16 scale, then 16 bytes.

    The low nibble of byte j is code + 8 of element j, its high nibble that of element j + 16.
    """
    rows, columns = weight.codes.shape
    codes = (weight.codes.to(torch.int16) + 8).to(torch.uint8).view(rows, columns // BLOCK, 2, BLOCK // 2)
    scales = weight.scales.half().view(torch.uint8).view(rows, columns // BLOCK, 2)
    return np.asarray(torch.cat((scales, codes[:, :, 0] | codes[:, :, 1] << 4), -1).view(rows, -1).numpy())


def q8_0(weight: IntegerWeight) -> NDArray[np.uint8]:
    """Blocks of 32: the row's scale in float16, then 32 codes of int8."""
    rows, columns = weight.codes.shape
    codes = weight.codes.view(torch.uint8).view(rows, columns // BLOCK, BLOCK)
    scales = weight.scales.half().view(torch.uint8).view(rows, 1, 2).expand(rows, columns // BLOCK, 2)
    return np.asarray(torch.cat((scales, codes), -1).view(rows, -1).numpy())


def metadata(config: ModelConfig) -> dict[str, Any]:
    """The arguments of GGUFWriter's methods add_…, by the rest of their names, and the size of the vocabulary."""
    return {
        "vocab_size": config.vocab_size,
        "add": {
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "block_count": config.num_layers,
            "feed_forward_length": config.intermediate_size,
            "head_count": config.num_attention_heads,
            "head_count_kv": config.num_key_value_heads,
            "key_length": config.head_dim,
            "value_length": config.head_dim,
            "layer_norm_rms_eps": config.rms_norm_eps,
            "sliding_window": config.sliding_window,
            "rope_freq_base": config.global_rope.theta,
        },
    }
