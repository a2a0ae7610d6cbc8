"""prefill, and chats that begin from what it wrote, on a tiny multimodal model and on the demo checkpoint."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Drawing

import cli
from export.bundle import draft_bundle, seal
from export.manifest import MANIFEST
from gemma3.chat import GemmaFormat, Image, Message, Part
from gemma3.tokenizer import Tokenizer
from quant.quantize import in_recipe
from quant.recipe import scheme_recipe
from runtime_py.api import generate, open_bundle, open_checkpoint, prefill
from runtime_py.backends import backend_of
from runtime_py.conversation import Conversation
from runtime_py.generate import Sampler
from runtime_py.prefix import prefix_ids
from runtime_py.snapshot import write_snapshot
from runtime_py.text import OpenBundle
from tests.bundles import EXPORT, SEEING_CONFIG, Cli, copy_bundle, refused, write_checkpoint

SYSTEM = "Be kind, be brief."


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefix")
    checkpoint = write_checkpoint(folder / "tiny", SEEING_CONFIG)
    cli.app(["export", str(checkpoint), "-o", str(folder / "b"), "--format", "onnx", *EXPORT], standalone_mode=False)
    (folder / "system.txt").write_text(f"  {SYSTEM}\n")
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        Drawing.fromarray(random.integers(256, size=(30, 40, 3)).astype(np.uint8)).save(folder / f"{name}.png")
    prefill(open_bundle(folder / "b"), folder / "text.cache", system=SYSTEM)
    prefill(open_bundle(folder / "b"), folder / "picture.cache", system=SYSTEM, images=[folder / "a.png"])
    return folder / "b"


def test_prefill_says_what_it_wrote(gemma_edge: Cli, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "prefix.cache"
    result = gemma_edge("prefill", bundle, "--system", bundle.parent / "system.txt", "-o", out, "--json")
    assert result.code == 0, result.err
    said = json.loads(result.out)
    assert said.pop("seconds") > 0
    assert said == {"file": str(out), "format": "onnx", "tokens": said["tokens"], "bytes": out.stat().st_size}
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == (bundle.parent / "text.cache").read_bytes(), "the same inputs give the same bytes"


def fed_by(session: object, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids that every session of this class is fed from now on."""
    fed: list[int] = []
    original = type(session).prefill  # type: ignore[attr-defined]

    def recorded(self: object, ids: list[int], images: object = ()) -> object:
        fed.extend(ids)
        return original(self, ids, images)

    monkeypatch.setattr(type(session), "prefill", recorded)
    return fed


@pytest.mark.parametrize("pictures", [False, True])
def test_a_chat_from_a_file_is_fed_only_what_follows(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, pictures: bool
) -> None:
    """It gives the bits of a session that was fed the same calls."""
    opened = open_bundle(bundle, prefix=bundle.parent / f"{'picture' if pictures else 'text'}.cache")
    prefix = opened.prefix
    assert prefix.system == SYSTEM
    assert len(prefix.pictures) == pictures
    assert prefix.snapshot is not None
    ids = list(prefix.snapshot.ids)
    whole = opened.chat.encode(
        opened.tokenizer, prefix.first_turn("hello", (), opened.session.vision), tokens_per_image=4
    )
    assert whole[: len(ids)] == ids
    other = open_bundle(bundle).session
    other.prefill(ids, [picture.pixels[0] for picture in prefix.pictures])
    wanted = other.prefill(whole[len(ids) :])
    fed = fed_by(opened.session, monkeypatch)
    for _ in range(2):
        stream = generate(opened, "hello", chat=True, max_new_tokens=1)
        assert fed == whole[len(ids) :]
        assert np.array_equal(opened.session.logits, wanted)
        list(stream)
        fed.clear()
    chat = Conversation(
        opened.session, opened.tokenizer, Sampler(), chat=opened.chat, prefix=prefix, stop_ids=(), max_new_tokens=1
    )
    for _ in range(2):
        list(chat.say("hello"))
        assert np.array_equal(opened.session.logits, wanted)
        chat.reset()
        assert opened.session.position == len(ids)


def test_pictures_of_the_turn_follow_those_of_the_prefix(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, picture = open_bundle(bundle, prefix=bundle.parent / "picture.cache"), bundle.parent / "b.png"
    assert opened.prefix.snapshot is not None
    fed = fed_by(opened.session, monkeypatch)
    turns: list[tuple[str, list[Part]]] = [
        ("what", [Image(), Image(), "what"]),
        ("what <image>", [Image(), "what ", Image(), ""]),
    ]
    for text, parts in turns:
        generate(opened, text, chat=True, images=[picture])
        messages: list[Message] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": parts}]
        whole = opened.chat.encode(opened.tokenizer, messages, tokens_per_image=4)
        assert [*opened.prefix.snapshot.ids, *fed] == whole
        fed.clear()
    with pytest.raises(ValueError, match="1 marker <image> for 0 images"):
        generate(opened, "what <image>", chat=True)


def test_commands_that_begin_from_a_file(
    gemma_edge: Cli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("-n", "8", "--sampling", "greedy")
    system = bundle.parent / "system.txt"
    for file, begin in (
        ("text", ["--system", system]),
        ("picture", ["--system", system, "--image", bundle.parent / "a.png"]),
    ):
        prefix = ["--prefix", bundle.parent / f"{file}.cache"]
        found = gemma_edge("generate", bundle, "hello", "--chat", *prefix, *options)
        wanted = gemma_edge("generate", bundle, "hello", "--chat", *begin, *options)
        assert found.code == wanted.code == 0, found.err + wanted.err
        assert found.err == ""
        assert found.out == wanted.out
        chats = []
        for more in (prefix, begin):
            monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand you?\n"))
            chats.append(gemma_edge("chat", bundle, *more, *options))
        assert chats[0].code == 0
        assert chats[0].out == chats[1].out
        assert chats[0].out.startswith(found.out)
    plain = gemma_edge("generate", bundle, "hello", "--chat", *options)
    assert plain.out != gemma_edge("generate", bundle, "hello", "--chat", "--system", system, *options).out


def test_the_prefix_stays_after_a_reset(gemma_edge: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/reset\nhello\n"))
    result = gemma_edge("chat", bundle, "--prefix", bundle.parent / "picture.cache", "-n", "8")
    first, second = result.out.splitlines()
    assert first == second


class Rewriting(GemmaFormat):
    """A chat format that shows the model's earlier turns in other words."""

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tokens_per_image: int | None = None,
    ) -> list[int]:
        shown = [message if message["role"] != "assistant" else OTHER for message in messages]
        return super().encode(tokenizer, shown, add_generation_prompt, tokens_per_image=tokens_per_image)


OTHER: Message = {"role": "assistant", "content": "other words"}


@pytest.mark.parametrize("rewinds", [True, False])
def test_a_conversation_that_is_rewritten_goes_on_from_where_it_can(
    rewinds: bool, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caches go back to where the texts differ, or where they cannot do that, to the snapshot."""
    opened, chat = open_bundle(bundle, prefix=bundle.parent / "picture.cache"), Rewriting()
    prefix, session = opened.prefix, opened.session
    assert prefix.snapshot is not None
    if not rewinds:
        monkeypatch.setattr(session, "can_rewind", lambda *_: False)
    conversation = Conversation(
        session, opened.tokenizer, Sampler(), chat=chat, prefix=prefix, stop_ids=(), max_new_tokens=6
    )
    list(conversation.say("hello"))
    fed = fed_by(session, monkeypatch)
    list(conversation.say("and you?"))
    messages = [*prefix.first_turn("hello", (), session.vision), OTHER, Message(role="user", content="and you?")]
    whole = chat.encode(opened.tokenizer, messages, tokens_per_image=4)
    new = whole[len(prefix.snapshot.ids) :]
    answer = 5  # without its last id
    assert fed[:-answer] == whole[answer - len(fed) :]
    assert (len(fed) - answer < len(new)) == rewinds
    assert session.position == len(whole) + answer


# What is refused


def test_options_that_do_not_go_together(gemma_edge: Cli, bundle: Path, tmp_path: Path) -> None:
    system, prefix = bundle.parent / "system.txt", bundle.parent / "text.cache"
    refused(gemma_edge("generate", bundle, "hello", "--prefix", prefix), 3, "beginning of a chat", "--chat")
    refused(gemma_edge("generate", bundle, "hello", "--system", system), 3, "beginning of a chat", "--chat")
    refused(gemma_edge("chat", bundle, "--prefix", prefix, "--system", system), 3, "leave out --system")
    refused(gemma_edge("prefill", bundle, "-o", tmp_path / "out"), 3, "nothing to prefill")
    refused(gemma_edge("prefill", bundle, "--system", system, "-o", prefix), 3, "exists")
    refused(gemma_edge("prefill", bundle, "--system", tmp_path / "no", "-o", tmp_path / "out"), 3, "no such file")
    (tmp_path / "empty").write_text(" \n")
    refused(gemma_edge("prefill", bundle, "--system", tmp_path / "empty", "-o", tmp_path / "out"), 3, "is empty")
    (tmp_path / "long").write_text("word " * 100)
    refused(gemma_edge("prefill", bundle, "--system", tmp_path / "long", "-o", tmp_path / "out"), 4, "context of 96")
    refused(gemma_edge("chat", bundle, "--system", tmp_path / "long"), 4, "context of 96")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="pass chat as well"):
        generate(open_bundle(bundle, prefix=prefix), "hello")


def test_files_are_refused_before_a_graph_is_opened(
    gemma_edge: Cli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("the graph was opened")

    monkeypatch.setattr("runtime_py.text.open_session", opened)
    prefix = bundle.parent / "picture.cache"
    content = prefix.read_bytes()
    (tmp_path / "cut").write_bytes(content[:-1])
    (tmp_path / "older").write_bytes(content.replace(b'\\"snapshot\\": 1', b'\\"snapshot\\": 0'))
    (tmp_path / "toy").write_bytes(content.replace(b'\\"format\\": \\"onnx\\"', b'\\"format\\": \\"toys\\"'))
    (tmp_path / "said").write_bytes(content.replace(b"Be kind", b"Be rude"))
    copy = copy_bundle(bundle, tmp_path / "bundle")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"]["model.onnx.data"]["sha256"] = "0" * 64
    (copy / MANIFEST).write_text(json.dumps(manifest))
    for place, file, words in (
        (bundle, tmp_path / "none", "no such file"),
        (bundle, tmp_path / "cut", "cut short"),
        (bundle, tmp_path / "older", "version 0, this program reads 1"),
        (bundle, tmp_path / "toy", "made with a .toys, which this program does not know"),
        (bundle, tmp_path / "said", "of its text and pictures"),
        (bundle, bundle / "model.onnx", "no snapshot"),
        (copy, prefix, "that of this bundle is 000000000000…"),
    ):
        refused(gemma_edge("chat", place, "--prefix", file), 3, str(file), words)
        refused(gemma_edge("generate", place, "hello", "--chat", "--prefix", file), 3, str(file), words)


def test_a_damaged_cache_is_found_before_it_is_used(gemma_edge: Cli, bundle: Path, tmp_path: Path) -> None:
    content = bytearray((bundle.parent / "text.cache").read_bytes())
    content[-100] ^= 1
    (tmp_path / "file").write_bytes(content)
    refused(gemma_edge("chat", bundle, "--prefix", tmp_path / "file"), 3, "the file is damaged")
    refused(gemma_edge("generate", bundle, "hello", "--chat", "--prefix", tmp_path / "file"), 3, "the file is damaged")


def test_a_snapshot_of_other_ids_than_its_text(bundle: Path, tmp_path: Path) -> None:
    opened: OpenBundle = open_bundle(bundle)
    opened.session.prefill([2, 5, 6])
    write_snapshot(tmp_path / "file", opened.session, opened.origin, [2, 5, 6], system=SYSTEM)
    with pytest.raises(ValueError, match=r"holds 3 ids, which differ at index 1 from the \d+ of its text"):
        open_bundle(bundle, prefix=tmp_path / "file")


def test_keys_of_an_earlier_chat_do_not_get_into_the_file(bundle: Path, tmp_path: Path) -> None:
    """Sliding-window layers are written whole, with rows that the prefix did not reach."""
    opened = open_bundle(bundle)
    opened.session.prefill(list(range(40, 100)))
    prefill(opened, tmp_path / "file", system=SYSTEM)
    assert (tmp_path / "file").read_bytes() == (bundle.parent / "text.cache").read_bytes()


# The demo checkpoint


@pytest.mark.slow
def test_the_demo_goes_on_from_a_file_in_both_formats(tmp_path: Path) -> None:
    """Past the window of 64 and the wraps of its caches, to the bit."""
    quantized = in_recipe(open_checkpoint("demo"), scheme_recipe("int4-block32"))
    targets = [backend_of(format).target for format in ("pte", "onnx")]
    with draft_bundle(quantized, tmp_path / "demo", targets=targets) as draft:
        seal(draft, [])
    system = "Answer in one sentence. " * 40
    for format in ("pte", "onnx"):
        file = tmp_path / f"{format}.cache"
        fed = prefill(open_bundle(tmp_path / "demo", format, 1), file, system=system.strip())
        assert fed > 200
        opened = open_bundle(tmp_path / "demo", threads=1, prefix=file)
        assert opened.origin.format == format
        chat = Conversation(opened.session, opened.tokenizer, Sampler(), prefix=opened.prefix, stop_ids=opened.eos_ids)
        other = open_bundle(tmp_path / "demo", format, 1)
        ids = prefix_ids(opened.prefix, other.tokenizer, other.chat, None)
        other.session.prefill(ids)
        for question in ("What is the capital of France?", "And what is a cat?"):
            other.session.prefill(chat.turn_ids(question))
            answer = "".join(chat.say(question))
            assert answer
            said = chat._fed[other.session.position :]
            for token in said:
                other.session.step(token)
            assert np.array_equal(other.session.logits, opened.session.logits)
