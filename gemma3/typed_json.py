"""Frozen dataclasses as JSON: written, read back with every type checked, and described as a JSON Schema.

Every key of a file is a field of its dataclass. An unknown key, a missing one without a default, or a value of another
type is refused with an error that names its place in the file. Works without torch.
"""

import dataclasses
import inspect
import json
import types
import typing
from typing import Any, Literal, TypeVar

from gemma3.errors import BadInput

T = TypeVar("T")


def encode(value: Any, indent: int | None = 1) -> str:
    """The dataclass ``value`` as JSON text. Tuples become lists; NaN and infinite numbers raise ValueError."""
    return json.dumps(dataclasses.asdict(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def decode(kind: type[T], data: Any, where: str, *, ignore_unknown: bool = False) -> T:
    """Parsed JSON as an instance of the dataclass ``kind``. Error messages call the top of the file ``where``.

    ``ignore_unknown`` drops keys that are not fields, at every depth. Raises BadInput naming the place that is wrong.
    """
    value = _decode(kind, data, where, ignore_unknown)
    assert isinstance(value, kind)
    return value


def _decode(kind: Any, data: Any, where: str, ignore_unknown: bool) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        _expect(isinstance(data, dict), data, "an object", where)
        unknown = set() if ignore_unknown else data.keys() - hints.keys()
        optional = {
            field.name
            for field in dataclasses.fields(kind)
            if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        }
        for problem, keys in (("unknown", unknown), ("missing", hints.keys() - data.keys() - optional)):
            if keys:
                raise BadInput(f"{problem} key {where}.{min(keys)}")
        fields = {
            name: _decode(hint, data[name], f"{where}.{name}", ignore_unknown)
            for name, hint in hints.items()
            if name in data
        }
        return kind(**fields)
    if origin is tuple:
        _expect(isinstance(data, list), data, "a list", where)
        return tuple(
            _decode(arguments[0], item, f"{where}[{index}]", ignore_unknown) for index, item in enumerate(data)
        )
    if origin is dict:
        _expect(isinstance(data, dict), data, "an object", where)
        for key in data:
            _expect(_is_text(key), ascii(key), "valid Unicode as a key", where)
        return {key: _decode(arguments[1], value, f"{where}.{key}", ignore_unknown) for key, value in data.items()}
    if origin is Literal:
        _expect(data in arguments, data, f"one of {arguments}", where)
        return data
    if origin is types.UnionType and types.NoneType in arguments:
        rest = [argument for argument in arguments if argument is not types.NoneType]
        assert len(rest) == 1
        return None if data is None else _decode(rest[0], data, where, ignore_unknown)
    allowed = arguments if origin is types.UnionType else (kind,)
    if float in allowed:  # JSON does not distinguish 1.0 from 1
        allowed = (*allowed, int)
    # bool is a subclass of int in Python, but not in JSON.
    _expect(isinstance(data, allowed) and (bool in allowed or not isinstance(data, bool)), data, str(kind), where)
    if isinstance(data, str):
        _expect(_is_text(data), ascii(data), "valid Unicode", where)
    elif isinstance(data, int) and float in allowed:
        _expect(abs(data) < 2**1023, "a number of many digits", "a float", where)
    return data


def _is_text(text: str) -> bool:
    """False for a lone surrogate, which JSON can spell but no file or terminal can take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _expect(ok: bool, seen: Any, wanted: str, where: str) -> None:
    if not ok:
        raise BadInput(f"{where} is {str(seen)[:60]!r}, expected {wanted}")


SCALARS: dict[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number", types.NoneType: "null"}


def json_schema(kind: type[Any], title: str, closed: bool = False) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a file that holds ``kind``.

    ``closed`` forbids keys that are not fields. Otherwise they are allowed, because a newer version may add keys.
    """
    definitions: dict[str, Any] = {}
    top = _schema(kind, definitions, closed)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **top,
        "$defs": dict(sorted(definitions.items())),
    }


def _schema(kind: Any, definitions: dict[str, Any], closed: bool) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return {}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # set first, so that a type that contains itself does not recurse forever
            hints = typing.get_type_hints(kind)
            definitions[kind.__name__] = {
                "description": " ".join((inspect.getdoc(kind) or "").split()),
                "type": "object",
                "properties": {name: _schema(hint, definitions, closed) for name, hint in hints.items()},
                "required": [
                    field.name
                    for field in dataclasses.fields(kind)
                    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
                ],
                **({"additionalProperties": False} if closed else {}),
            }
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0], definitions, closed)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions, closed)}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is types.UnionType:
        return {"anyOf": [_schema(argument, definitions, closed) for argument in arguments]}
    return {"type": SCALARS[kind]}
