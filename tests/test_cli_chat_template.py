"""A fine-tune with files of its own beside the weights, through the command line."""

import io
import json
import sys
from pathlib import Path

import pytest

import cli
from export.manifest import MANIFEST
from runtime_py import text
from tests.bundles import EXPORT, Cli, copy_bundle, write_checkpoint

TEMPLATE = """\
{% for m in messages %}{% if m.content == 'loop' %}{% for i in range(10**9) %}x{% endfor %}{% endif %}
{{- '<start_of_turn>' + m.role + ': ' + m.content + '<end_of_turn>' }}{% endfor %}"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("tuned") / "checkpoint")
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    (checkpoint / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 2.0, "top_k": 0}))
    out = checkpoint.parent / "bundle"
    cli.app(["export", str(checkpoint), "-o", str(out), "--format", "onnx", *EXPORT], standalone_mode=False)
    return out


def test_chat_uses_the_template(gemma_edge: Cli, bundle: Path) -> None:
    """The answer is that to the rendered text."""
    opened = text.open_bundle(bundle)
    tokenizer = opened.tokenizer
    ids = opened.chat.encode(tokenizer, [{"role": "user", "content": "hi"}])
    start, end = tokenizer.special["<start_of_turn>"], tokenizer.end_of_turn_id
    assert ids == [start, *tokenizer.encode("user: hi", bos=False), end]
    answer = gemma_edge("generate", bundle, "hi", "--chat", "-n", "4")
    assert answer.code == 0
    expected = "".join(text.generate(opened, "hi", chat=True, max_new_tokens=4))
    assert answer.out == expected + "\n"


def test_a_failing_template_is_one_line_and_the_chat_goes_on(
    gemma_edge: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = gemma_edge("generate", bundle, "loop", "--chat")
    assert failed.code == 3
    assert failed.err.startswith("error: the chat template refuses or fails: OverflowError: Range too big")
    assert failed.err.count("\n") == 1
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nloop\n"))
    chat = gemma_edge("chat", bundle, "-n", "4")
    assert chat.code == 0
    assert "Range too big" in chat.err
    assert chat.out == gemma_edge("generate", bundle, "hi", "--chat", "-n", "4").out


def test_the_checkpoints_sampling_is_offered(gemma_edge: Cli, bundle: Path) -> None:
    def said(*options: str) -> str:
        result = gemma_edge("generate", bundle, "some text", "-n", "8", "--seed", "4", *options)
        assert result.code == 0, result.err
        return result.out

    proposed = said("--sampling", "checkpoint")
    assert proposed == said("--temperature", "2")
    assert proposed != said()
    assert said("--sampling", "checkpoint", "--temperature", "0") == said()  # the option wins
    assert said("--sampling", "checkpoint", "--top-k", "1") == said()
    assert said("--temperature", "1e-310") == said()


def test_a_forged_manifest_is_bad_input(gemma_edge: Cli, bundle: Path, tmp_path: Path) -> None:
    for key, value, word in (
        ("chat_template", "{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("chat_template", "x" * (1 << 21), "over the limit"),
        ("chat_format", "other", "chat_format"),
        ("template_variables", {"messages": 1}, "template_variables"),
    ):
        forged = copy_bundle(bundle, tmp_path / word)
        manifest = json.loads((forged / MANIFEST).read_text())
        manifest["tokenizer"][key] = value
        (forged / MANIFEST).write_text(json.dumps(manifest))
        result = gemma_edge("generate", forged, "hi", "--chat")
        assert (result.code, word in result.err, result.err.count("\n")) == (3, True, 1), result.err
