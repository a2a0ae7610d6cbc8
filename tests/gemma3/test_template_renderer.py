"""Templates that fail, loop, grow or try to leave the sandbox."""

import subprocess
import sys
from pathlib import Path

import pytest

from gemma3 import template_renderer
from gemma3.errors import BadInput
from gemma3.template_renderer import MAX_TEMPLATE, TemplateRenderer

MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ raise_exception('no\nway') }}", "no way"),
        ("{{ messages[0].name.first }}", "UndefinedError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'other' %}", "no loader"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}words{% endfor %}{% endfor %}", "more than 8388608 char"),
        ("{{ 'x' * 10**10 }}", "MemoryError"),
        ("{{ 'x' | center(10**10) }}", "MemoryError"),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "MemoryError",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ namespace.__init__.__globals__ }}", "SecurityError"),
        ("{{ namespace(__class__=1) }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
        ("{{ dict.mro() }}", "UndefinedError"),
    ],
)
def test_a_failing_template_is_one_line(template: str, word: str) -> None:
    renderer = TemplateRenderer(template, {})
    for _ in range(2):  # the process lives on
        with pytest.raises(BadInput, match=word) as caught:
            renderer.render(MESSAGES, True)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_renderer, "SECONDS", 1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    renderer = TemplateRenderer(f"{{% if add_generation_prompt %}}{endless}{{% endif %}}ok", {})
    with pytest.raises(BadInput, match="takes more than 1 s or 1024 MiB"):
        renderer.render(MESSAGES, True)
    assert renderer.render(MESSAGES, False) == "ok"


def test_a_template_has_a_largest_size() -> None:
    with pytest.raises(BadInput, match=f"over the limit of {MAX_TEMPLATE}"):
        TemplateRenderer("x" * (MAX_TEMPLATE + 1), {})


def test_any_text_comes_back_as_it_was() -> None:
    text = "é 漢 🙂 \x00 \ud800 \r\n\u2028 \\ \" ' {{ x }}"
    renderer = TemplateRenderer("{{ messages[0].content }}{{ word }}", {"word": text})
    assert renderer.render([{"role": "user", "content": text}], False) == text + text


def test_the_process_ends_with_the_program() -> None:
    code = (
        "from gemma3.template_renderer import TemplateRenderer\n"
        "renderer = TemplateRenderer('x', {}); renderer.render([], False); print(renderer._process.pid)"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not Path(f"/proc/{done.stdout.strip()}").exists()
