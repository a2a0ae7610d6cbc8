"""Small text files that a user or another tool wrote: read whole, or refused in one line.

Only plain files are opened, links to them included: a pipe would wait for its writer, and a device has no end.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from gemma3.errors import BadInput

# More than any configuration, index, manifest or tokenizer has (Gemma's tokenizer.json: 33 MB). A larger file is
# something else.
LARGEST = 256 << 20
OWN_FILE = "get the checkpoint's own file"  # advice for a companion of the weights that is damaged


def read_text(path: Path, advice: str) -> str:
    """The text of a plain file in UTF-8. ``advice`` says what to do when there is no such file.

    Raises BadInput when it is missing, not a plain file, not allowed to be read, over 256 MiB, or not UTF-8 text, and
    when it begins with a byte order mark, which neither JSON nor TOML may have.
    """
    check_plain(path, advice)
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise BadInput(f"{path}: is {size >> 20} MiB, too much for a file of this name; {advice}")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise BadInput(f"{path}: {reason(error)}") from None
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path}: not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); save it as UTF-8"
        ) from None
    if text.startswith("\ufeff"):
        raise BadInput(f"{path}: begins with a byte order mark; save it as UTF-8 without one")
    return text


def read_json(path: Path, advice: str) -> Any:
    """The value of a JSON file. Raises BadInput as ``read_text`` and ``parse_json`` do."""
    return _parsed(read_text(path, advice), path, advice)


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file. Raises BadInput as ``read_json`` does, and for another value than an object."""
    return object_in(read_text(path, advice), path, advice)


def object_in(text: str, path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in ``text``, which was read from ``path``. Raises BadInput as ``read_object`` does."""
    data = _parsed(text, path, advice)
    if not isinstance(data, dict):
        raise BadInput(f"{path}: holds a JSON {type(data).__name__}, expected an object; {advice}")
    return data


def read_optional(path: Path, advice: str) -> dict[str, Any]:
    """As ``read_object``; empty if there is no such file."""
    return read_object(path, advice) if path.exists() or path.is_symlink() else {}


def _parsed(text: str, path: Path, advice: str) -> Any:
    try:
        return parse_json(text)
    except BadInput as error:
        raise BadInput(f"{path}: {error}; {advice}") from None


def check_plain(path: Path, advice: str) -> None:
    """Raises BadInput unless ``path`` is a plain file or a link to one. It opens nothing, so it cannot hang."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{path}: no such file; {advice}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: {reason(error)}") from None
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise BadInput(f"{path}: is {kind}, not a plain file; {advice}")


def reason(error: OSError | ValueError) -> str:
    """Why a file could not be opened, and what to do about it if that is known."""
    if isinstance(error, PermissionError):
        return f"not allowed to read it; make it readable: chmod u+r, or run as {_owner(error.filename)}"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _owner(path: str | None) -> str:
    try:
        return f"its owner (user id {os.stat(path).st_uid})" if path else "its owner"
    except OSError:
        return "its owner"


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises BadInput for anything that JSON does not have, or leaves open.

    These are NaN and infinite numbers, numbers of thousands of digits, a key that an object has twice, and structures
    too deep to be read.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_once)
    except BadInput:
        raise
    except RecursionError:
        raise BadInput("not readable as JSON (nested too deeply)") from None
    except ValueError as error:
        raise BadInput(f"not readable as JSON ({error})") from None


def _refuse_constant(name: str) -> Any:
    raise BadInput(f"not readable as JSON (it holds {name}, which is not a number in JSON)")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise BadInput(f"holds the key {ascii(name)[:60]} twice; leave one of them")
        found[name] = value
    return found
