"""Commands that take images, on a tiny multimodal model."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cli
from export.manifest import MANIFEST, FileEntry, read_manifest, sha256_of
from gemma3.errors import counted
from quant.source import open_source
from runtime_py.demo import about_images
from tests.bundles import EXPORT, SEEING_CONFIG, Cli, copy_bundle, refused, write_checkpoint

TOKENS = 4  # per image


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("seeing") / "tiny", SEEING_CONFIG)


@pytest.fixture(scope="module")
def bundle(seeing: Path) -> Path:
    out = seeing.parent / "bundle"
    cli.app(["export", str(seeing), "-o", str(out), "--format", "onnx", *EXPORT], standalone_mode=False)
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.png and b.png, which are small, and wide.png, which Pan & Scan cuts into three crops."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name, size in (("a", (30, 40)), ("b", (28, 28)), ("wide", (300, 900))):
        Image.fromarray(random.integers(256, size=(*size, 3)).astype(np.uint8)).save(folder / f"{name}.png")
    return folder


# Export and validation


def test_the_bundle_says_what_a_phone_must_know(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.model.vision is not None
    assert manifest.model.vision.image_size == 28
    assert {"vision.onnx", "vision.onnx.data"} <= manifest.files.keys()
    methods = {method.name: method for method in manifest.artifacts["onnx"].methods}
    assert methods["vision_encoder"].inputs[0].shape == (1, 3, 28, 28)
    assert methods["vision_encoder"].outputs[0].shape == (1, TOKENS, 64)
    assert "soft_tokens" in {spec.name for spec in methods["forward"].inputs}
    artifact = manifest.artifacts["onnx"]
    assert artifact.bytes == sum(entry.size for name, entry in manifest.files.items() if ".onnx" in name)
    assert artifact.peak_memory_estimate > artifact.bytes + artifact.cache.total_bytes


def test_the_proof_covers_images(bundle: Path) -> None:
    checks = read_manifest(bundle).validation
    names = {check.name for check in checks}
    assert any(check.id == "landmark/image-3" for check in checks)
    assert {"soft tokens of image 1", "soft tokens of image 2, multiplied in float32"} <= names
    exact = [check for check in checks if check.metric == "soft_rms" and "float32" in check.name]
    assert len(exact) == 2
    assert all(check.limit is not None and 1e-7 < check.limit < 1e-5 for check in exact)
    (integers,) = [check for check in checks if check.metric == "equal"]
    assert integers.value == 1.0


def test_images_replay_from_the_golden_vectors(gemma_edge: Cli, bundle: Path) -> None:
    result = gemma_edge("validate", bundle, "--json")
    assert result.code == 0, result.err
    assert any(check["metric"] == "soft_rms" for check in json.loads(result.out)["checks"])


def test_a_vision_model_changed_behind_a_forged_hash(gemma_edge: Cli, bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(bundle, tmp_path / "bundle")
    weights = copy / "vision.onnx.data"
    data = bytearray(weights.read_bytes())
    data[1000:2000] = bytes(value ^ 8 for value in data[1000:2000])
    weights.write_bytes(data)
    assert gemma_edge("validate", copy).code == 5
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][weights.name] = vars(FileEntry(len(data), sha256_of(weights)))
    (copy / MANIFEST).write_text(json.dumps(manifest))
    result = gemma_edge("validate", copy)
    assert result.code == 5
    assert "soft tokens of image 1: soft_rms" in result.err


def test_a_chunk_holds_an_image(gemma_edge: Cli, seeing: Path, tmp_path: Path) -> None:
    options = ("--format", "onnx", "--context", "32", "--chunk", "2")
    assert gemma_edge("export", seeing, "-o", tmp_path / "out", *options).code == 0
    assert read_manifest(tmp_path / "out").chunk == TOKENS


def test_an_image_over_the_context(gemma_edge: Cli, tmp_path: Path) -> None:
    config = SEEING_CONFIG | {"mm_tokens_per_image": 16}
    config |= {"text_config": config["text_config"] | {"sliding_window": 4}}
    checkpoint = write_checkpoint(tmp_path / "tiny", config)
    result = gemma_edge("export", checkpoint, "-o", tmp_path / "out", "--format", "onnx", "--context", "16")
    refused(result, 4, "16 soft tokens", "the context is 16", "--context")


# generate and chat


def test_an_image_changes_the_answer(gemma_edge: Cli, bundle: Path, pictures: Path) -> None:
    options = ("-n", "12")
    answers = [
        gemma_edge("generate", bundle, "what is this", "--image", pictures / f"{name}.png", *options, *more)
        for name in ("a", "b")
        for more in ((), ("--chat",))
    ]
    assert all(result.code == 0 and result.err == "" for result in answers)
    assert len({result.out for result in answers}) > 1
    again = gemma_edge("generate", bundle, "what is this", "--image", pictures / "a.png", *options)
    assert again.out == answers[0].out


def test_images_go_where_the_markers_are(gemma_edge: Cli, bundle: Path, pictures: Path) -> None:
    def out(text: str) -> str:
        images = ("--image", pictures / "a.png", "--image", pictures / "b.png")
        result = gemma_edge("generate", bundle, text, *images, "-n", "20")
        assert result.code == 0, result.err
        return result.out

    assert out("<image><image>what is this") == out("what is this")
    assert len({out("what is <image>this<image>"), out("what is this"), out("<image>what<image> is this")}) > 1


@pytest.mark.parametrize(("text", "images"), [("<image> a <image>", 1), ("<image>", 2), ("<image>", 0)])
def test_there_must_be_one_marker_for_each_image(
    gemma_edge: Cli, bundle: Path, pictures: Path, text: str, images: int
) -> None:
    result = gemma_edge("generate", bundle, text, *["--image", pictures / "a.png"] * images)
    refused(result, 3, counted(text.count("<image>"), "marker"), f"for {images} image")


def test_pan_and_scan_adds_crops(gemma_edge: Cli, bundle: Path, pictures: Path) -> None:
    options = ("--image", pictures / "wide.png", "-n", "12")
    assert gemma_edge("generate", bundle, "what", *options).code == 0
    # The whole image, three crops and the sentence around them, in a made-up vocabulary, are over the 96 positions.
    refused(gemma_edge("generate", bundle, "what", *options, "--pan-and-scan"), 4, "4 images among them", "of 96")


@pytest.mark.parametrize(
    ("content", "word"), [(None, "no such file"), (b"no picture", "begins with"), (b"\x89PNG\r\n\x1a\n", "begins with")]
)
def test_an_image_that_cannot_be_used(
    gemma_edge: Cli, bundle: Path, tmp_path: Path, content: bytes | None, word: str
) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    refused(gemma_edge("generate", bundle, "what", "--image", tmp_path / "a.png"), 3, "a.png", word)


def test_a_text_only_model_refuses_images(
    gemma_edge: Cli, checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert gemma_edge("export", checkpoint, "-o", out, "--format", "onnx", "--scheme", "fp32", *EXPORT).code == 0
    for command in (("generate", out, "what"), ("chat", out)):
        refused(gemma_edge(*command, "--image", pictures / "a.png"), 3, "text-only")
    assert gemma_edge("generate", out, "an <image> tag", "-n", "2").code == 0


def test_chat_sends_images_with_the_next_turn(
    gemma_edge: Cli, bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(*lines: str, image: str | None = None) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return gemma_edge("chat", bundle, "-n", "8", *(("--image", pictures / image) if image else ()))

    shown = talk(f"/image {pictures / 'a.png'}", "what")
    assert shown.code == 0
    assert shown.err == ""
    assert shown.out == talk("what", image="a.png").out
    result = talk(f"/image {pictures / 'none.png'}", "<image>", "what")
    assert result.code == 0
    assert "none.png: no such file" in result.err
    assert "for 0 images" in result.err
    assert result.out == talk("what").out


# accuracy


def test_accuracy_on_conversations_with_images(gemma_edge: Cli, seeing: Path, bundle: Path, pictures: Path) -> None:
    lines = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": f"{name}.png"}, {"type": "text", "text": "a"}]},
                {"role": "assistant", "content": "an answer"},
            ]
        }
        for name in ("a", "b")
    ]
    data, questions = pictures / "data.jsonl", pictures / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    questions.write_text(json.dumps({"category": "c", "prompt": "what", "answer": "x", "images": ["a.png"]}))
    options = ("--reference", seeing, "--data", data, "--questions", questions, "--checkpoint", seeing, "--json")
    result = gemma_edge("accuracy", bundle, *options)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    (quality,) = report["quality"].values()
    assert quality["tokens"] == report["tokens"] > 20
    assert 1e-6 < quality["kl"]["value"] < 1.0
    assert {name: scores["c"]["asked"] for name, scores in report["questions"].items()} == {
        "original": 1,
        "bundle .onnx": 1,
    }
    refused_line = gemma_edge("accuracy", bundle, *options, "--context", "24").err.splitlines()[-1]
    assert "a conversation with 1 image has" in refused_line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "name"), [("--scheme", "fp32"), ("--scheme", "sfp8"), ("--preset", "fast"), ("--preset", "exact")]
)
def test_both_formats_agree_on_images(
    gemma_edge: Cli, seeing: Path, pictures: Path, tmp_path: Path, option: str, name: str
) -> None:
    result = gemma_edge("export", seeing, "-o", tmp_path / "out", option, name, *EXPORT)
    assert result.code == 0, result.err
    manifest = read_manifest(tmp_path / "out")
    names = [method.name for method in manifest.artifacts["pte"].methods]
    assert names == ["vision_encoder", "token_embedding", "text_decoder"]
    assert gemma_edge("validate", tmp_path / "out", "--checkpoint", seeing).code == 0
    image = ("--image", pictures / "a.png", "-n", "8")
    pte, onnx = (gemma_edge("generate", tmp_path / "out", "what", *image, "--format", one) for one in ("pte", "onnx"))
    assert pte.code == onnx.code == 0
    if name == "fp32":
        assert pte.out == onnx.out
    source = shutil.copytree(pictures, tmp_path / "source", dirs_exist_ok=True)
    shutil.copytree(seeing, source, dirs_exist_ok=True)
    asked = [
        {"category": category, "prompt": "what", "answer": "x", "images": ["a.png"]} for category in ("c", "wide c")
    ]
    (source / "questions_images.jsonl").write_text("\n".join(map(json.dumps, asked)))
    lines = "\n".join(about_images(tmp_path / "out", open_source(source)))
    assert "> a.png what" in lines
    assert lines.count("0 of 1") == 9
