import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma3.errors import BadInput
from quant.integers import IntegerWeight, round_to_nearest
from quant.recipe import Recipe, Rule, Verdict
from quant.sfp8 import Sfp8Weight, encode_weight
from quant.stored import FILE, METADATA_KEY, StoredWeights, is_quantized, load_quantized, save_quantized
from quant.weights import QuantizedWeights, Weight

RECIPE = Recipe("mine", (Rule("*_proj.weight", "int4-block32"), Rule("*", "float32")))


def source(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.model").write_bytes(b"pieces")
    (directory / "model.safetensors").write_bytes(b"is not copied")
    return directory


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, IntegerWeight) and isinstance(other, IntegerWeight):
        return (
            (one.bits, one.group) == (other.bits, other.group)
            and same(one.codes, other.codes)
            and same(one.scales, other.scales)
        )
    assert isinstance(one, Sfp8Weight)
    assert isinstance(other, Sfp8Weight)
    return same(one.codes, other.codes) and same(one.scale, other.scale)


def weights_of(values: np.ndarray) -> QuantizedWeights:
    weight = torch.from_numpy(values)
    tensors: dict[str, Weight] = {
        "a_norm.weight": weight[0].bfloat16(),
        "b_norm.weight": weight[:, 0],
        "block_proj.weight": round_to_nearest(weight, 4, 32),
        "row_proj.weight": round_to_nearest(weight, 4, None),
        "table.weight": round_to_nearest(weight, 8, None),
        "padded.weight": round_to_nearest(weight[:, :-3], 4, 32, pad=True),
        "sfp8.weight": encode_weight(weight, per_channel=False),
        "rows.weight": encode_weight(weight, per_channel=True),
    }
    return QuantizedWeights(tensors, {name: Verdict("a scheme", f"why {name}") for name in tensors})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stored")
    values = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    save_quantized(directory / "out", weights_of(values), RECIPE, "rtn", source=source(directory / "source"))
    return directory / "out"


@given(
    values=st.tuples(st.integers(1, 4), st.integers(1, 3)).flatmap(
        lambda shape: arrays(np.float32, (shape[0], 32 * shape[1]), elements=st.floats(-500, 500, width=32))
    ),
    method=st.text(max_size=5),
)
def test_what_is_saved_is_loaded(values: np.ndarray, method: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("stored")
    weights = weights_of(values)
    save_quantized(directory / "out", weights, RECIPE, method, source=source(directory / "source"))
    stored = load_quantized(directory / "out")
    assert (stored.recipe, stored.method, stored.weights.verdicts) == (RECIPE, method, weights.verdicts)
    assert list(stored.weights.tensors) == list(weights.tensors)
    assert all(same(stored.weights.tensors[name], weight) for name, weight in weights.tensors.items())


def test_the_directory(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", FILE, "tokenizer.model"]
    assert is_quantized(saved)
    assert not is_quantized(saved.parent / "source")
    assert [path.name for path in saved.parent.iterdir() if path.name.startswith(".")] == []
    (saved.parent / "ordinary").touch()
    assert (saved / FILE).stat().st_mode == (saved.parent / "ordinary").stat().st_mode


def test_the_same_weights_give_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    stored = load_quantized(saved)
    save_quantized(tmp_path / "again", stored.weights, stored.recipe, stored.method, source=saved)
    for path in saved.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_version_1_is_still_read(saved: Path, tmp_path: Path) -> None:
    """It stored each verdict as one string."""

    def older(_: dict[str, Tensor], header: dict[str, Any]) -> None:
        header["schema_version"] = 1
        header["verdicts"] = {name: f"{one['scheme']}: {one['reason']}" for name, one in header["verdicts"].items()}

    stored = load_quantized(changed(saved, tmp_path / "older", older))
    assert stored.weights.verdicts == load_quantized(saved).weights.verdicts


def test_an_existing_target_is_left_alone(saved: Path, tmp_path: Path) -> None:
    stored = load_quantized(saved)
    with pytest.raises(BadInput, match="exists; remove it"):
        save_quantized(saved, stored.weights, stored.recipe, "rtn", source=saved)
    with pytest.raises(BadInput, match="no such directory"):
        save_quantized(tmp_path / "a" / "b", stored.weights, stored.recipe, "rtn", source=saved)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_behind(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("quant.stored.save_file", fail)
    stored = load_quantized(saved)
    with pytest.raises(type(error)):
        save_quantized(tmp_path / "out", stored.weights, stored.recipe, "rtn", source=saved)
    assert list(tmp_path.iterdir()) == []


def changed(saved: Path, to: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """A copy of ``saved`` with its tensors and header changed."""
    to.mkdir()
    tensors = load_file(saved / FILE)
    with safe_open(saved / FILE, framework="pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
    change(tensors, header)
    save_file(tensors, to / FILE, {METADATA_KEY: json.dumps(header)})
    return to


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, _: tensors.update({name: tensor})


def head(*keys: str, value: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(_: dict[str, Tensor], header: dict[str, Any]) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


DAMAGE = {
    "table.weight.codes is missing": lambda tensors, _: tensors.pop("table.weight.codes"),
    "a_norm.weight is missing": lambda tensors, _: tensors.pop("a_norm.weight"),
    "spare belongs to no weight": put("spare", torch.ones(1)),
    "is torch.int8, not floating point": put("a_norm.weight", torch.ones(64, dtype=torch.int8)),
    "int4/64 with torch.uint8 codes": put("row_proj.weight.codes", torch.zeros(3, 64, dtype=torch.uint8)),
    r"int4/64 with codes \[2, 64\] and scales \[3, 1\]": put(
        "row_proj.weight.codes", torch.zeros(2, 64).to(torch.int8)
    ),
    r"int4/32 with codes \[3, 65\] and scales \[3, 2\]": put("block_proj.weight.codes", torch.zeros(3, 65).char()),
    r"int8/64 with codes \[0, 0\]": put("table.weight.codes", torch.zeros(0, 0).char()),
    "int4 with codes from 8 to 8": put("row_proj.weight.codes", torch.full((3, 64), 8).char()),
    "has invalid scales: from 0.0": put("row_proj.weight.scales", torch.zeros(3, 1).bfloat16()),
    "invalid scales: from nan": put("sfp8.weight.scales", torch.full((1, 1), torch.nan)),
    "invalid scales: from -1.0": put("sfp8.weight.scales", torch.full((1, 1), -1.0)),
    "holds the code 0x80": put("sfp8.weight.codes", torch.full((3, 64), 0x80, dtype=torch.uint8)),
    "schema_version is 3": head("schema_version", value=3),
    "schema_version is '1'": head("schema_version", value="1"),
    "method in its header is not text": head("method", value=None),
    r"rule in its header has the keys \[\]": head("recipe", "rules", value=[{"pattern": 1}]),
    r"recipe in its header has the keys": head("recipe", value=[]),
    "lacks a name or a list of rules": head("recipe", "rules", value={}),
    "stored as 'int3/32'": head("forms", "table.weight", value="int3/32"),
    "stored as 'int8/0'": head("forms", "table.weight", value="int8/0"),
    "stored as 'int8'": head("forms", "table.weight", value="int8"),
    "forms in its header does not map": head("forms", value=["a"]),
    "8 forms and 9 verdicts": head("verdicts", "more", value={"scheme": "float32", "reason": "why"}),
    "verdicts in its header does not map": head("verdicts", "more", value="why"),
    "header in its header has the keys": head("more", value="why"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_one_clear_line(saved: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        load_quantized(changed(saved, tmp_path / "bad", DAMAGE[message]))
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("; copy it or quantize again")


@pytest.mark.parametrize("header", [None, {}, {METADATA_KEY: "not json"}, {METADATA_KEY: "[" * 9999}])
def test_no_header(tmp_path: Path, header: dict[str, str] | None) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / FILE, header)
    with pytest.raises(BadInput, match="header"):
        load_quantized(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not readable as safetensors"):
        load_quantized(tmp_path)


@given(data=st.data())
def test_a_fuzzed_header_is_refused_or_read(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever bytes are in the header and wherever the file is cut, it gives a BadInput or weights, nothing else."""
    content = bytearray((saved / FILE).read_bytes())
    length = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / FILE).write_bytes(content[: data.draw(st.sampled_from([None, length, length - 1, 7, 0]))])
    refused_or_read(directory)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["int4", "float", "sfp8"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)


@given(data=st.data())
def test_any_json_in_the_header_is_refused_or_read(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    def change(_: dict[str, Tensor], header: dict[str, Any]) -> None:
        place: Any = header
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
                place[key] = data.draw(values)
                return
            place = place[key]

    refused_or_read(changed(saved, tmp_path_factory.mktemp("fuzz") / "bad", change))


def refused_or_read(directory: Path) -> None:
    with contextlib.suppress(BadInput):
        assert isinstance(load_quantized(directory), StoredWeights)
