"""The Python API on a tiny checkpoint: what the README shows."""

from pathlib import Path

import numpy as np
import pytest

from export.manifest import read_manifest
from gemma3.checkpoint import Checkpoint
from gemma3.errors import BadInput, DoesNotFit
from quant.source import QuantizedCheckpoint
from runtime_py.api import (
    Sampler,
    export_bundle,
    generate,
    open_bundle,
    open_checkpoint,
    open_session,
    quantize,
    save_checkpoint,
    validate,
)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.parent / "api-bundle"
    export_bundle(quantize(open_checkpoint(checkpoint)), out, formats=["onnx"], context=96, chunk=8)
    return out


def test_from_a_checkpoint_to_text(bundle: Path) -> None:
    stream = generate(open_bundle(bundle), "some text", max_new_tokens=4, sampler=Sampler(temperature=1.0, seed=1))
    text = "".join(stream)
    assert stream.reason in ("length", "stop token")
    again = "".join(generate(open_bundle(str(bundle)), "some text", max_new_tokens=4, sampler=Sampler(1.0, seed=1)))
    assert text == again
    logits = open_session(bundle, "onnx").prefill([2, 5, 6])
    assert logits.shape == (640,)
    assert np.isfinite(logits).all()


def test_a_quantized_checkpoint_exports_to_the_same_bytes_from_memory_and_from_disk(
    checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    save_checkpoint(quantize(open_checkpoint(str(checkpoint))), tmp_path / "saved")
    saved = open_checkpoint(tmp_path / "saved")
    assert isinstance(saved, QuantizedCheckpoint)
    export_bundle(saved, tmp_path / "out", formats=["onnx"], context=96, chunk=8)
    for name in read_manifest(bundle).files:
        assert (tmp_path / "out" / name).read_bytes() == (bundle / name).read_bytes(), name


def test_validate_replays_or_computes_again(checkpoint: Path, bundle: Path) -> None:
    replayed, fresh = validate(bundle), validate(str(bundle), open_checkpoint(checkpoint))
    assert all(check.passed for check in (*replayed, *fresh))
    assert {check.id for check in fresh} - {check.id for check in replayed} == {
        "companions",
        "integers",
        "walk/several-logits",
    }


def test_what_is_wrong_is_said_before_any_work(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    source = open_checkpoint(checkpoint)
    assert isinstance(source, Checkpoint)
    with pytest.raises(BadInput, match="exists; remove it"):
        export_bundle("no checkpoint is looked for", bundle)
    with pytest.raises(BadInput, match=r"no backend for \.tflite"):
        export_bundle(source, tmp_path / "out", formats=["tflite"])
    with pytest.raises(DoesNotFit, match="context 161"):
        export_bundle(source, tmp_path / "out", context=161)
    with pytest.raises(BadInput, match="recipe 'int3' is unknown"):
        quantize(source, "int3")
    with pytest.raises(BadInput, match="recipe 'int3' is unknown"):
        export_bundle(source, tmp_path / "out", recipe="int3")
    with pytest.raises(BadInput, match="method 'awq' is unknown"):
        quantize(source, "int4-block32", "awq")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="is quantized already"):
        quantize(quantize(source))
    assert list(tmp_path.iterdir()) == []
