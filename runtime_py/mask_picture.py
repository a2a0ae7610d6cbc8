"""Draws which token attends to which: the attention masks of a text, which may hold images, as PNG and as text.

Modelled on transformers' AttentionMaskVisualizer. The masks are those of the eager model (gemma3.model).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont

from gemma3.chat import IMAGE_MARKER, Image, encode_prompt, place_images
from gemma3.config import FULL, SLIDING, ModelConfig
from gemma3.errors import BadInput
from gemma3.tokenizer import END_OF_IMAGE, START_OF_IMAGE, Tokenizer

MOST_TOKENS = 400  # two masks of this many are 84 megapixels

HIDDEN, SEEN, ITSELF, SAME_IMAGE = range(4)
MEANING = {SEEN: "visible", ITSELF: "itself", SAME_IMAGE: "visible, same image", HIDDEN: "masked"}
GLYPHS = {HIDDEN: "·", SEEN: "■", ITSELF: "◆", SAME_IMAGE: "▣"}
ANSI = {ITSELF: "\033[92m", SAME_IMAGE: "\033[93m"}
RESET = "\033[0m"
COLOURS = {HIDDEN: (238, 238, 238), SEEN: (45, 45, 60), ITSELF: (46, 160, 67), SAME_IMAGE: (245, 176, 20)}
INK, PAPER, IMAGE_INK = (20, 20, 20), (255, 255, 255), (170, 110, 0)

CELL, MARGIN, LABEL_LENGTH = 16, 16, 24


@dataclass(frozen=True)
class Masks:
    """The attention masks of S tokens.

    ``images`` is the number of each token's image, int64 [S], −1 for text. ``layers`` says for each kind of layer, by
    its title, which keys (columns) a query (row) attends to, bool [S, S].
    """

    labels: list[str]
    images: NDArray[np.int64]
    layers: dict[str, NDArray[np.bool_]]

    def cells(self, title: str) -> NDArray[np.int64]:
        """HIDDEN, SEEN, ITSELF or SAME_IMAGE for each query and key: int64 [S, S]."""
        together = (self.images[:, None] == self.images) & (self.images >= 0)
        kinds = np.where(together, SAME_IMAGE, np.where(np.eye(len(self.images), dtype=bool), ITSELF, SEEN))
        return np.where(self.layers[title], kinds, HIDDEN)


def masks_of(
    text: str,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    window: int | None = None,
    tokens_per_image: int | None = None,
) -> Masks:
    """The masks of ``text``, fed in one call. Each ``<image>`` in it stands for an image.

    ``window`` and ``tokens_per_image`` replace the model's own, which are too large for most texts and screens. Raises
    BadInput for an image in a text-only model's text, and for a text of more than MOST_TOKENS tokens.
    """
    import torch

    from gemma3.model import attention_mask, image_numbers, same_image

    vision = config.vision
    per_image = None if vision is None else tokens_per_image or vision.tokens_per_image
    window = window or config.sliding_window
    ids = encode_prompt(tokenizer, place_images(text, [Image()] * text.count(IMAGE_MARKER)), per_image)
    if len(ids) > MOST_TOKENS:
        raise BadInput(
            f"the text is {len(ids)} tokens, more than the {MOST_TOKENS} that can be drawn; shorten it, "
            "or draw its images with fewer --tokens-per-image"
        )
    images = image_numbers(torch.tensor([ids]) == (-1 if vision is None else vision.image_token_id))
    positions = torch.arange(len(ids))
    together = same_image(images, positions)
    windows = {SLIDING: (f"sliding-window layers, window {window}", window), FULL: ("full-attention layers", None)}
    titled = [windows[kind] for kind in windows if any(spec.kind == kind for spec in config.layers)]
    return Masks(
        labels=_labels(ids, images[0].tolist(), tokenizer),
        images=images[0].numpy(),
        layers={title: attention_mask(positions, positions, width, together)[0].numpy() for title, width in titled},
    )


def draw(masks: Masks) -> Picture.Image:
    """An image of the masks side by side: a row for each query, a column for each key, labels, and a legend."""
    font = ImageFont.load_default(12)
    labels = [f"{label}  {index}" for index, label in enumerate(masks.labels)]
    band = max(round(font.getlength(label)) for label in labels) + 8
    grid = len(labels) * CELL
    wide = max(grid, *(round(font.getlength(title)) for title in masks.layers))
    legend = "    ".join(MEANING.values())
    left, top = MARGIN + band, 2 * MARGIN + band + CELL
    width = max(
        left + len(masks.layers) * (wide + MARGIN), round(font.getlength(legend)) + (2 + len(MEANING)) * 2 * CELL
    )
    picture = Picture.new("RGB", (width, top + grid + 2 * MARGIN + CELL), PAPER)
    pen = ImageDraw.Draw(picture)
    inks = [INK if number < 0 else IMAGE_INK for number in masks.images]
    for row, (label, ink) in enumerate(zip(labels, inks, strict=True)):
        pen.text((left - 4, top + (row + 0.5) * CELL), label, ink, font, anchor="rm")
    for number, title in enumerate(masks.layers):
        x = left + number * (wide + MARGIN)
        pen.text((x, MARGIN), title, INK, font)
        for column, (label, ink) in enumerate(zip(labels, inks, strict=True)):
            upright = Picture.new("RGB", (band, CELL), PAPER)
            ImageDraw.Draw(upright).text((4, CELL / 2), label, ink, font, anchor="lm")
            picture.paste(upright.transpose(Picture.Transpose.ROTATE_90), (x + column * CELL, top - band))
        picture.paste(_grid(masks.cells(title)), (x, top))
    x, y = MARGIN, top + grid + MARGIN
    for kind, meaning in MEANING.items():
        picture.paste(COLOURS[kind], (x, y, x + CELL, y + CELL))
        pen.text((x + CELL + 4, y + CELL / 2), meaning, INK, font, anchor="lm")
        x += round(font.getlength(meaning)) + 3 * CELL
    return picture


def save(masks: Masks, path: Path) -> None:
    """Draw the masks to a PNG, which is replaced if it exists. Raises BadInput when it cannot be written."""
    try:
        draw(masks).save(path, "PNG")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror}); give another place") from None


def show(masks: Masks, colour: bool, columns: int | None = None) -> str:
    """The masks as text, one below the other, or one line that says that they do not fit.

    ``columns`` is the width of the terminal (None: no limit). If there is room, a cell is two columns wide, else one.
    """
    count, margin = len(masks.labels), max(map(len, masks.labels)) + len(f"  {len(masks.labels)} ")
    gap = " " if columns is None or margin + 2 * count <= columns else ""
    if not gap and columns is not None and margin + count > columns:
        return f"{count} tokens are too many for a terminal of {columns} columns"
    painted = {kind: _paint(glyph, kind, colour) for kind, glyph in GLYPHS.items()}
    lines = ["   ".join(f"{painted[kind]} {meaning}" for kind, meaning in MEANING.items())]
    digits = len(str(count - 1))
    for title in masks.layers:
        lines += ["", title]
        lines += [" " * margin + gap.join(f"{i:{digits}}"[place] for i in range(count)) for place in range(digits)]
        for index, (label, row) in enumerate(zip(masks.labels, masks.cells(title), strict=True)):
            lines.append(f"{label}  {index}".rjust(margin - 1) + " " + gap.join(painted[kind] for kind in row.tolist()))
    return "\n".join(lines)


def _paint(glyph: str, kind: int, colour: bool) -> str:
    return f"{ANSI[kind]}{glyph}{RESET}" if colour and kind in ANSI else glyph


def _grid(cells: NDArray[np.int64]) -> Picture.Image:
    """Squares of CELL pixels with white lines between them."""
    colours = np.array([COLOURS[kind] for kind in sorted(COLOURS)], np.uint8)[cells]
    squares = colours.repeat(CELL, axis=0).repeat(CELL, axis=1)
    squares[CELL - 1 :: CELL] = squares[:, CELL - 1 :: CELL] = PAPER
    return Picture.fromarray(squares)


def _labels(ids: Sequence[int], images: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """A label for each token, in Latin-1, because the font has these characters."""
    names = {tokenizer.special_id(name): name for name in (START_OF_IMAGE, END_OF_IMAGE)} | {tokenizer.bos_id: "<bos>"}
    labels = []
    for token, image in zip(ids, images, strict=True):
        piece = tokenizer.token_bytes(token)
        try:
            text = repr(piece.decode())
        except UnicodeDecodeError:  # part of a character
            text = repr(piece)[1:]
        plain = text.encode("latin-1", "backslashreplace").decode("latin-1")
        label = f"image {image + 1}" if image >= 0 else names.get(token, plain)
        labels.append(label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1] + "…")
    return labels
