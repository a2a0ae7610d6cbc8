"""`gemma-edge quantize`, and `export` of what it wrote: the same integers all the way into the files."""

import json
from pathlib import Path

import pytest
import torch

from export.manifest import read_manifest
from export.onnx.read_back import read_back_onnx
from gemma3.checkpoint import open_checkpoint
from quant.recipe import PRESETS, scheme_recipe
from quant.stored import load_quantized
from tests.bundles import EXPORT, Cli, Run, rewrite_tensors, write_checkpoint


def assert_refused(result: Run, *words: str) -> None:
    assert result.code == 3
    assert result.err.strip().splitlines()[-1].startswith("error: ")
    for word in words:
        assert word in result.err


@pytest.mark.parametrize("method", ["mse", "rtn", "gptq"])
def test_quantized_integers_reach_the_file(
    gemma_edge: Cli, checkpoint: Path, text: Path, tmp_path: Path, method: str
) -> None:
    data = ("--data", text) if method == "gptq" else ()
    scheme = ("--scheme", "int4-channel", "--embedding", "int4")
    result = gemma_edge("quantize", checkpoint, "-o", tmp_path / "made", "--method", method, *scheme, *data)
    assert result.code == 0, result.err
    assert "model.norm.weight: float32: kept by rule *norm*.weight" in result.out
    stored = load_quantized(tmp_path / "made")
    assert (stored.method, stored.recipe) == (method, scheme_recipe("int4-channel", "int4"))

    result = gemma_edge("export", tmp_path / "made", "-o", tmp_path / "bundle", "--format", "onnx", *EXPORT)
    assert result.code == 0, result.err
    found = dict(read_back_onnx(tmp_path / "bundle" / "model.onnx"))
    assert found.keys() == stored.weights.integers.keys()
    for name, weight in stored.weights.integers.items():
        assert all(torch.equal(*pair) for pair in zip(found[name].tensors(), weight.tensors(), strict=True))
    manifest = read_manifest(tmp_path / "bundle")
    assert (manifest.method, manifest.weights) == (method, stored.weights.verdicts)

    result = gemma_edge("validate", tmp_path / "bundle", "--checkpoint", tmp_path / "made", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["passed"]
    result = gemma_edge("validate", tmp_path / "bundle", "--checkpoint", checkpoint)
    if method == "gptq":
        assert_refused(result, "give the checkpoint with the gptq integers that the bundle was exported from")
    else:  # by the method that the manifest names
        assert result.code == 0, result.err


def test_a_quantized_checkpoint_keeps_its_scheme(gemma_edge: Cli, checkpoint: Path, tmp_path: Path) -> None:
    assert gemma_edge("quantize", checkpoint, "-o", tmp_path / "made", "--scheme", "int4-channel").code == 0
    result = gemma_edge("export", tmp_path / "made", "-o", tmp_path / "out", "--scheme", "int4-block32", *EXPORT)
    assert_refused(result, "quantized as int4-channel+embedding-int8 already, not int4-block32+embedding-int8")
    assert_refused(gemma_edge("quantize", tmp_path / "made", "-o", tmp_path / "again"), "is quantized already")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_recipe_file(gemma_edge: Cli, checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'embedding = "int8"\n[[rule]]\npattern = "*.mlp.*"\nscheme = "int8-channel"\n'
        '[[rule]]\npattern = "*_proj.weight"\nscheme = "int4-block32"\n'
    )
    options = ("--format", "onnx", "--recipe", recipe, *EXPORT)
    result = gemma_edge("export", checkpoint, "-o", tmp_path / "out", *options)
    assert result.code == 0, result.err
    manifest = read_manifest(tmp_path / "out")
    assert manifest.recipe == "mine"
    assert str(manifest.weights["model.layers.0.mlp.up_proj.weight"]) == "int8-channel: round to nearest"
    result = gemma_edge("export", checkpoint, "-o", tmp_path / "no", "--scheme", "fp32", *options)
    assert_refused(result, "--recipe says everything about the weights; leave out --scheme and --embedding")
    recipe.write_text(recipe.read_text() + '[[rule]]\npattern = "*.vision.*"\nscheme = "float32"\n')
    result = gemma_edge("export", checkpoint, "-o", tmp_path / "no", *options)
    assert_refused(result, "rule *.vision.* matches no weight")


def test_presets(gemma_edge: Cli, checkpoint: Path, tmp_path: Path) -> None:
    made, bundle = tmp_path / "made", tmp_path / "bundle"
    assert gemma_edge("quantize", checkpoint, "-o", made, "--preset", "exact").code == 0
    stored = load_quantized(made)
    assert stored.recipe == PRESETS["exact"]
    assert gemma_edge("export", made, "-o", bundle, "--format", "onnx", "--preset", "exact", *EXPORT).code == 0
    assert read_manifest(bundle).recipe == "exact"
    result = gemma_edge("export", made, "-o", tmp_path / "no", "--preset", "fast", *EXPORT)
    assert_refused(result, "is quantized as exact already, not fast")


@pytest.mark.parametrize("command", ["export", "quantize", "qat"])
@pytest.mark.parametrize(
    ("options", "left"),
    [
        (("--scheme", "int4-channel"), "--scheme and --embedding"),
        (("--embedding", "int4"), "--scheme and --embedding"),
        (("--recipe", "mine.toml"), "--recipe"),
    ],
)
def test_a_preset_stands_alone(
    gemma_edge: Cli, checkpoint: Path, tmp_path: Path, command: str, options: tuple[str, str], left: str
) -> None:
    result = gemma_edge(command, checkpoint, "-o", tmp_path / "no", "--preset", "fast", *options)
    assert_refused(result, f"--preset says everything about the weights; leave out {left}")
    assert not (tmp_path / "no").exists()


def test_sfp8_as_integers_and_exact(gemma_edge: Cli, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--scheme", "sfp8", "--embedding", "sfp8", "--format", "onnx", *EXPORT)
    result = gemma_edge("export", checkpoint, "-o", tmp_path / "integers", *options)
    assert result.code == 0, result.err
    assert "SFP8 weights as int8-block32" in result.out
    manifest = read_manifest(tmp_path / "integers")
    linears = [name for name, verdict in manifest.weights.items() if verdict.scheme.startswith("sfp8")]
    assert manifest.artifacts["onnx"].stand_ins.keys() == set(linears)
    assert all(40 < one.decibels < 60 for one in manifest.artifacts["onnx"].stand_ins.values())
    result = gemma_edge("validate", tmp_path / "integers", "--checkpoint", checkpoint, "--json")
    assert result.code == 0, result.err

    result = gemma_edge("export", checkpoint, "-o", tmp_path / "exact", "--exact-sfp8", *options)
    assert result.code == 0, result.err
    manifest = read_manifest(tmp_path / "exact")
    counted = next(check.name for check in manifest.validation if check.metric == "equal")
    source = open_checkpoint(checkpoint)
    codes = sum(source.tensor(name).numel() for name in linears)
    assert f"({codes} of {codes})" in counted
    exact = manifest.artifacts["onnx"]
    assert exact.stand_ins == {}
    assert exact.bytes < 1.2 * exact.ideal_bytes
    assert gemma_edge("validate", tmp_path / "exact", "--checkpoint", checkpoint).code == 0
    other = write_checkpoint(tmp_path / "other")
    rewrite_tensors(other, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].mul_(-1))
    result = gemma_edge("validate", tmp_path / "exact", "--checkpoint", other)
    assert result.code == 5
    assert "integers in the file are the quantizer's" in result.err

    result = gemma_edge(
        *("export", checkpoint, "-o", tmp_path / "pte", "--scheme", "sfp8", "--format", "pte", "--exact-sfp8", *EXPORT)
    )
    assert_refused(result, "a .pte cannot hold SFP8 weights as they are; leave out --exact-sfp8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exact", "integers", "other"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "gptq"), ("method gptq needs text; give files with --data",)),
        (("--data", "TEXT"), ("method mse takes no data; leave out --data",)),
        (("--method", "rtn", "--data", "TEXT"), ("method rtn takes no data; leave out --data",)),
        (("--method", "gptq", "--data", "missing.txt"), ("missing.txt", "cannot be read")),
        (("--scheme", "fp32", "--embedding", "int8"), ("no meaning with scheme fp32",)),
        (("--recipe", "none.toml"), ("none.toml", "no such file")),
    ],
)
def test_refusals(
    gemma_edge: Cli, checkpoint: Path, text: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    given = [text if option == "TEXT" else option for option in options]
    assert_refused(gemma_edge("quantize", checkpoint, "-o", tmp_path / "out", *given), *words)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target(gemma_edge: Cli, tmp_path: Path) -> None:
    result = gemma_edge("quantize", "no checkpoint is even looked for", "-o", tmp_path)
    assert_refused(result, "exists; remove it")


@pytest.mark.slow
def test_schemes_side_by_side_in_both_formats(gemma_edge: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """Float, SFP8 and both kinds of integer weights in one layer: each file is proven, and all integers are equal."""
    recipe = tmp_path / "mixed.toml"
    schemes = {
        "*.o_proj.weight": "float32",
        "*.1.self_attn.q_proj.weight": "float32",
        "*.mlp.down_proj.weight": "int8-channel",
        "*.mlp.*": "sfp8",
        "*_proj.weight": "int4-channel",
    }
    rules = (f'[[rule]]\npattern = "{pattern}"\nscheme = "{scheme}"\n' for pattern, scheme in schemes.items())
    recipe.write_text("\n".join(('embedding = "int4"', *rules)))
    result = gemma_edge("export", checkpoint, "-o", tmp_path / "out", "--recipe", recipe, *EXPORT)
    assert result.code == 0, result.err
    manifest = read_manifest(tmp_path / "out")
    equal = [check for check in manifest.validation if check.metric == "equal"]
    assert {check.artifact for check in equal} == {"pte", "onnx"}
    assert all(check.value == 1 for check in equal)
