"""The quantized weights that an .onnx file holds, read from its bytes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.onnx.file import WEIGHTS_KEY, graphs_of, load_graph, read_initializer
from export.onnx.layers import ATTENTION, KV_SCALES, SFP8_SCALE
from quant.integers import IntegerWeight
from quant.kv import PerChannel
from quant.sfp8 import Sfp8Weight
from quant.weights import QuantizedWeight


def read_back_onnx(path: Path) -> Iterator[tuple[str, QuantizedWeight]]:
    """Every quantized weight by checkpoint name, from the file and from the vision model's file beside it.

    Integers that several nodes use come once for each node. Raises BadInput as ``load_graph`` does.
    """
    for graph in graphs_of(path):
        yield from stored_integers(graph)
        yield from stored_sfp8(graph)


def stored_integers(path: Path) -> Iterator[tuple[str, IntegerWeight]]:
    """The integer weights of every node that computes with integers. A table that two nodes use comes twice."""
    model = load_graph(path)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}

    def read(name: str) -> NDArray[Any]:
        """The stored values of an operand. Between them and the operand, the graph only casts and repeats."""
        while name not in initializers:
            name = producers[name].input[0]
        return read_initializer(path, initializers[name])

    for node in model.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        if WEIGHTS_KEY not in notes:
            continue
        note = json.loads(notes[WEIGHTS_KEY])
        bits, block = (
            next(attribute.i for attribute in node.attribute if attribute.name == name)
            for name in ("bits", "block_size")
        )
        codes = unpack(read(node.input[0 if node.op_type == "GatherBlockQuantized" else 1]), bits, note["columns"])
        scales = torch.from_numpy(read(node.input[2]).astype(np.float32))
        shorter_last = block if scales.shape[1] > 1 and note["columns"] % block else None
        start = 0
        for name, rows in note["rows"].items():
            yield name, IntegerWeight(codes[start : start + rows], scales[start : start + rows], bits, shorter_last)
            start += rows


def stored_sfp8(path: Path) -> Iterator[tuple[str, Sfp8Weight]]:
    """The SFP8 codes and scales in the file (see ``GraphBuilder.sfp8_matrix``)."""
    initializers = {tensor.name: tensor for tensor in load_graph(path).graph.initializer}
    for label in initializers:
        if label.endswith(SFP8_SCALE):
            name = label.removesuffix(SFP8_SCALE)
            codes, scale = (read_initializer(path, initializers[part]) for part in (name + ".codes", label))
            yield name, Sfp8Weight(torch.from_numpy(codes), torch.from_numpy(scale))


def stored_kv_scales(path: Path) -> Iterator[tuple[int, PerChannel]]:
    """The scales of the int8 keys and values, by the layer whose cache a node reads, once for each node.

    Raises BadInput as ``load_graph`` does.
    """
    model = load_graph(path)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}

    def nodes(graph: onnx.GraphProto) -> Iterator[tuple[onnx.GraphProto, onnx.NodeProto]]:
        for node in graph.node:
            yield graph, node
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    yield from nodes(attribute.g)

    for graph, node in nodes(model.graph):
        if node.op_type != ATTENTION or len(node.input) <= max(KV_SCALES):
            continue
        producers = {output: producer for producer in graph.node for output in producer.output}
        cache = node.input[3]
        while cache in producers:  # for an image, a slice of the cache
            cache = producers[cache].input[0]
        keys, values = (
            torch.from_numpy(np.array(read_initializer(path, initializers[node.input[place]])))[0, :, 0]
            for place in KV_SCALES
        )
        yield int(cache.split(".")[1]), PerChannel(keys, values)


def unpack(packed: NDArray[np.uint8], bits: int, columns: int) -> Tensor:
    """The inverse of ``export.onnx.layers.pack``: int8 [rows, columns]."""
    unsigned = packed.reshape(packed.shape[0], -1)
    if bits == 4:
        unsigned = np.stack((unsigned & 15, unsigned >> 4), axis=-1).reshape(packed.shape[0], -1)
    # Subtraction in uint8 wraps around, which gives the two's complement that int8 reads.
    return torch.from_numpy((unsigned[:, :columns] - np.uint8(2 ** (bits - 1))).view(np.int8))
