"""Reads the small JSON files beside a checkpoint's weights."""

import json
from pathlib import Path
from typing import Any

from gemma3.errors import BadInput

MAX_BYTES = 64 << 20  # a released tokenizer_config.json has one megabyte


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file ``path``; empty without the file. Raises BadInput when it holds anything else."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadInput(f"{path}: {path.stat().st_size} bytes, over {MAX_BYTES}; get the checkpoint's own file")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except BadInput:
        raise
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error}); get the checkpoint's own file") from None
    if not isinstance(data, dict):
        raise BadInput(f"{path}: holds a JSON {type(data).__name__}, expected an object")
    return data
