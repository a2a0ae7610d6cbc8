"""Renders one chat template again and again, in a process of its own that gemma3/template_renderer.py starts.

The template comes with a checkpoint from anywhere, so it is not trusted. jinja2's sandbox keeps it from Python's
internals, and the limits of this process end it when it takes too much memory or time. The environment is that of
transformers (``utils/chat_template_utils.py``), so that a template renders as it does there.

Each line of stdin and stdout is a JSON object, in ASCII. The first line of stdin has the template.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    sys.path[:] = setup["path"]  # of the program that started this one
    with suppress(ValueError, OSError):  # macOS does not have this limit
        resource.setrlimit(resource.RLIMIT_AS, (setup["memory"], setup["memory"]))
    _limit_time(setup["seconds"])
    template, problem = None, ""
    try:
        template = environment().from_string(setup["template"])
    except Exception as error:
        problem = _reason(error)
    for line in sys.stdin:
        _limit_time(setup["seconds"])
        reply = {"error": problem}
        if template is not None:
            try:
                reply = {"text": _bounded(template.generate(**json.loads(line)), setup["characters"])}
            except Exception as error:
                reply = {"error": _reason(error)}
        print(json.dumps(reply), flush=True)


def environment() -> Any:
    """transformers' environment for chat templates."""
    import jinja2
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """``{% generation %}`` … ``{% endgeneration %}`` marks the model's words for training. It renders its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    class Dict:
        """``dict`` without the attributes of the type."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    class PlainNamespace(Namespace):
        """``namespace`` without names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # the values may have the name "self"
            values = dict(*args[1:], **kwargs)
            for name in values:
                _check_name(name)
            Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            Namespace.__setitem__(self, name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made: jinja2.Environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": Dict(),
        "namespace": PlainNamespace,
    }
    return made


def _limit_time(seconds: int) -> None:
    """End this process when it computes for ``seconds`` from now."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds, most))


def _bounded(pieces: Any, characters: int) -> str:
    text: list[str] = []
    room = characters
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            raise ValueError(f"it renders more than {characters} characters")
        text.append(piece)
    return "".join(text)


def _reason(error: Exception) -> str:
    kind, words = type(error).__name__, " ".join(str(error).split())
    return words[:300] if kind in ("TemplateError", "ValueError") and words else f"{kind}: {words[:300]}".rstrip(": ")


if __name__ == "__main__":
    main()
