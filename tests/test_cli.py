import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import cli
from export.manifest import GOLDEN, MANIFEST, PLAN, FileEntry, sha256_of
from runtime_py import api, text
from scripts.random_checkpoint import made_up_tokenizer
from tests.bundles import CONFIG, EXPORT, SEEING_CONFIG, Cli, Run, copy_bundle, rewrite_tensors, write_checkpoint


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.parent / "bundle"
    cli.app(["export", str(checkpoint), "-o", str(out), "--format", "onnx", *EXPORT], standalone_mode=False)
    return out


def assert_refused(result: Run, code: int, *words: str) -> None:
    """One line on stderr, nothing on stdout."""
    assert result.code == code, result.err
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if not line.startswith(("quantizing", "exporting"))]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


# Export

KEY = "int8-per-block"  # of the reference that an .onnx agrees with here


def test_export_writes_a_proven_bundle(gemma_edge: Cli, checkpoint: Path, tmp_path: Path) -> None:
    result = gemma_edge("export", checkpoint, "-o", tmp_path / "out", "--format", "onnx", "--scheme", "fp32", *EXPORT)
    assert result.code == 0, result.err
    assert "one by one (" in result.out
    assert "every check passed" in result.err
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert all(check["passed"] for check in manifest["validation"])
    limited = {check["metric"] for check in manifest["validation"] if check["limit"] is not None}
    assert {"max_abs", "top1_agreement"} <= limited
    limits = {check["limit"] for check in manifest["validation"] if check["metric"] == "max_abs"}
    assert all(0 < limit < 1e-4 for limit in limits - {0.0, None})


def edit_config(checkpoint: Path, **changes: Any) -> None:
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | changes))


def drop(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: rewrite_tensors(checkpoint, lambda tensors: tensors.pop(name))


def put(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda checkpoint: rewrite_tensors(checkpoint, lambda tensors: tensors.update({name: torch.ones(shape)}))


def lose_a_shard(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), ("model.layers.1.mlp.up_proj.weight missing",)),
        (put("model.layers.9.mlp.up_proj.weight", 4, 4), ("model.layers.9.mlp.up_proj.weight",)),
        (put("model.norm.weight", 65), ("model.norm.weight", "[65]", "[64]")),
        (lose_a_shard, ("model-00001-of-00002.safetensors", "missing")),
        (lambda checkpoint: edit_config(checkpoint, quantization_config={}), ("quantization_config", "full-precision")),
        (lambda checkpoint: edit_config(checkpoint, model_type="llama"), ("'llama'", "Gemma 3")),
        (lambda checkpoint: (checkpoint / "config.json").unlink(), ("config.json", "no such file")),
        (lambda checkpoint: (checkpoint / "tokenizer.model").write_bytes(b"junk"), ("not a SentencePiece model",)),
        (
            lambda checkpoint: rewrite_tensors(
                checkpoint, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(float("nan"))
            ),
            ("model.layers.0.mlp.up_proj.weight", "NaN"),
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_used(
    gemma_edge: Cli, tmp_path: Path, damage: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    damage(checkpoint)
    (tmp_path / "target").mkdir()
    result = gemma_edge("export", checkpoint, "-o", tmp_path / "target" / "out", "--format", "onnx", *EXPORT)
    assert_refused(result, 3, *words)
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--context", "161"), 4, ("context 161", "max_position_embeddings 160")),
        (("--chunk", "0"), 3, ("chunk 0", "--chunk")),
        (("--context", "96", "--chunk", "97"), 3, ("chunk 97", "context 96")),
        (("--scheme", "fp32", "--embedding", "int4"), 3, ("'int4'", "fp32")),
    ],
)
def test_settings_that_do_not_fit(
    gemma_edge: Cli, checkpoint: Path, tmp_path: Path, options: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    assert_refused(gemma_edge("export", checkpoint, "-o", tmp_path / "out", *options), code, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("base", [CONFIG, SEEING_CONFIG], ids=["text-only", "sees"])
def test_a_window_over_the_positions_and_a_context_under_the_window(
    gemma_edge: Cli, tmp_path: Path, base: dict[str, Any]
) -> None:
    long = {"sliding_window": 4096}
    changed = long if base is CONFIG else {"text_config": CONFIG | long}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", base, **changed)
    for context in ("160", "64"):
        out = tmp_path / context
        result = gemma_edge(
            "export", checkpoint, "-o", out, "--format", "onnx", "--scheme", "fp32", "--context", context
        )
        assert result.code == 0, result.err
        cache = json.loads((out / MANIFEST).read_text())["artifacts"]["onnx"]["cache"]
        assert {layer["slots"] for layer in cache["layers"]} == {int(context)}
        assert gemma_edge("validate", out, "--checkpoint", checkpoint).code == 0


@pytest.mark.parametrize("model", ["google/gemma-3-270m", "model.gguf", "/nowhere"])
def test_a_model_that_is_not_a_local_directory(gemma_edge: Cli, tmp_path: Path, model: str) -> None:
    assert_refused(gemma_edge("export", model, "-o", tmp_path / "out"), 3, model, "directory")


def test_an_output_that_exists(gemma_edge: Cli, checkpoint: Path, tmp_path: Path) -> None:
    assert_refused(gemma_edge("export", checkpoint, "-o", tmp_path), 3, str(tmp_path), "exists")


def test_an_output_that_cannot_be_written(gemma_edge: Cli, checkpoint: Path, tmp_path: Path) -> None:
    assert_refused(gemma_edge("export", checkpoint, "-o", tmp_path / "no" / "out"), 3, "no such directory")
    (tmp_path / "file").write_text("")
    assert_refused(gemma_edge("export", checkpoint, "-o", tmp_path / "file" / "out"), 3, "no such directory")


@pytest.mark.parametrize(
    "arguments",
    [
        ("export",),
        ("export", "demo"),
        ("export", "demo", "-o", "x", "--scheme", "int3"),
        ("plan",),
        ("validate", "--x"),
    ],
)
def test_usage_errors(gemma_edge: Cli, arguments: tuple[str, ...]) -> None:
    result = gemma_edge(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert "Error" in result.err


def test_the_version_names_the_runtimes(gemma_edge: Cli) -> None:
    result = gemma_edge("--version")
    assert result.code == 0
    lines = dict(line.split(" ") for line in result.out.splitlines())
    assert lines.keys() >= {"gemma-edge", "executorch", "torch", "onnxruntime"}
    assert lines["onnxruntime"] == version("onnxruntime")


def test_an_internal_error_is_one_line_unless_a_traceback_is_asked_for(
    gemma_edge: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(text, "open_bundle", fail)
    result = gemma_edge("generate", bundle, "a")
    assert result.code == 1
    assert result.err == "internal error: RuntimeError: first second; set GEMMA_EDGE_DEBUG=1 to see where\n"
    monkeypatch.setenv("GEMMA_EDGE_DEBUG", "1")
    assert "Traceback" in gemma_edge("generate", bundle, "a").err


def test_interrupted(gemma_edge: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "open_bundle", interrupt)
    assert gemma_edge("generate", bundle, "a").code == 130


def test_an_interrupted_export_says_that_nothing_was_written(
    gemma_edge: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "prove", interrupt)
    result = gemma_edge("export", checkpoint, "-o", tmp_path / "out", "--format", "onnx", *EXPORT)
    assert result.code == 130
    assert result.err.splitlines()[-1] == f"interrupted: {tmp_path / 'out'} was not written"
    assert list(tmp_path.iterdir()) == []


# Validate


def test_golden_vectors_replay(gemma_edge: Cli, bundle: Path) -> None:
    result = gemma_edge("validate", bundle, "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert set(report) == {"passed", "checks"}
    assert report["passed"] is True
    assert {frozenset(check) for check in report["checks"]} == {
        frozenset({"artifact", "id", "metric", "name", "value", "limit", "passed"})
    }
    metrics = {check["metric"] for check in report["checks"]}
    assert metrics >= {"equal", "max_abs", "mean_abs", "relative_rms", "kl_mean", "kl_max", "top1_agreement"}


def test_with_the_checkpoint_everything_is_computed_afresh(gemma_edge: Cli, bundle: Path, checkpoint: Path) -> None:
    result = gemma_edge("validate", bundle, "--checkpoint", checkpoint, "--json")
    assert result.code == 0, result.err
    names = [check["name"] for check in json.loads(result.out)["checks"]]
    assert any(name.startswith("integers in the file are the quantizer's") for name in names)
    assert any(name.startswith("one by one (") for name in names)


def test_weights_of_another_checkpoint(gemma_edge: Cli, bundle: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other")
    rewrite_tensors(other, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].mul_(-1))
    result = gemma_edge("validate", bundle, "--checkpoint", other)
    assert result.code == 5
    assert "FAILED" in result.out
    assert "integers in the file" in result.err


def test_configuration_of_another_checkpoint(gemma_edge: Cli, bundle: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", sliding_window=9)
    assert_refused(gemma_edge("validate", bundle, "--checkpoint", other), 3, "not the checkpoint of this bundle")


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", GOLDEN, PLAN, "tokenizer.model", "genai_config.json"]
)
def test_one_changed_byte_in_any_file(gemma_edge: Cli, bundle: Path, tmp_path: Path, name: str) -> None:
    damaged = copy_bundle(bundle, tmp_path / "damaged")
    data = bytearray((damaged / name).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / name).write_bytes(data)
    result = gemma_edge("validate", damaged, "--json")
    assert result.code == 5
    assert json.loads(result.out)["passed"] is False
    assert name in result.err


def as_links(bundle: Path, root: Path, names: set[str] | None = None) -> Path:
    """A snapshot of ``bundle`` as the hub's cache has it: files are links into blobs/, or only ``names`` are."""
    snapshot = root / "snapshots" / "0123abcd"
    (root / "blobs").mkdir(parents=True)
    for file in (path for path in bundle.rglob("*") if path.is_file()):
        copy = snapshot / file.relative_to(bundle)
        copy.parent.mkdir(parents=True, exist_ok=True)
        blob = root / "blobs" / sha256_of(file)
        blob.write_bytes(file.read_bytes())
        if names is None or copy.name in names:
            copy.symlink_to(os.path.relpath(blob, copy.parent))
        else:
            copy.write_bytes(blob.read_bytes())
    return snapshot


@pytest.mark.parametrize("names", [None, {"model.onnx.data"}, {"model.onnx", "golden.safetensors"}])
def test_a_bundle_of_links(gemma_edge: Cli, bundle: Path, tmp_path: Path, names: set[str] | None) -> None:
    snapshot = as_links(bundle, tmp_path, names)
    (snapshot / "README.md").write_text("a card")
    (snapshot / ".cache").mkdir()
    expected = gemma_edge("generate", bundle, "Hello", "-n", "4")
    found = gemma_edge("generate", snapshot, "Hello", "-n", "4")
    assert (found.code, found.out) == (0, expected.out), found.err
    assert gemma_edge("validate", snapshot).code == 0


def test_a_link_to_another_content_is_not_followed(gemma_edge: Cli, bundle: Path, tmp_path: Path) -> None:
    snapshot = as_links(bundle, tmp_path)
    data = snapshot / "model.onnx.data"
    damaged = bytearray(data.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    data.resolve().write_bytes(damaged)
    assert_refused(gemma_edge("generate", snapshot, "Hello"), 5, "model.onnx.data", "does not describe")
    assert gemma_edge("validate", snapshot).code == 5


def test_what_is_made_from_links_is_plain(gemma_edge: Cli, checkpoint: Path, tmp_path: Path) -> None:
    source = as_links(checkpoint, tmp_path / "hub")
    for command, out in (("export", "bundle"), ("quantize", "quantized")):
        options = ("--format", "onnx", "--context", "64") if command == "export" else ()
        assert gemma_edge(command, source, "-o", tmp_path / out, *options).code == 0
        assert not [path for path in (tmp_path / out).rglob("*") if path.is_symlink()]


def forge(bundle: Path, name: str) -> None:
    """Make the manifest agree with the file as it is now."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    entry = FileEntry((bundle / name).stat().st_size, sha256_of(bundle / name))
    manifest["files"][name] = {"size": entry.size, "sha256": entry.sha256}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_weights_changed_behind_a_forged_hash(gemma_edge: Cli, bundle: Path, tmp_path: Path) -> None:
    damaged = copy_bundle(bundle, tmp_path / "damaged")
    data = np.fromfile(damaged / "model.onnx.data", np.uint8)
    data[len(data) // 4 : len(data) // 2] ^= 0x11
    data.tofile(damaged / "model.onnx.data")
    forge(damaged, "model.onnx.data")
    result = gemma_edge("validate", damaged)
    assert result.code == 5
    assert "the limit is" in result.err


def test_golden_vectors_perturbed_behind_a_forged_hash(gemma_edge: Cli, bundle: Path, tmp_path: Path) -> None:
    damaged = copy_bundle(bundle, tmp_path / "damaged")
    arrays = load_file(damaged / GOLDEN)
    arrays[f"{KEY}.values"][5] = np.roll(arrays[f"{KEY}.values"][5], 1)
    save_file(arrays, damaged / GOLDEN)
    forge(damaged, GOLDEN)
    result = gemma_edge("validate", damaged)
    assert result.code == 5
    assert "kl_mean is" in result.err


@pytest.mark.parametrize(
    "change",
    [
        lambda proof: proof["artifacts"]["onnx"][KEY]["tolerances"].pop("walk/chunks"),
        lambda proof: proof["artifacts"]["onnx"][KEY]["tolerances"].pop("reset"),
        lambda proof: proof["artifacts"].pop("onnx"),
        lambda proof: proof["artifacts"]["onnx"].pop(KEY),
        lambda proof: proof["artifacts"]["onnx"][KEY].update(key="int4"),
        lambda proof: proof["plan"]["ids"].pop(),
        lambda proof: proof["plan"]["walks"]["chunks"].pop(),
        lambda proof: proof["plan"].update(walks={}),
        lambda proof: proof["plan"].update(image_places=[2], image_numbers=[7]),
        lambda proof: proof["plan"].update(image_places=[2], image_numbers=[0]),
        lambda proof: proof["plan"]["ids"].__setitem__(3, 10**30),
        lambda proof: proof["plan"]["walks"]["chunks"].insert(0, 0),
        lambda proof: proof["plan"]["walks"].update({"\ud800": proof["plan"]["walks"]["chunks"]}),
        lambda proof: proof["plan"]["landmarks"].update(W=-1),
        lambda proof: proof["artifacts"]["onnx"][KEY]["tolerances"]["reset"].update(max_abs=10**400),
    ],
)
def test_a_forged_plan_does_not_pass(
    gemma_edge: Cli, bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    damaged = copy_bundle(bundle, tmp_path / "damaged")
    proof = json.loads((damaged / PLAN).read_text())
    change(proof)
    (damaged / PLAN).write_text(json.dumps(proof))
    forge(damaged, PLAN)
    assert_refused(gemma_edge("validate", damaged), 5, "plan.json", "export the bundle again")


@pytest.mark.parametrize("checkpoint_too", [False, True])
def test_with_the_checkpoint_the_bundles_plan_does_not_count(
    gemma_edge: Cli, bundle: Path, checkpoint: Path, tmp_path: Path, checkpoint_too: bool
) -> None:
    damaged = copy_bundle(bundle, tmp_path / "damaged")
    proof = json.loads((damaged / PLAN).read_text())
    proof["plan"]["walks"] = {}
    (damaged / PLAN).write_text(json.dumps(proof))
    forge(damaged, PLAN)
    result = gemma_edge("validate", damaged, *(("--checkpoint", checkpoint) if checkpoint_too else ()))
    if checkpoint_too:  # then the plan is made again
        assert result.code == 0, result.err
        assert "one by one (" in result.out
    else:
        assert result.code == 5
        assert "cannot be fed to this bundle's model" in result.err.splitlines()[-1]


def without_references(manifest: dict[str, Any], proof: dict[str, Any]) -> None:
    manifest["artifacts"]["onnx"]["references"] = []
    proof["artifacts"]["onnx"] = {}


def with_the_float_reference(manifest: dict[str, Any], proof: dict[str, Any]) -> None:
    manifest["artifacts"]["onnx"]["references"] = ["float"]
    proof["artifacts"]["onnx"] = {"float": proof["artifacts"]["onnx"][KEY]}


def with_an_unknown_reference(manifest: dict[str, Any], proof: dict[str, Any]) -> None:
    manifest["artifacts"]["onnx"]["references"] = ["foo"]
    proof["artifacts"]["onnx"] = {"foo": proof["artifacts"]["onnx"][KEY]}


@pytest.mark.parametrize("checkpoint_too", [False, True])
@pytest.mark.parametrize("change", [without_references, with_the_float_reference, with_an_unknown_reference])
def test_a_bundle_cannot_choose_its_references(
    gemma_edge: Cli,
    bundle: Path,
    checkpoint: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any], dict[str, Any]], None],
    checkpoint_too: bool,
) -> None:
    damaged = copy_bundle(bundle, tmp_path / "damaged")
    manifest, proof = (json.loads((damaged / name).read_text()) for name in (MANIFEST, PLAN))
    change(manifest, proof)
    (damaged / MANIFEST).write_text(json.dumps(manifest))
    (damaged / PLAN).write_text(json.dumps(proof))
    forge(damaged, PLAN)
    result = gemma_edge("validate", damaged, *(("--checkpoint", checkpoint) if checkpoint_too else ()))
    assert_refused(result, 5, "the references of .onnx are", f"its weights need {KEY}")


def test_a_bundle_of_0_3_0_without_the_float_reference_is_valid(
    gemma_edge: Cli, bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    older = copy_bundle(bundle, tmp_path / "older")
    manifest, proof = (json.loads((older / name).read_text()) for name in (MANIFEST, PLAN))
    manifest["artifacts"]["onnx"]["references"].remove("float")
    del proof["artifacts"]["onnx"]["float"]
    (older / MANIFEST).write_text(json.dumps(manifest))
    (older / PLAN).write_text(json.dumps(proof))
    forge(older, PLAN)
    for options in ((), ("--checkpoint", checkpoint)):
        result = gemma_edge("validate", older, *options)
        assert result.code == 0, result.err


def test_with_the_checkpoint_its_stop_ids_count(
    gemma_edge: Cli, bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    damaged = copy_bundle(bundle, tmp_path / "damaged")
    manifest = json.loads((damaged / MANIFEST).read_text())
    manifest["tokenizer"]["eos_ids"] = [5]
    (damaged / MANIFEST).write_text(json.dumps(manifest))
    result = gemma_edge("validate", damaged, "--checkpoint", checkpoint)
    assert result.code == 5
    assert "stop ids, chat template and sampling are the checkpoint's: equal is 0" in result.err


def test_a_shorter_plan_is_no_proof(gemma_edge: Cli, bundle: Path, tmp_path: Path) -> None:
    damaged = copy_bundle(bundle, tmp_path / "damaged")
    proof = json.loads((damaged / PLAN).read_text())
    proof["plan"]["walks"] = {"chunks": proof["plan"]["walks"]["chunks"]}
    proof["plan"]["landmarks"] = {}
    (damaged / PLAN).write_text(json.dumps(proof))
    forge(damaged, PLAN)
    assert_refused(gemma_edge("validate", damaged), 5, "plan.json", "export the bundle again")


def loosened(proof: dict[str, Any]) -> None:
    for reference in proof["artifacts"]["onnx"].values():
        for limits in reference["tolerances"].values():
            limits.update({metric: 1e300 for metric in limits}, another=0.0)


def without_limits(proof: dict[str, Any]) -> None:
    for reference in proof["artifacts"]["onnx"].values():
        reference["tolerances"] = {id: {"another": 0.0} for id in reference["tolerances"]}


@pytest.mark.parametrize("change", [loosened, without_limits])
def test_a_forged_plan_cannot_loosen_the_limits(
    gemma_edge: Cli, bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    damaged = copy_bundle(bundle, tmp_path / "damaged")
    data = np.fromfile(damaged / "model.onnx.data", np.uint8)
    data[len(data) // 4 : len(data) // 2] ^= 0x11
    data.tofile(damaged / "model.onnx.data")
    proof = json.loads((damaged / PLAN).read_text())
    change(proof)
    (damaged / PLAN).write_text(json.dumps(proof))
    for name in ("model.onnx.data", PLAN):
        forge(damaged, name)
    result = gemma_edge("validate", damaged)
    assert result.code == 5
    assert "the limit is" in result.err


GOLDEN_DAMAGE: dict[str, Callable[[dict[str, np.ndarray]], object]] = {
    "missing": lambda arrays: arrays.pop(f"{KEY}.values"),
    "shorter": lambda arrays: arrays.update({f"{KEY}.argmax": arrays[f"{KEY}.argmax"][:-1]}),
    "empty": lambda arrays: arrays.update({f"{KEY}.log_sum_exp": arrays[f"{KEY}.log_sum_exp"][:0]}),
    "scalar": lambda arrays: arrays.update({f"{KEY}.argmax": np.array(1, np.int32)}),
    "another dtype": lambda arrays: arrays.update({f"{KEY}.columns": arrays[f"{KEY}.columns"].astype(np.float32)}),
    "another axis": lambda arrays: arrays.update({f"{KEY}.log_sum_exp": arrays[f"{KEY}.log_sum_exp"][:, None]}),
    "a negative distance": lambda arrays: arrays[f"{KEY}.noise_kl"].__setitem__(0, -1.0),
    "an infinite distance": lambda arrays: arrays[f"{KEY}.cost_kl"].__setitem__(0, np.inf),
    "below zero": lambda arrays: arrays[f"{KEY}.columns"].__setitem__(0, -1),
    "over the vocabulary": lambda arrays: arrays[f"{KEY}.columns"].__setitem__(-1, 10**6),
    "positions of no walk": lambda arrays: arrays[f"{KEY}.positions"].__iadd__(100_000),
    "images": lambda arrays: arrays.update({"images": np.zeros((1, 2, 2, 3), np.uint8)}),
    "no positions": lambda arrays: arrays.update({f"{KEY}.positions": arrays[f"{KEY}.positions"][:0]}),
}


@pytest.mark.parametrize("damage", GOLDEN_DAMAGE)
def test_forged_golden_vectors_are_one_line(gemma_edge: Cli, bundle: Path, tmp_path: Path, damage: str) -> None:
    damaged = copy_bundle(bundle, tmp_path / "damaged")
    arrays = load_file(damaged / GOLDEN)
    GOLDEN_DAMAGE[damage](arrays)
    save_file(arrays, damaged / GOLDEN)
    forge(damaged, GOLDEN)
    assert_refused(gemma_edge("validate", damaged), 5, "export the bundle again")


def test_a_file_cut_short_is_refused_by_every_command(gemma_edge: Cli, bundle: Path, tmp_path: Path) -> None:
    damaged = copy_bundle(bundle, tmp_path / "damaged")
    with (damaged / "model.onnx.data").open("r+b") as file:
        file.truncate(1000)
    for command in (("validate", damaged), ("generate", damaged, "a"), ("bench", damaged), ("chat", damaged)):
        assert_refused(gemma_edge(*command), 5, "model.onnx.data", "1000 bytes")


def test_not_a_bundle(gemma_edge: Cli, tmp_path: Path) -> None:
    for command in (("validate", tmp_path), ("generate", tmp_path, "a"), ("bench", tmp_path), ("chat", tmp_path)):
        assert_refused(gemma_edge(*command), 3, MANIFEST)


# Generate and chat


def test_generate_is_reproducible_and_writes_only_its_answer_to_stdout(gemma_edge: Cli, bundle: Path) -> None:
    command = ("generate", bundle, "some text", "-n", "8", "--temperature", "1", "--seed", "4")
    first, again = gemma_edge(*command), gemma_edge(*command)
    assert first.code == 0
    assert first.out == again.out
    assert first.err == ""
    assert gemma_edge(*command[:-1], "5").out != first.out


@pytest.mark.parametrize("options", [(), ("--chat",)])
def test_an_empty_prompt(gemma_edge: Cli, bundle: Path, options: tuple[str, ...]) -> None:
    assert_refused(gemma_edge("generate", bundle, "", *options), 3, "empty")


def test_a_prompt_over_the_context(gemma_edge: Cli, bundle: Path) -> None:
    assert_refused(gemma_edge("generate", bundle, "x" * 200), 4, "201 tokens", "context of 96")


def test_generating_to_the_end_of_the_context_says_so(gemma_edge: Cli, bundle: Path) -> None:
    result = gemma_edge("generate", bundle, "x" * 94)
    assert result.code == 0
    assert "context of 96 tokens is full" in result.err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--temperature", "-1"), "temperature is -1"),
        (("--top-p", "0"), "top-p is 0"),
        (("--top-k", "-2"), "top-k is -2"),
        (("-n", "0"), "is 0"),
    ],
)
def test_sampling_settings_out_of_range(gemma_edge: Cli, bundle: Path, options: tuple[str, ...], word: str) -> None:
    assert_refused(gemma_edge("generate", bundle, "a", *options), 3, word)


def test_a_format_that_the_bundle_does_not_hold(gemma_edge: Cli, bundle: Path) -> None:
    assert_refused(gemma_edge("generate", bundle, "a", "--format", "pte"), 3, "holds no .pte", "--format onnx")


def test_chat_from_a_pipe(gemma_edge: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(text: str) -> Run:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return gemma_edge("chat", bundle, "-n", "3")

    once = say("hello\n")
    assert once.code == 0
    assert once.out.endswith("\n")
    # A blank line is not a turn; after a reset the same question gets the same answer.
    assert say("hello\n\n/reset\nhello\n").out == once.out * 2


def test_a_full_context_does_not_end_the_chat(gemma_edge: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'x' * 200}\nhello\n"))
    result = gemma_edge("chat", bundle, "-n", "2")
    assert result.code == 0
    assert "over the context of 96" in result.err
    assert "/reset" in result.err
    assert result.out.count("\n") >= 1


@pytest.mark.parametrize("sampling", [(), ("--temperature", "1", "--seed", "4")])
def test_guessing_ahead_gives_the_same_text(
    gemma_edge: Cli, bundle: Path, tmp_path: Path, sampling: tuple[str, ...]
) -> None:
    """By lookup, and by a draft model: the model itself, which is right when it is greedy, but as if it were small."""
    command = ("generate", bundle, "aaa bbb aaa bbb aaa", "-n", "40", *sampling)
    plain = gemma_edge(*command)
    draft = copy_bundle(bundle, tmp_path / "draft")
    manifest = json.loads((draft / MANIFEST).read_text())
    manifest["artifacts"]["onnx"]["bytes"] //= 10
    (draft / MANIFEST).write_text(json.dumps(manifest))
    for guess in (("--lookup",), ("--draft", draft)):
        result = gemma_edge(*command, *guess)
        assert result.code == 0, result.err
        assert result.out == plain.out
        found = re.fullmatch(
            r"guessed ahead: (\d+) of (\d+) drafted tokens accepted, 39 tokens in (\d+) calls\n", result.err
        )
        assert found, result.err
        accepted, drafted, calls = map(int, found.groups())
        assert accepted == 39 - calls
        assert accepted <= drafted
        if guess[0] == "--draft" and not sampling:
            assert calls <= 20


def test_a_chat_that_guesses_ahead(gemma_edge: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(*options: str) -> Run:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nhello again\n/reset\nhello\n"))
        return gemma_edge("chat", bundle, "-n", "12", *options)

    plain, guessing = say(), say("--lookup")
    assert guessing.code == 0, guessing.err
    assert guessing.out == plain.out
    assert "guessed ahead: " in guessing.err


def test_guesses_that_cannot_be_used(gemma_edge: Cli, bundle: Path, tmp_path: Path) -> None:
    command = ("generate", bundle, "a")
    assert_refused(gemma_edge(*command, "--lookup", "--draft", bundle), 3, "--lookup and --draft", "choose one")
    assert_refused(gemma_edge(*command, "--draft", tmp_path / "absent"), 3, "absent")
    other = copy_bundle(bundle, tmp_path / "other")
    tokenizer = other / "tokenizer.model"
    tokenizer.write_bytes(made_up_tokenizer(641))
    manifest = json.loads((other / MANIFEST).read_text())
    sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    manifest["files"]["tokenizer.model"] = {"size": tokenizer.stat().st_size, "sha256": sha256}
    own, manifest["tokenizer"]["sha256"] = manifest["tokenizer"]["sha256"], sha256
    (other / MANIFEST).write_text(json.dumps(manifest))
    assert_refused(gemma_edge(*command, "--draft", other), 3, sha256[:12], own[:12], "same tokenizer")


# Bench


def test_bench_measures_in_a_process_of_its_own(gemma_edge: Cli, bundle: Path) -> None:
    result = gemma_edge("bench", bundle, "-p", "16", "-n", "4", "-r", "3", "--json")
    assert result.code == 0, result.err
    (figures,) = json.loads(result.out)["measurements"]
    assert (figures["format"], figures["prompt"], figures["new_tokens"]) == ("onnx", 16, 4)
    for phase in ("prefill", "decode"):
        assert figures[phase]["mean"] > 0
        assert figures[phase]["median"] > 0
    # torch, which this process has loaded, takes more alone
    assert 10e6 < figures["peak_rss_bytes"] < 200e6


@pytest.mark.parametrize(
    ("options", "code", "word"), [(("-p", "0"), 3, "-p is 0"), (("-p", "90", "-n", "7"), 4, "context of 96")]
)
def test_bench_refuses(gemma_edge: Cli, bundle: Path, options: tuple[str, ...], code: int, word: str) -> None:
    assert_refused(gemma_edge("bench", bundle, *options), code, word)


# Both formats


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp32", "fast", "balanced", "exact"])
def test_both_formats_are_proven_and_agree(gemma_edge: Cli, checkpoint: Path, tmp_path: Path, name: str) -> None:
    both = tmp_path / "both"
    option = "--scheme" if name == "fp32" else "--preset"
    result = gemma_edge("export", checkpoint, "-o", both, option, name, *EXPORT)
    assert result.code == 0, result.err
    assert "every check passed" in result.err
    report = json.loads((both / MANIFEST).read_text())["artifacts"]["pte"]["details"]
    assert report["delegates"] >= 1
    assert gemma_edge("validate", both).code == 0
    answers = {
        format: gemma_edge("generate", both, "--chat", "hello", "-n", "12", "--format", format).out
        for format in ("pte", "onnx")
    }
    if name == "fp32":
        assert answers["pte"] == answers["onnx"]

    data = bytearray((both / "model.pte").read_bytes())
    data[len(data) * 3 // 4] ^= 0x44
    (both / "model.pte").write_bytes(data)
    assert gemma_edge("validate", both).code == 5
