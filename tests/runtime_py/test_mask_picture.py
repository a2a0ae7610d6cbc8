"""The oracle is transformers' masks of the multimodal Gemma 3; the drawn and the printed mask are read back."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image as Picture
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import (
    create_masks_for_vision_model,
    get_block_sequence_ids_for_mask,
)

import gemma3
from gemma3.config import FULL, SLIDING, ModelConfig, parse_config
from gemma3.errors import BadInput
from gemma3.tokenizer import Tokenizer
from runtime_py.mask_picture import CELL, COLOURS, GLYPHS, ITSELF, MEANING, Masks, draw, masks_of, save, show
from tests.bundles import run
from tests.shapes import VISION_SHAPES, tiny_config

DEMO = Path(gemma3.__file__).parent / "demo"
TOKENIZER = Tokenizer(DEMO)
SEEING = VISION_SHAPES["like-4b"] | {"boi_token_index": 7, "eoi_token_index": 8, "image_token_index": 9}
TEXT = "text with <image> between, <image><image> 漢 and after"


def config(**changes: object) -> ModelConfig:
    return parse_config(SEEING | changes)


def masks(window: int = 6, tokens_per_image: int = 4) -> Masks:
    return masks_of(TEXT, TOKENIZER, config(), window=window, tokens_per_image=tokens_per_image)


@pytest.mark.parametrize("window", [1, 3, 6, 1000])
@pytest.mark.parametrize("tokens_per_image", [1, 4, 9])
def test_masks_are_transformers(window: int, tokens_per_image: int) -> None:
    ours = masks(window, tokens_per_image)
    count = len(ours.labels)
    assert [int(number) for number in np.unique(ours.images, return_counts=True)[1][1:]] == [tokens_per_image] * 3
    oracle_config = Gemma3TextConfig(sliding_window=window)
    oracle_config._attn_implementation = "eager"
    theirs = create_masks_for_vision_model(
        config=oracle_config,
        inputs_embeds=torch.zeros(1, count, 8),
        attention_mask=torch.ones(1, count, dtype=torch.int64),
        past_key_values=None,
        position_ids=torch.arange(count)[None],
        block_sequence_ids=get_block_sequence_ids_for_mask(torch.tensor(ours.images >= 0, dtype=torch.int64)[None]),
    )
    local, glob = ours.layers
    assert (local, glob) == (f"sliding-window layers, window {window}", "full-attention layers")
    np.testing.assert_array_equal(ours.layers[local], theirs[SLIDING][0, 0].numpy() == 0)
    np.testing.assert_array_equal(ours.layers[glob], theirs[FULL][0, 0].numpy() == 0)


def test_labels_say_what_a_token_is() -> None:
    labels = masks().labels
    assert labels[:3] == ["<bos>", "'text'", "' with'"]
    start = labels.index("<start_of_image>")
    assert labels[start - 1] == r"'\n\n'"
    assert labels[start + 1 : start + 6] == ["image 1"] * 4 + ["<end_of_image>"]
    assert labels.count("image 3") == 4
    assert r"'\xe6'" in labels  # the first byte of a character that has no token of its own


def test_the_models_own_window_and_image_tokens() -> None:
    own = masks_of(TEXT, TOKENIZER, config())
    assert list(own.layers) == ["sliding-window layers, window 8", "full-attention layers"]
    assert own.labels.count("image 2") == 4


def test_only_the_kinds_of_layers_that_the_model_has() -> None:
    assert list(masks_of("a", TOKENIZER, tiny_config("all-local")).layers) == ["sliding-window layers, window 8"]
    assert list(masks_of("a", TOKENIZER, tiny_config("all-global")).layers) == ["full-attention layers"]


def test_images_to_a_text_only_model_and_long_texts_are_bad_input() -> None:
    with pytest.raises(BadInput, match="1 image for a text-only model"):
        masks_of("<image>", TOKENIZER, tiny_config(), tokens_per_image=4)
    with pytest.raises(BadInput, match=r"the text is \d+ tokens, more than the 400 that can be drawn"):
        masks_of("<image> x", TOKENIZER, config(), tokens_per_image=400)


def panels(picture: Picture.Image, drawn: Masks) -> list[NDArray[np.int64]]:
    """The masks' cells, by the colours of the squares that the picture shows."""
    array = np.asarray(picture)
    kinds = np.full(array.shape[:2], -1)
    for kind, colour in COLOURS.items():
        kinds[(array == colour).all(-1)] = kind
    count = len(drawn.labels)
    # A panel begins at the first row with many squares; the legend's squares are below.
    top = next(y for y in range(len(kinds)) if (kinds[y] >= 0).sum() > count)
    left = np.flatnonzero(kinds[top] >= 0)
    starts = [left[0], *left[np.flatnonzero(np.diff(left) > CELL // 2) + 1]]
    centre = np.arange(count) * CELL + CELL // 2
    return [kinds[np.ix_(top + centre, start + centre)] for start in starts]


def test_the_picture_shows_the_masks() -> None:
    drawn = masks()
    shown = panels(draw(drawn), drawn)
    assert len(shown) == 2
    for title, cells in zip(drawn.layers, shown, strict=True):
        np.testing.assert_array_equal(cells, drawn.cells(title))
        assert set(np.unique(cells)) == set(MEANING)


@pytest.mark.parametrize("text", ["a", "<image>", "one two three four five six seven eight nine ten"])
def test_pictures_of_any_size_hold_labels_and_legend(text: str) -> None:
    """Ink beside the first token's square, above it and in the legend; nothing is cut at the edges."""
    picture = draw(masks_of(text, TOKENIZER, config()))
    top, left = np.argwhere((np.asarray(picture) == COLOURS[ITSELF]).all(-1))[0]
    ink = np.asarray(picture.convert("L")) < 100
    assert ink[top : top + CELL, :left].any()
    assert ink[top - 2 * CELL : top, left : left + CELL].any()
    assert ink[-3 * CELL :, 3 * CELL :].any()
    assert not ink[[0, -1]].any()
    assert not ink[:, [0, -1]].any()


@pytest.mark.parametrize(("columns", "gap"), [(None, 2), (200, 2), (70, 1)])
def test_the_text_shows_the_masks(columns: int | None, gap: int) -> None:
    drawn = masks()
    kinds = {glyph: kind for kind, glyph in GLYPHS.items()}
    for colour in (False, True):
        lines = re.sub("\033\\[\\d+m", "", show(drawn, colour, columns)).splitlines()
        assert columns is None or max(map(len, lines[1:])) <= columns
        for title in drawn.layers:
            first = lines.index(title) + 3  # two rows of digits between
            rows = lines[first : first + len(drawn.labels)]
            cells = [[kinds[glyph] for glyph in row[-gap * len(rows) + gap - 1 :: gap]] for row in rows]
            np.testing.assert_array_equal(cells, drawn.cells(title))
            assert rows[6].split()[:3] == ["image", "1", "6"]


def test_colours_only_where_asked() -> None:
    assert "\033" not in show(masks(), colour=False)
    assert "\033[93m▣" in show(masks(), colour=True)


def test_a_terminal_may_be_too_narrow() -> None:
    assert show(masks(), False, 40) == "36 tokens are too many for a terminal of 40 columns"


def test_a_picture_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be written"):
        save(masks(), tmp_path / "missing" / "mask.png")
    with pytest.raises(BadInput, match="cannot be written"):
        save(masks(), tmp_path)


def test_inspect_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs a configuration and a tokenizer, no weights."""
    (tmp_path / "config.json").write_text(json.dumps(SEEING))
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    out = tmp_path / "mask.png"
    options = ("--window", 6, "--tokens-per-image", 4, "-o", out)
    done = run(capsys, monkeypatch, "inspect", tmp_path, "--mask", TEXT, *options)
    assert (done.code, done.out) == (0, show(masks(), colour=False) + "\n")
    with Picture.open(out) as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(draw(masks())))
    refused = run(capsys, monkeypatch, "inspect", "demo", "--mask", "a <image>", "-o", out)
    assert refused.code == 3
    assert "1 image for a text-only model" in refused.err
