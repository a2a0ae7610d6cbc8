"""docs/extending.md: a backend that is registered as one record goes through every command."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.manifest import PLAN, read_manifest
from gemma3.errors import BadInput
from runtime_py import backends
from runtime_py.backends import BACKENDS, register
from runtime_py.proof.plan_file import load_plan
from tests.bundles import EXPORT, Cli, copy_bundle
from tests.toy_backend import TOY

DOC = Path(__file__).parent.parent / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register(TOY)
    yield
    del BACKENDS["toy"]


@pytest.fixture(params=["fp32", "int4-block32", "sfp8"])
def bundle(request: pytest.FixtureRequest, gemma_edge: Cli, checkpoint: Path, tmp_path: Path) -> Path:
    out = tmp_path / "bundle"
    result = gemma_edge("export", checkpoint, "-o", out, "--format", "toy", "--scheme", request.param, *EXPORT)
    assert result.code == 0, result.err
    assert "every check passed" in result.err
    return out


@pytest.mark.slow
def test_it_goes_through_export_proof_generate_bench_and_accuracy(
    gemma_edge: Cli, bundle: Path, checkpoint: Path, text: Path
) -> None:
    artifact = read_manifest(bundle).artifacts["toy"]
    assert artifact.details["tensors"] > 10
    assert artifact.versions.keys() == {"torch", "safetensors"}
    for options in ((), ("--checkpoint", checkpoint)):
        result = gemma_edge("validate", bundle, *options)
        assert result.code == 0, result.err
    assert gemma_edge("generate", bundle, "some text", "-n", "4").code == 0
    result = gemma_edge("bench", bundle, "-p", "8", "-n", "2", "-r", "1", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["measurements"][0]["format"] == "toy"
    result = gemma_edge(
        *("accuracy", bundle, "--reference", checkpoint, "--data", text, "--checkpoint", checkpoint, "--json")
    )
    assert result.code == 0, result.err
    (fidelity,) = json.loads(result.out)["fidelity"].values()
    assert fidelity["kl"]["value"] < 1e-9


def test_its_proof_finds_a_changed_file(gemma_edge: Cli, bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    damaged = copy_bundle(bundle, tmp_path / "damaged")
    data = bytearray((damaged / "model.toy").read_bytes())
    data[-1000:] = bytes(value ^ 1 for value in data[-1000:])
    (damaged / "model.toy").write_bytes(data)
    assert gemma_edge("validate", damaged).code == 5


@pytest.mark.slow
def test_backends_whose_files_hold_other_weights_have_references_of_their_own(
    gemma_edge: Cli, checkpoint: Path, tmp_path: Path
) -> None:
    """SFP8 is held as integers in blocks in the .onnx, and by row in the toy's file, which rounds no activations."""
    bundle = tmp_path / "bundle"
    result = gemma_edge("export", checkpoint, "-o", bundle, "--scheme", "sfp8", *EXPORT)
    assert result.code == 0, result.err
    assert read_manifest(bundle).artifacts.keys() == {"pte", "onnx", "toy"}
    proof = load_plan(bundle / PLAN)
    assert {format: [one.key for one in named.values()] for format, named in proof.artifacts.items()} == {
        "pte": ["int8-per-token"],
        "onnx": ["int8-per-block", "int8-kleidiai", "float"],
        "toy": ["float-toy"],
    }
    for options in ((), ("--checkpoint", checkpoint)):
        result = gemma_edge("validate", bundle, *options)
        assert result.code == 0, result.err


def test_a_name_can_be_registered_once() -> None:
    with pytest.raises(BadInput, match=r"a backend for \.toy is registered already"):
        register(TOY)


def test_a_format_that_nobody_registered(gemma_edge: Cli, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"there is no backend for \.tflite; use one of pte, onnx, toy"):
        backends.backend_of("tflite")
    result = gemma_edge("export", checkpoint, "-o", tmp_path / "out", "--format", "tflite")
    assert result.code == 2
    assert "'tflite' is not one of pte, onnx, toy" in result.err


def test_the_record_in_the_docs_is_this_one() -> None:
    """The document shows the record as it stands in tests/toy_backend.py."""
    source = (Path(__file__).parent / "toy_backend.py").read_text(encoding="utf-8")
    record = source[source.index("TOY = Backend(") :].rstrip()
    assert record in DOC.read_text(encoding="utf-8")
