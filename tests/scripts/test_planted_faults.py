"""The proof finds faults in exported files of a model whose logits are as large as a trained one's."""

from pathlib import Path

import pytest

from scripts.planted_faults import CHUNK, CONTEXT, FAULTS, RIGHT, Fault, found_by, proof_of, small_checkpoint

DEVIATION = 8.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("faults") / "checkpoint", 3, DEVIATION)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("faults") / "seeing", 3, DEVIATION, images=True)


@pytest.mark.parametrize("fault", [one for one in FAULTS if one.style != "ring"], ids=lambda fault: fault.name)
def test_the_proof_of_an_onnx_finds_it(checkpoint: Path, seeing: Path, fault: Fault) -> None:
    found = found_by(proof_of(seeing if fault.images else checkpoint, "onnx", "int4-block32", fault, CONTEXT, CHUNK))
    assert (found == "passes") == fault.name.startswith(RIGHT.name), found
    if "window" in fault.name:  # so a replay, which has no graph in float32, finds it too
        assert "walk" in found


@pytest.mark.parametrize("scheme", ["int4-channel", "fp32"])
@pytest.mark.parametrize("fault", FAULTS[:2], ids=lambda fault: fault.name)
def test_in_other_schemes_too(checkpoint: Path, fault: Fault, scheme: str) -> None:
    found = found_by(proof_of(checkpoint, "onnx", scheme, fault, CONTEXT, CHUNK))
    assert (found == "passes") == (fault is RIGHT), found


@pytest.mark.slow
@pytest.mark.parametrize("part", ["none", "window − 1"])
def test_the_proof_of_a_pte_finds_it(checkpoint: Path, part: str) -> None:
    (fault,) = (one for one in FAULTS if part in one.name and one.kv is None)
    found = found_by(proof_of(checkpoint, "pte", "int4-block32", fault, CONTEXT, CHUNK))
    assert (found == "passes") == (fault is RIGHT), found
