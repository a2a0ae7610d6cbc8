import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.checks import Check
from export.manifest import (
    MAJOR,
    MANIFEST,
    MINOR,
    PLAN,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    read_manifest,
    sha256_of,
)
from export.target import Method, TensorSpec
from gemma3.errors import BadInput, VerificationFailed
from tests.manifests import manifest_of
from tests.shapes import tiny_config, tiny_vision_config


def small() -> Manifest:
    manifest = manifest_of(tiny_config())
    onnx = replace(
        manifest.artifacts["onnx"],
        file="model.onnx",
        files=("model.onnx",),
        methods=(Method("forward", "model.onnx", (TensorSpec("input_ids", "int64", (1, "sequence_length")),), ()),),
        opsets={"": 23},
        details={"anything": [1, {"goes": None}]},
    )
    checks = (
        Check("onnx", "walk/chunks", "kl_mean", "chunks", 1e-7, 1e-3, True),
        Check("onnx", "walk/chunks", "max_abs", "chunks", 1, None, True),
    )
    files = {"model.onnx": FileEntry(3, "ab"), "tokenizer.model": FileEntry(2, "")}
    return replace(manifest, artifacts={"onnx": onnx}, files=files, validation=checks)


def write(directory: Path, manifest: Manifest) -> Path:
    (directory / "model.onnx").write_bytes(b"abc")
    (directory / "tokenizer.model").write_bytes(b"de")
    (directory / MANIFEST).write_text(manifest.to_json())
    return directory


def test_to_json_and_back_is_the_identity() -> None:
    assert Manifest.from_json(small().to_json()) == small()


def test_to_json_and_back_is_the_identity_for_a_multimodal_model() -> None:
    manifest = replace(small(), model=tiny_vision_config())
    assert Manifest.from_json(manifest.to_json()) == manifest
    data = json.loads(manifest.to_json())
    del data["model"]["vision"]["image_size"]
    with pytest.raises(BadInput, match=r"missing key manifest\.model\.vision\.image_size"):
        Manifest.from_json(json.dumps(data))


def test_reads_a_bundle(tmp_path: Path) -> None:
    assert read_manifest(write(tmp_path, small())) == small()


def edited(*path: str | int, to: Any) -> str:
    data = json.loads(small().to_json())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "schema_version is None"),
        ("null", "schema_version is None"),
        (edited("schema_version", to=2), r"schema_version is 2, this program reads 4\.x; .*gemma-edge export"),
        (edited("schema_version", to="3.0"), r"schema_version is '3\.0'"),
        (edited("schema_version", to="4." + "9" * 5000), "schema_version is"),
        (edited("model", "hidden_size", to=-1), r"manifest\.model\.hidden_size is -1, expected a positive size"),
        (edited("model", "vocab_size", to=10**30), r"manifest\.model\.vocab_size is 10+, expected a positive size"),
        (edited("context", to=97), r"artifacts\.onnx\.cache has another context"),
        (edited("artifacts", "onnx", "cache", "layers", to=[]), r"cache\.layers are not the layers of manifest\.model"),
        (edited("recipe", to="\ud800"), r"manifest\.recipe is .* expected valid Unicode"),
        (edited("schema_version", to="4.x"), r"schema_version is '4\.x'"),
        (edited("surprise", to=1), r"unknown key manifest\.surprise"),
        (edited("model", "surprise", to=1), r"unknown key manifest\.model\.surprise"),
        (edited("artifacts", "onnx", "cache", "layers", 0, "surprise", to=1), r"cache\.layers\[0\]\.surprise"),
        (edited("context", to="96"), r"manifest\.context is '96', expected"),
        (edited("context", to=True), r"manifest\.context is 'True', expected"),
        (edited("context", to=1.5), r"manifest\.context is '1.5', expected"),
        (edited("files", to=[]), r"manifest\.files is '\[\]', expected an object"),
        (edited("validation", to={}), r"manifest\.validation is '{}', expected a list"),
        (edited("artifacts", "tflite", to={}), r"missing key manifest\.artifacts\.tflite\.bytes"),
        (edited("artifacts", "onnx", "references", to="int4"), "references"),
        (edited("model", "layer_types", 0, to="none"), r"layer_types\[0\] is 'none'"),
    ],
)
def test_what_is_not_a_manifest_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Manifest.from_json(text)


def test_a_newer_minor_version_may_have_keys_that_we_do_not_know() -> None:
    data = json.loads(small().to_json())
    data["new"] = data["artifacts"]["onnx"]["new"] = data["model"]["new"] = 1
    with pytest.raises(BadInput, match="unknown key"):
        Manifest.from_json(json.dumps(data))
    data["schema_version"] = f"{MAJOR}.{MINOR + 1}"
    assert replace(Manifest.from_json(json.dumps(data)), schema_version=SCHEMA_VERSION) == small()
    del data["chunk"]
    with pytest.raises(BadInput, match=r"missing key manifest\.chunk"):
        Manifest.from_json(json.dumps(data))


def test_a_missing_key_is_named() -> None:
    data = json.loads(small().to_json())
    del data["tokenizer"]["bos_id"]
    with pytest.raises(BadInput, match=r"missing key manifest\.tokenizer\.bos_id"):
        Manifest.from_json(json.dumps(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(key=st.sampled_from(sorted(json.loads(small().to_json()))), value=JSON)
def test_any_json_under_any_key_is_read_or_refused(key: str, value: Any) -> None:
    try:
        manifest = Manifest.from_json(edited(key, to=value))
    except BadInput:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_manifest(tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    bundle = write(tmp_path, small())
    (bundle / "model.onnx").unlink()
    with pytest.raises(VerificationFailed, match=r"model\.onnx: missing"):
        read_manifest(bundle)


def test_a_file_of_another_size(tmp_path: Path) -> None:
    bundle = write(tmp_path, small())
    (bundle / "model.onnx").write_bytes(b"abcd")
    with pytest.raises(VerificationFailed, match="4 bytes, its manifest says 3"):
        read_manifest(bundle)


def test_a_link_to_a_plain_file_counts_as_that_file(tmp_path: Path) -> None:
    """As in a hub cache."""
    (tmp_path / "bundle").mkdir()
    bundle = write(tmp_path / "bundle", small())
    (bundle / "model.onnx").rename(tmp_path / "elsewhere")
    (bundle / "model.onnx").symlink_to("../elsewhere")
    assert read_manifest(bundle) == small()
    (tmp_path / "elsewhere").write_bytes(b"abcd")
    with pytest.raises(VerificationFailed, match="4 bytes, its manifest says 3"):
        read_manifest(bundle)


@pytest.mark.parametrize("target", ["nowhere", "model.onnx", ".", "/dev/zero", "pipe"])
def test_a_link_to_anything_else(tmp_path: Path, target: str) -> None:
    bundle = write(tmp_path, small())
    os.mkfifo(tmp_path / "pipe")
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to(target)
    with pytest.raises(VerificationFailed, match="not a plain file"):
        read_manifest(bundle)


def test_a_link_instead_of_the_proofs_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "plan.json").write_text("a")
    manifest = replace(small(), files=small().files | {PLAN: FileEntry(1, "")})
    (tmp_path / "bundle").mkdir()
    bundle = write(tmp_path / "bundle", manifest)
    (bundle / "proof").mkdir()
    (bundle / PLAN).write_text("a")
    assert PLAN in read_manifest(bundle).files
    (bundle / PLAN).unlink()
    (bundle / "proof").rmdir()
    (bundle / "proof").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VerificationFailed, match="not a plain file"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    "name",
    ["proof/../manifest.json", "proof/deeper/file", "other/file", "../outside", "/etc/hostname", "deeper/file", ".."],
)
def test_a_name_that_leaves_the_bundle(tmp_path: Path, name: str) -> None:
    manifest = replace(small(), files=small().files | {name: FileEntry(1, "")})
    with pytest.raises(VerificationFailed, match="not a plain file"):
        read_manifest(write(tmp_path, manifest))


def test_an_artifact_that_is_not_among_the_files(tmp_path: Path) -> None:
    files = {name: entry for name, entry in small().files.items() if name != "model.onnx"}
    with pytest.raises(BadInput, match=r"model\.onnx is not among its files"):
        read_manifest(write(tmp_path, replace(small(), files=files)))


def test_no_artifacts_or_another_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has no artifacts"):
        read_manifest(write(tmp_path, replace(small(), artifacts={})))
    tokenizer = replace(small().tokenizer, sha256="ab")
    with pytest.raises(BadInput, match="two different sha256"):
        read_manifest(write(tmp_path, replace(small(), tokenizer=tokenizer)))


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
