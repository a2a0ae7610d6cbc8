"""Reads an .onnx file that may come from anywhere. Works without torch, so that a session can use it."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from gemma3.errors import BadInput

VISION_FILE = "vision.onnx"  # the vision model's graph, beside the text model's


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph, without its weights. Raises BadInput unless everything it refers to lies safely beside it.

    ONNX Runtime opens any file that an initializer names. Our graphs name plain files beside them, hold weights only
    in the main graph's initializers, and have no functions and no subgraphs but the branches of an If. Anything else
    is refused.
    """
    try:
        # onnx.load would resolve external data itself: parse the bytes alone.
        model = onnx.ModelProto.FromString(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; export the model again") from None
    except (OSError, DecodeError) as error:
        raise BadInput(f"{path}: not readable as ONNX ({error}); export the model again") from None
    if not model.graph.node:
        raise BadInput(f"{path}: an empty graph; export the model again")
    if _is_foreign(model.graph) or model.functions:
        raise BadInput(f"{path}: holds subgraphs, functions or constants that gemma-edge does not write")
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(path, tensor)
    return model


def data_file(path: Path) -> Path:
    """The file with the weights of the graph at ``path``."""
    return path.with_name(path.name + ".data")


def graphs_of(path: Path) -> list[Path]:
    """The text model's graph, and the vision model's if there is one beside it."""
    vision = path.with_name(VISION_FILE)
    return [path, vision] if vision.is_file() else [path]


def read_initializer(path: Path, tensor: onnx.TensorProto) -> NDArray[np.generic]:
    """The values of an initializer of ``load_graph(path)``; external ones are mapped from their file."""
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
def exact_twin(path: Path) -> Iterator[Path]:
    """A graph beside ``path``, over the same weights, that multiplies integers in float32. It is removed afterwards.

    The file itself rounds activations to int8 (accuracy level 4); its twin shows whether anything else differs from
    the eager model.
    """
    model = load_graph(path)
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


def _is_foreign(graph: onnx.GraphProto) -> bool:
    """Does the graph, or a branch in it, hold weights outside the main graph's initializers?"""
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


def _check_external(path: Path, tensor: onnx.TensorProto) -> None:
    entry = _external_entry(tensor)
    location, offset, length = entry.get("location", ""), entry.get("offset", ""), entry.get("length", "")
    if location in ("", ".", "..") or Path(location).name != location or "\\" in location:
        raise BadInput(f"{path}: {tensor.name} lies in {location!r}, which is not a file beside it; not opened")
    try:
        status = os.lstat(path.with_name(location))
    except OSError:
        raise BadInput(f"{path}: {location} is missing beside it; copy it there or export the model again") from None
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{path}: {location} is a link or not a plain file; not opened")
    size = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    for dim in tensor.dims:
        size *= dim
    if not (offset.isdecimal() and length == str(size) and int(offset) + size <= status.st_size):
        raise BadInput(
            f"{path}: {location} has {status.st_size} bytes, but {tensor.name} of {size} bytes is at "
            f"offset {offset or 'unknown'}; the file is cut short or not this model's"
        )


def cache_shapes_onnx(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every cache input, as the file declares it. Raises BadInput as ``load_graph`` does."""
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in load_graph(path).graph.input
        if value.name.startswith("past_key_values.")
    }
