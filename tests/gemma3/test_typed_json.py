import json
from dataclasses import dataclass
from typing import Any, Literal

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma3.errors import BadInput
from gemma3.typed_json import decode, encode, json_schema


@dataclass(frozen=True)
class Inner:
    """An inner one."""

    kind: Literal["a", "b"]
    sizes: tuple[int | str, ...]


@dataclass(frozen=True)
class Outer:
    """An outer one,
    over two lines."""

    share: float
    note: str | None
    inner: dict[str, Inner]
    anything: dict[str, Any]


EXAMPLE = Outer(0.5, None, {"x": Inner("a", (1, "length"))}, {"deep": [1, {"er": None}]})


def test_back_and_forth() -> None:
    assert decode(Outer, json.loads(encode(EXAMPLE)), "file") == EXAMPLE
    assert "\n" not in encode(EXAMPLE, indent=None).rstrip()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": True}, r"file\.share is 'True', expected"),
        ({"note": 1}, r"file\.note is '1'"),
        ({"inner": {"x": {"kind": "c", "sizes": []}}}, r"file\.inner\.x\.kind is 'c', expected one of"),
        ({"inner": {"x": {"kind": "a", "sizes": [1.5]}}}, r"file\.inner\.x\.sizes\[0\] is '1\.5'"),
        ({"inner": {"x": {"kind": "a"}}}, r"missing key file\.inner\.x\.sizes"),
        ({"more": 1}, r"unknown key file\.more"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(change: dict[str, Any], message: str) -> None:
    data = json.loads(encode(EXAMPLE)) | change
    with pytest.raises(BadInput, match=message):
        decode(Outer, data, "file")


def test_unknown_keys_can_be_ignored_at_every_depth() -> None:
    data = json.loads(encode(EXAMPLE)) | {"more": 1}
    data["inner"]["x"]["more"] = 2
    assert decode(Outer, data, "file", ignore_unknown=True) == EXAMPLE


def test_not_a_number_is_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode(Outer(float("nan"), None, {}, {}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(key=st.sampled_from(["share", "note", "inner", "anything"]), value=JSON)
def test_the_schema_and_the_reader_agree(key: str, value: Any) -> None:
    data = json.loads(encode(EXAMPLE)) | {key: value}
    validator = jsonschema.Draft202012Validator(json_schema(Outer, "test", closed=True))
    try:
        decode(Outer, data, "file")
    except BadInput:
        # JSON Schema takes 1.0 for an integer, the reader does not.
        assert not validator.is_valid(data) or _has_whole_float(value)
        return
    validator.validate(data)


def _has_whole_float(value: Any) -> bool:
    if isinstance(value, list | dict):
        return any(map(_has_whole_float, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and value.is_integer()


def test_descriptions_are_the_docstrings() -> None:
    schema = json_schema(Outer, "test")
    assert schema["$defs"]["Outer"]["description"] == "An outer one, over two lines."
    assert schema["$defs"]["Outer"]["required"] == ["share", "note", "inner", "anything"]
    assert "additionalProperties" not in schema["$defs"]["Outer"]
