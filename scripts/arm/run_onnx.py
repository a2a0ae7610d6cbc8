"""Runs on the ARM machine, without torch: what an .onnx of a bundle answers there.

    python -m scripts.arm.run_onnx BUNDLE SCRIPT ANSWERS [VALUES]

ANSWERS are those to the SCRIPT of scripts/arm/feed.py. VALUES is every integer weight, as the kernels multiply it,
float32: for each node with integer weights, in the order of the graphs, the matrix [rows, columns] by which
the node multiplies. To find it, the identity is fed to the node: each of its rows is 1 in one place, which int8 holds
exactly, so each output is one weight.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from export.manifest import GOLDEN, Manifest, read_manifest
from export.onnx.file import WEIGHTS_KEY, graphs_of, load_graph, read_initializer
from runtime_py.proof.golden import load_golden
from runtime_py.sessions.onnx import OnnxSession


def feed(bundle: Path, script: Path, answers: Path) -> None:
    """One thread, so that the number of instructions does not depend on the machine."""
    manifest = read_manifest(bundle)
    artifact = manifest.artifacts["onnx"]
    session = OnnxSession(bundle / artifact.file, artifact.cache, manifest.model, 1)
    images = next(iter(load_golden(bundle / GOLDEN).values())).images
    encoded: dict[int, NDArray[np.float32]] = {}
    with answers.open("wb") as file:
        for line in script.read_text(encoding="ascii").splitlines():
            verb, *words = line.split()
            if verb == "reset":
                session.reset()
            elif verb == "text":
                session.prefill([int(word) for word in words])
            elif verb == "encode":
                encoded[int(words[0])] = session.encode_image(images[int(words[0])])
                file.write(encoded[int(words[0])].tobytes())
            elif verb == "image":
                session.prefill(image_ids(manifest), [encoded[int(words[0])]])
            else:
                assert verb == "logits", line
                file.write(session.logits.tobytes())


def image_ids(manifest: Manifest) -> list[int]:
    assert manifest.model.vision is not None
    return [manifest.model.vision.image_token_id] * manifest.model.vision.tokens_per_image


def multiplied_matrices(path: Path) -> Iterator[NDArray[np.float32]]:
    """The matrix [rows, columns] of each node of the graph ``path`` that computes with integers."""
    model = load_graph(path)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        if WEIGHTS_KEY not in notes:
            continue
        columns = json.loads(notes[WEIGHTS_KEY])["columns"]
        gathers = node.op_type == "GatherBlockQuantized"
        operands = node.input[:1] if gathers else node.input[1:]
        pending, held, computed = [*operands, node.input[2]], set[str](), set[str]()
        while pending:
            name = pending.pop()
            if name in initializers:
                held.add(name)
            else:
                computed.add(name)
                pending += producers[name].input
        probe = onnx.NodeProto()
        probe.CopyFrom(node)
        probe.input[1 if gathers else 0] = "x"
        probe.output[0] = "y"
        kind = onnx.TensorProto.INT64 if gathers else onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            [*(one for one in model.graph.node if computed.intersection(one.output)), probe],
            "probe",
            [onnx.helper.make_tensor_value_info("x", kind, [None] if gathers else [None, columns])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
            [
                onnx.numpy_helper.from_array(np.asarray(read_initializer(path, initializers[n])), n)
                for n in sorted(held)
            ],
        )
        whole = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
        rows = initializers[operands[0]].dims[0]
        x = np.arange(rows) if gathers else np.eye(columns, dtype=np.float32)
        (y,) = session.run(["y"], {"x": x})
        yield y if gathers else np.ascontiguousarray(y.T)


def weights(bundle: Path, values: Path) -> None:
    path = bundle / read_manifest(bundle).artifacts["onnx"].file
    with values.open("wb") as file:
        for graph in graphs_of(path):
            for matrix in multiplied_matrices(graph):
                file.write(matrix.astype(np.float32).tobytes())


if __name__ == "__main__":
    bundle, script, answers, *values = map(Path, sys.argv[1:])
    feed(bundle, script, answers)
    for path in values:
        weights(bundle, path)
