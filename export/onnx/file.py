"""Reads .onnx files, which are not trusted. Works without torch, so that a session can use it."""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from export.manifest import check_link
from gemma3.errors import BadInput

VISION_FILE = "vision.onnx"  # the vision model's graph, beside the text model's
# An optional input of the text model's graph, and the output that has so many rows.
LOGITS_TO_KEEP, LAST_LOGITS = "logits_to_keep", "last_logits"
WEIGHTS_KEY = "gemma_edge.weights"  # a node's metadata: the checkpoint weights of which its matrix consists


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph in the file ``path``, without its external weights.

    ONNX Runtime opens any file that an initializer names. The graphs of this project name only plain files beside them,
    hold weights only in the main graph's initializers, and have no functions, and no subgraphs except the branches of
    an If. Raises BadInput for a file that is missing or not readable as ONNX, and for a graph with anything else. A
    link beside the graph counts as a file only if the bundle's manifest knows its content (see ``check_link``).
    """
    try:
        # Not onnx.load, which would open external data before it is checked.
        model = onnx.ModelProto.FromString(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; export the model again") from None
    except (OSError, DecodeError) as error:
        raise BadInput(f"{path}: not readable as ONNX ({error}); export the model again") from None
    if not model.graph.node:
        raise BadInput(f"{path}: an empty graph; export the model again")
    if _is_foreign(model.graph) or model.functions:
        raise BadInput(f"{path}: holds subgraphs, functions or constants that gemma-edge does not write")
    external = [one for one in model.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]
    for location in {_external_entry(tensor).get("location", ""): tensor.name for tensor in external}.items():
        _check_location(path, *location)
    for tensor in external:
        _check_extent(path, tensor)
    return model


def data_file(path: Path) -> Path:
    """The external data file, with the weights of the graph ``path``."""
    return path.with_name(path.name + ".data")


def graphs_of(path: Path) -> list[Path]:
    """The text model's graph, and the vision model's if there is one beside it."""
    vision = path.with_name(VISION_FILE)
    return [path, vision] if vision.is_file() else [path]


def read_initializer(path: Path, tensor: onnx.TensorProto) -> NDArray[np.generic]:
    """The values of an initializer of ``load_graph(path)``. External ones are memory-mapped from their file."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    entry = _external_entry(tensor)
    return np.memmap(
        path.with_name(entry["location"]),
        dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type),
        mode="r",
        offset=int(entry["offset"]),
        shape=tuple(tensor.dims),
    )


@contextmanager
def exact_twin(path: Path, columns: NDArray[np.int32] | None = None) -> Iterator[Path]:
    """A copy of the graph beside ``path``, over the same weights, that multiplies integers in float32.

    The original graph rounds activations to int8 (accuracy level 4). The copy shows whether anything else differs from
    the eager model. With ``columns`` it computes only the logits of these tokens. It is removed when the block ends.
    Raises BadInput as ``load_graph`` does.
    """
    model = load_graph(path)
    if columns is not None:
        _compute_only(model.graph, columns)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    twin = path.with_name(f"exact-{path.name}")
    try:
        twin.write_bytes(model.SerializeToString(deterministic=True))
        yield twin
    finally:
        twin.unlink(missing_ok=True)


def _compute_only(graph: onnx.GraphProto, columns: NDArray[np.int32]) -> None:
    """Change the head of ``graph``, whose output is LAST_LOGITS, to multiply with only some rows of its matrix."""
    head = next(node for node in graph.node if LAST_LOGITS in node.output)
    graph.initializer.append(onnx.numpy_helper.from_array(columns.astype(np.int64), "twin.columns"))
    matrix = range(1, len(head.input)) if head.op_type == "MatMulNBits" else [1]
    for index in matrix:
        chosen = f"twin.input_{index}"
        gather = onnx.helper.make_node("Gather", [head.input[index], "twin.columns"], [chosen], axis=0)
        head.input[index] = chosen
        # Nodes are in the order in which they can be computed.
        graph.node.insert(list(graph.node).index(head), gather)
    for attribute in head.attribute:
        if attribute.name == "N":
            attribute.i = len(columns)
    for output in graph.output:
        if output.name in ("logits", LAST_LOGITS):
            output.type.tensor_type.shape.dim[-1].dim_value = len(columns)


def _is_foreign(graph: onnx.GraphProto) -> bool:
    """Does the graph, or a branch in it, hold weights outside the main graph's initializers, or other subgraphs?"""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") or attribute.graphs or attribute.tensors or attribute.sparse_tensors:
                return True
            if attribute.HasField("sparse_tensor"):
                return True
            if attribute.HasField("g"):
                branch = attribute.g
                if node.op_type != "If" or branch.initializer or _is_foreign(branch):
                    return True
    return bool(graph.sparse_initializer)


def _external_entry(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _check_location(path: Path, location: str, tensor: str) -> None:
    if location in ("", ".", "..") or Path(location).name != location or "\\" in location:
        raise BadInput(f"{path}: {tensor} lies in {location!r}, which is not a file beside it; not opened")
    file = path.with_name(location)
    try:
        plain = stat.S_ISREG(file.stat().st_mode)
    except (OSError, ValueError):
        raise BadInput(f"{path}: {location} is missing beside it; copy it there or export the model again") from None
    if not plain:
        raise BadInput(f"{path}: {location} is a link or not a plain file; not opened")
    if file.is_symlink():
        check_link(file)


def _check_extent(path: Path, tensor: onnx.TensorProto) -> None:
    entry = _external_entry(tensor)
    location, offset, length = entry["location"], entry.get("offset", ""), entry.get("length", "")
    held = path.with_name(location).stat().st_size
    size = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    for dim in tensor.dims:
        size *= dim
    if not (offset.isdecimal() and length == str(size) and int(offset) + size <= held):
        raise BadInput(
            f"{path}: {location} has {held} bytes, but {tensor.name} of {size} bytes is at "
            f"offset {offset or 'unknown'}; the file is cut short or not this model's"
        )
