"""Renders a chat template of jinja2 in another process, which has no more memory and time than a prompt needs."""

import json
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma3.errors import BadInput

WORKER = Path(__file__).with_name("template_worker.py")
MEMORY, SECONDS, CHARACTERS = 1 << 30, 10, 8 << 20
MAX_TEMPLATE = 1 << 20  # characters; long ones have twenty thousand


class TemplateRenderer:
    """The template ``template`` with the variables ``variables``. Its process starts when it is first needed.

    Raises BadInput for a template of more than ``MAX_TEMPLATE`` characters.
    """

    def __init__(self, template: str, variables: Mapping[str, str]) -> None:
        if len(template) > MAX_TEMPLATE:
            raise BadInput(f"the chat template has {len(template)} characters, over the limit of {MAX_TEMPLATE}")
        self._template = template
        self._variables = dict(variables)
        self._process: subprocess.Popen[str] | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The text of a conversation as transformers' ``apply_chat_template`` renders it.

        Raises BadInput with the template's reason when it refuses the conversation or fails, when the text is longer
        than ``CHARACTERS``, and when rendering takes more than ``MEMORY`` bytes or ``SECONDS``.
        """
        arguments = {
            **self._variables,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        reply = self._ask(arguments)
        if reply is None:
            raise BadInput(f"the chat template takes more than {SECONDS} s or {MEMORY >> 20} MiB; give another one")
        if "error" in reply:
            raise BadInput(f"the chat template refuses or fails: {reply['error']}")
        return reply["text"]

    def _ask(self, arguments: dict[str, Any]) -> dict[str, str] | None:
        """The reply of the process; None when it ended instead."""
        # An interrupted process would give its reply to the next question, so it is kept only when it has replied.
        process, self._process = self._process or self._start(), None
        assert process.stdin
        assert process.stdout
        line = ""
        try:
            print(json.dumps(arguments), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line.endswith("\n"):
            return None
        self._process = process
        reply: dict[str, str] = json.loads(line)
        return reply

    def _start(self) -> subprocess.Popen[str]:
        # A session of its own: Ctrl-C is for this program, which ends the process by closing its input.
        process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            start_new_session=True,
        )
        assert process.stdin
        weakref.finalize(self, _stop, process)
        setup = {"path": sys.path, "template": self._template, "memory": MEMORY, "seconds": SECONDS}
        print(json.dumps(setup | {"characters": CHARACTERS}), file=process.stdin, flush=True)
        return process


def _stop(process: subprocess.Popen[str]) -> None:
    try:
        process.communicate()  # closes its input
    except (OSError, ValueError):
        process.kill()
    process.wait()
