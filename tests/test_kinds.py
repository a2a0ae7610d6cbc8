"""Checkpoints as many tools write them: exported and equal to transformers, or refused in a line that names the cause.

tests/kinds holds the generator. Few kinds are exported: each choice is in one of them. Every pair of choices is opened.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from numpy.typing import NDArray
from PIL import Image

from gemma3.chat import Message
from gemma3.checkpoint import load_model, open_checkpoint
from runtime_py import api
from tests.bundles import Cli
from tests.kinds.kind import FAULTS, PLAIN, Kind, covering, singles
from tests.kinds.oracle import Transformers
from tests.kinds.tokens import PROBE, texts
from tests.kinds.weights import IMAGE_SIZE
from tests.kinds.write import write

NEW_TOKENS = 5
CHAT: list[Message] = [
    {"role": "user", "content": "Hello [SCRATCH] you,\n\nwhat is  it? "},
    {"role": "assistant", "content": " Xylofrobnicate. Now?\n"},
    {"role": "user", "content": "caf\u00e9 \U0001f600"},
]
QUESTION = "What is it?"

OPENED = [*singles(), *(pytest.param(kind, marks=pytest.mark.slow) for kind in covering(2))]
# Each fault in a checkpoint of transformers 5, and in one that is as different from it as can be.
DIFFERENT = Kind(
    model="seeing", config="4.50", files="shards", dtype="BF16", tokenizer="4", template="ChatML", processor="4"
)
NEEDS: dict[str, dict[str, Any]] = {
    "pictures of another mean": {"model": "seeing", "processor": "5"},
    "pictures of another size": {"model": "seeing", "processor": "4"},
}


@dataclass
class Recorder:
    """A session that keeps what was fed to it, and the logits that came out."""

    session: Any
    ids: list[int] = field(default_factory=list)
    logits_after: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # by the number of ids fed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def prefill(self, ids: Sequence[int], images: Sequence[Any] = ()) -> NDArray[np.float32]:
        self.ids += ids
        logits: NDArray[np.float32] = self.session.prefill(ids, images).copy()
        self.logits_after[len(self.ids)] = logits
        return logits

    def step(self, token: int) -> NDArray[np.float32]:
        return self.prefill([token])


def assert_continues(
    bundle: Path, format: str, theirs: Transformers, prompt: str, ids: list[int], **options: Any
) -> None:
    """For ``prompt`` the bundle feeds ``ids``, computes transformers' logits and says its text."""
    opened = api.open_bundle(bundle, format)
    recorder = Recorder(opened.session)
    stream = api.generate(replace(opened, session=recorder), prompt, max_new_tokens=NEW_TOKENS, **options)
    said = "".join(stream)
    assert recorder.ids[: min(recorder.logits_after)] == ids
    logits = theirs.logits(recorder.ids)
    for count, ours in recorder.logits_after.items():
        assert np.abs(ours - logits[count - 1]).max() < 1e-3 * logits.std()
    # Bytes that are no UTF-8 are replaced one by one there; a stream cannot know how many will follow.
    assert said.split("\ufffd")[0] == theirs.greedy_text(ids, NEW_TOKENS).split("\ufffd")[0]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "format"), [(PLAIN, "both"), *((kind, "onnx") for kind in covering(1))], ids=str)
def test_an_exported_kind_equals_transformers(gemma_edge: Cli, tmp_path: Path, kind: Kind, format: str) -> None:
    checkpoint, bundle = write(kind, tmp_path / "checkpoint"), tmp_path / "bundle"
    result = gemma_edge("export", checkpoint, "-o", bundle, "--format", format, "--scheme", "fp32")
    assert result.code == 0, result.err
    theirs = Transformers(kind, checkpoint)
    stock = tokenizers.Tokenizer.from_file(str(bundle / "tokenizer.json"))  # what other runners read
    for text in texts(kind):
        assert stock.encode(text).ids == theirs.ids(text)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)).save(
        picture := tmp_path / "picture.png"
    )
    for one in ("onnx", "pte") if format == "both" else (format,):
        assert theirs.stop_ids <= set(api.open_bundle(bundle, one).eos_ids) <= theirs.named_stop_ids
        assert_continues(bundle, one, theirs, PROBE, theirs.ids(PROBE))
        if (chat := theirs.chat_ids([{"role": "user", "content": QUESTION}])) is not None:
            assert_continues(bundle, one, theirs, QUESTION, chat, chat=True)
        if kind.model == "seeing":
            seen = theirs.see(picture, QUESTION)
            assert_continues(bundle, one, theirs, QUESTION, seen, images=[picture])
            theirs.seen = {}


@pytest.mark.parametrize("kind", OPENED, ids=str)
def test_an_opened_kind_equals_transformers(tmp_path: Path, kind: Kind) -> None:
    checkpoint = write(kind, tmp_path / "checkpoint")
    ours, theirs = open_checkpoint(checkpoint), Transformers(kind, checkpoint)
    for text in texts(kind):
        ids = theirs.ids(text)
        assert ours.tokenizer.encode(text, bos=True) == ids
        assert ours.tokenizer.decode(ids) == theirs.tokenizer.decode(ids, skip_special_tokens=True)
    assert theirs.stop_ids <= {*ours.config.eos_token_ids, *ours.generation.eos_token_ids} <= theirs.named_stop_ids
    if (chat := theirs.chat_ids(CHAT)) is not None:
        vision = ours.config.vision
        size = None if vision is None else vision.tokens_per_image
        assert ours.chat.encode(ours.tokenizer, CHAT, tokens_per_image=size) == chat
    ids = theirs.ids(PROBE)
    logits, expected = load_model(ours)(torch.tensor([ids]))[0].numpy(), theirs.logits(ids)
    assert np.abs(logits - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("base", [PLAIN, DIFFERENT], ids=["plain", "different"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name(gemma_edge: Cli, tmp_path: Path, fault: str, base: Kind) -> None:
    kind = replace(base, fault=fault, **NEEDS.get(fault, {}))
    checkpoint = write(kind, tmp_path / "checkpoint")
    (target := tmp_path / "target").mkdir()
    result = gemma_edge("export", checkpoint, "-o", target / "bundle", "--format", "onnx", "--scheme", "fp32")
    assert result.code == 3, result.err
    assert result.out == ""
    assert len(result.err.splitlines()) == 1, result.err
    assert result.err.startswith("error: ")
    for word in FAULTS[fault]:
        assert word in result.err
    assert list(target.iterdir()) == []
