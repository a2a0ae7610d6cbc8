"""The GGUF tensors hold a bundle's integers: decoded as ggml's documentation of its blocks says, in plain Python."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gemma3.checkpoint import open_checkpoint
from gemma3.config import parse_config
from gemma3.errors import BadInput
from quant.integers import IntegerWeight
from scripts.peers.same_integers import export_floats, gguf_name, packed
from tests.shapes import SHAPES, random_model


def random_weight(bits: int, group: int, columns: int = 128) -> IntegerWeight:
    torch.manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, columns), dtype=torch.int8)
    scales = torch.rand(3, columns // group).clamp(2.0**-17).bfloat16().float()
    return IntegerWeight(codes, scales, bits)


def decoded_q4_0(row: bytes) -> list[float]:
    """block_q4_0: { ggml_half d; uint8_t qs[16]; }, low nibbles first."""
    values: list[float] = []
    for start in range(0, len(row), 18):
        (scale,) = struct.unpack("<e", row[start : start + 2])
        nibbles = row[start + 2 : start + 18]
        values += [scale * ((byte & 15) - 8) for byte in nibbles]
        values += [scale * ((byte >> 4) - 8) for byte in nibbles]
    return values


def decoded_q8_0(row: bytes) -> list[float]:
    """block_q8_0: { ggml_half d; int8_t qs[32]; }."""
    values: list[float] = []
    for start in range(0, len(row), 34):
        scale, *codes = struct.unpack("<e32b", row[start : start + 34])
        values += [scale * code for code in codes]
    return values


@pytest.mark.parametrize(
    ("bits", "group", "kind", "decoded"), [(4, 32, "Q4_0", decoded_q4_0), (8, 128, "Q8_0", decoded_q8_0)]
)
def test_every_value_is_the_bundles(bits: int, group: int, kind: str, decoded: object) -> None:
    weight = random_weight(bits, group)
    found, rows = packed("a", weight)
    assert found == kind
    assert callable(decoded)
    values: NDArray[np.float64] = np.array([decoded(row.tobytes()) for row in rows])
    assert np.array_equal(values, weight.dequantize().double().numpy())


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (4, 128), (8, 32)])
def test_what_no_type_holds_is_refused(bits: int, group: int) -> None:
    with pytest.raises(BadInput, match=f"{bits} bits in groups of {group}"):
        packed("a", random_weight(bits, group))


def test_every_weight_has_a_name_of_its_own() -> None:
    names = [name for name, _ in random_model(parse_config(SHAPES["like-270m"])).named_parameters()]
    assert len({gguf_name(name) for name in names if name != "lm_head.weight"}) == len(set(names) - {"lm_head.weight"})


def test_the_floats_of_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint)
    export_floats(opened, tmp_path)
    tensors = json.loads((tmp_path / "tensors.json").read_text())["tensors"]
    assert len(tensors) == len(opened.names)
    for name, added in (("model.layers.1.mlp.down_proj.weight", 0), ("model.norm.weight", 1)):
        found = np.load(tmp_path / tensors[gguf_name(name)]["file"])
        assert np.array_equal(found, opened.tensor(name).float().numpy() + np.float32(added))
