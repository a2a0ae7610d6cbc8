"""What the multimodal demo checkpoint learns from: images drawn by code, and questions about them.

Everything is deterministic for a given seed and Pillow version. Evaluation data are held out by composition: a shape or
word in a colour at a place, or a number of shapes in a colour. One composition in six never occurs in training, where
any two of its three parts do occur together. Every image for evaluation shows a held-out composition.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 150, 50),
    "blue": (40, 70, 220),
    "yellow": (240, 205, 20),
    "orange": (245, 130, 20),
    "purple": (135, 40, 160),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
WORDS = ("cat", "dog", "sun", "tree", "fish", "bird", "milk", "snow", "fire", "door", "lamp", "book")
PLACES = ("left", "right", "top", "bottom")
NUMBERS = ("one", "two", "three", "four", "five")
BACKGROUNDS = ((255, 255, 255), (250, 245, 225), (225, 225, 225), (215, 230, 245))

AT = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
CENTRES = {"left": (0.24, 0.5), "right": (0.76, 0.5), "top": (0.5, 0.22), "bottom": (0.5, 0.78)}

SQUARE_SIDES = (160, 224, 288)
WIDE_HEIGHTS = (256, 288, 320)

# A name, colour and place, or a number, shape and colour.
Composition = tuple[str, str, str]
HELD_OUT_EVERY = 6


def is_held_out(composition: Composition) -> bool:
    """Whether ``composition`` is for evaluation only."""
    counted = composition[0] in NUMBERS
    parts = (NUMBERS, SHAPES, tuple(COLOURS)) if counted else ((*SHAPES, *WORDS), tuple(COLOURS), PLACES)
    return sum(names.index(name) for names, name in zip(parts, composition, strict=True)) % HELD_OUT_EVERY == 0


@dataclass(frozen=True)
class Item:
    """A shape ``size`` pixels wide and high, or a word in a font of that size."""

    name: str
    colour: str
    centre: tuple[float, float]
    size: float

    @property
    def is_word(self) -> bool:
        return self.name in WORDS

    @property
    def phrase(self) -> str:
        return f"the word {self.name}" if self.is_word else f"{article(self.colour)} {self.colour} {self.name}"

    @property
    def box(self) -> Box:
        """The rectangle around the shape, or around the word's ink."""
        width, height = self.size, self.size
        if self.is_word:
            left, top, right, bottom = self.font.getbbox(self.name, mode="1")
            width, height = right - left, bottom - top
        x, y = self.centre
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2

    @property
    def font(self) -> ImageFont.FreeTypeFont:
        return _font(round(self.size))


@dataclass(frozen=True)
class Turn:
    category: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """An image, what it shows, and questions about it: first those about a held-out composition."""

    kind: str
    image: Image.Image
    items: tuple[Item, ...]
    turns: tuple[Turn, ...]

    @property
    def wide(self) -> bool:
        return self.image.width > 2 * self.image.height

    @property
    def compositions(self) -> set[Composition]:
        """What the image shows: a number of equal shapes, or each item with its place."""
        if self.kind == "count":
            return {(NUMBERS[len(self.items) - 1], self.items[0].name, self.items[0].colour)}
        return {(item.name, item.colour, self.place(item)) for item in self.items}

    def place(self, item: Item) -> str:
        """The side of the image that ``item`` is nearest to; in a wide image only left or right."""
        x, y = (value / side - 0.5 for value, side in zip(item.centre, self.image.size, strict=True))
        if self.wide or abs(x) > abs(y):
            return "left" if x < 0 else "right"
        return "top" if y < 0 else "bottom"


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


# ---- drawing -------------------------------------------------------------------------------------------------

STAR = [
    (0.5 + radius * math.sin(index * math.pi / 5), 0.53 - radius * math.cos(index * math.pi / 5))
    for index, radius in enumerate([0.53, 0.22] * 5)
]
ARMS: list[tuple[float, float]] = [(0.34, 0), (0.66, 0), (0.66, 0.34), (1, 0.34), (1, 0.66), (0.66, 0.66)]
OUTLINES: dict[str, list[tuple[float, float]]] = {  # in the unit square
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "star": STAR,
    "cross": [*ARMS, *((1 - x, 1 - y) for x, y in ARMS)],
}


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def picture(size: tuple[int, int], background: tuple[int, int, int], items: tuple[Item, ...]) -> Image.Image:
    """An image of ``items``, without antialiasing: with only a few colours, its palette PNG is small and exact."""
    image = Image.new("RGB", size, background)
    pen = ImageDraw.Draw(image)
    pen.fontmode = "1"
    for item in items:
        _draw(pen, item)
    return image


def _draw(pen: ImageDraw.ImageDraw, item: Item) -> None:
    box, colour = item.box, COLOURS[item.colour]
    if item.is_word:
        left, top, _, _ = item.font.getbbox(item.name, mode="1")
        pen.text((round(box[0] - left), round(box[1] - top)), item.name, colour, font=item.font)
    elif item.name == "circle":
        pen.ellipse(box, colour)
    elif item.name == "square":
        pen.rectangle(box, colour)
    elif item.name == "ring":
        pen.ellipse(box, outline=colour, width=max(2, round(0.2 * item.size)))
    else:
        left, top, _, _ = box
        pen.polygon([(left + x * item.size, top + y * item.size) for x, y in OUTLINES[item.name]], colour)


# ---- scenes --------------------------------------------------------------------------------------------------

Kind = Literal["single", "pair", "count", "word", "wide"]
KINDS: tuple[Kind, ...] = ("single", "pair", "count", "word", "wide")


class Scenes:
    """An endless stream of images of one kind, determined by a seed: for training, or of held-out compositions."""

    def __init__(self, kind: Kind, seed: int, held_out: bool = False) -> None:
        self.kind, self.held_out = kind, held_out
        self.rng = random.Random(f"{kind} {seed} {held_out}")
        makers: dict[Kind, Callable[[], Scene]] = {
            "single": self._single,
            "pair": self._pair,
            "count": self._count,
            "word": self._word,
            "wide": self._wide,
        }
        self.make = makers[kind]

    def __iter__(self) -> Iterator[Scene]:
        while True:
            yield self.make()

    # -- parts of a scene

    def _thing(
        self, names: Sequence[str], place: str, held_out: bool | None = None, no_colour: str = ""
    ) -> tuple[str, str]:
        """A random (name, colour) for an item at ``place``.

        ``held_out`` None means that of the stream, and ``no_colour`` is not chosen.
        """
        wanted = self.held_out if held_out is None else held_out
        pairs = [
            (name, colour)
            for name in names
            for colour in COLOURS
            if is_held_out((name, colour, place)) == wanted and colour != no_colour
        ]
        return self.rng.choice(pairs)

    def _jitter(self, amount: float) -> float:
        return self.rng.uniform(-amount, amount)

    def _at(self, place: str, side: int) -> tuple[float, float]:
        x, y = CENTRES[place]
        across = 0.18 if x == 0.5 else 0.04
        along = 0.18 if y == 0.5 else 0.04
        return (x + self._jitter(across)) * side, (y + self._jitter(along)) * side

    def _scene(self, size: tuple[int, int], items: Sequence[Item], turns: Sequence[Turn]) -> Scene:
        return Scene(self.kind, picture(size, self.rng.choice(BACKGROUNDS), tuple(items)), tuple(items), tuple(turns))

    def _ask(self, category: str, answer: str, *phrasings: str) -> Turn:
        return Turn(category, self.rng.choice(phrasings), answer)

    def _describe(self, text: str) -> Turn:
        prompts = ("Describe the image.", "What is in the image?", "What do you see?", "Describe this picture.")
        return self._ask("describe", sentence(text), *prompts)

    def _ask_colour(self, name: str, colour: str) -> Turn:
        prompts = ("What colour is the {}?", "Which colour does the {} have?", "What is the colour of the {}?")
        return self._ask("colour", colour, *(prompt.format(name) for prompt in prompts))

    def _ask_shape(self, item: Item) -> Turn:
        colour = item.colour
        return self._ask(
            "shape",
            item.name,
            f"Which shape is {colour}?",
            f"What is the {colour} shape?",
            f"What is {colour} in the image?",
        )

    def _ask_place(self, name: str, place: str) -> Turn:
        return self._ask(
            "place",
            AT[place],
            f"Where is the {name}?",
            f"On which side is the {name}?",
            f"Where do you see the {name}?",
        )

    # -- the kinds of images

    def _single(self) -> Scene:
        side, place = self.rng.choice(SQUARE_SIDES), self.rng.choice(PLACES)
        shape, colour = self._thing(SHAPES, place)
        item = Item(shape, colour, self._at(place, side), side * self.rng.uniform(0.18, 0.36))
        which = self._ask("shape", shape, "Which shape is this?", "What shape is in the image?", "Name the shape.")
        turns = [
            self._ask_colour(shape, colour),
            which,
            self._ask_place(shape, place),
            self._describe(f"{item.phrase} {AT[place]}"),
        ]
        return self._scene((side, side), [item], turns)

    def _pair(self) -> Scene:
        """Two shapes of different kinds and colours, side by side or one above the other.

        Where a composition is held out, it is that of the first shape, which may be on any side.
        """
        side = self.rng.choice(SQUARE_SIDES)
        places = self.rng.choice((("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top")))
        shape, colour = self._thing(SHAPES, places[0])
        others = [name for name in SHAPES if name != shape]
        other_shape, other_colour = self._thing(others, places[1], False, colour)
        items = [
            Item(name, paint, self._at(place, side), side * self.rng.uniform(0.18, 0.36))
            for name, paint, place in zip((shape, other_shape), (colour, other_colour), places, strict=True)
        ]
        relation = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}[places[0]]
        item, other = items
        where = self._ask(
            "relation",
            item.phrase,
            f"What is {relation} the {other.name}?",
            f"Which shape is {relation} the {other.name}?",
        )
        first, second = (item, other) if places[0] in ("left", "top") else (other, item)
        between = "left of" if places[0] in ("left", "right") else "above"
        turns = [
            self._ask_colour(shape, colour),
            self._ask_shape(item),
            self._ask_place(item.name, places[0]),
            where,
            self._describe(f"{first.phrase} {between} {second.phrase}"),
            self._ask_colour(other_shape, other_colour),
        ]
        return self._scene((side, side), items, turns)

    def _count(self) -> Scene:
        """Two to five equal shapes, in different cells of a 3 × 3 grid."""
        side = self.rng.choice(SQUARE_SIDES)
        compositions = product(NUMBERS[1:], SHAPES, COLOURS)
        named, shape, colour = self.rng.choice([c for c in compositions if is_held_out(c) == self.held_out])
        number = NUMBERS.index(named) + 1
        size = side * self.rng.uniform(0.16, 0.24)
        cells = self.rng.sample(range(9), number)
        centres = [
            (cell % 3 / 3 + 1 / 6 + self._jitter(0.03), cell // 3 / 3 + 1 / 6 + self._jitter(0.03)) for cell in cells
        ]
        items = [Item(shape, colour, (x * side, y * side), size) for x, y in centres]
        many = plural(shape)
        how_many = self._ask(
            "count",
            named,
            f"How many {many} are there?",
            f"How many {many} do you see?",
            f"Count the {many}.",
            "How many shapes are there?",
        )
        colours = self._ask("colour", colour, f"What colour are the {many}?", f"Which colour do the {many} have?")
        return self._scene((side, side), items, [how_many, colours, self._describe(f"{named} {colour} {many}")])

    def _word(self) -> Scene:
        side, place = self.rng.choice(SQUARE_SIDES), self.rng.choice(PLACES)
        word, colour = self._thing(WORDS, place)
        item = Item(word, colour, self._at(place, side), side * self.rng.uniform(0.15, 0.19))
        item = replace(item, centre=_inside(item, side))
        read = self._ask(
            "word", word, "Read the word.", "What does it say?", "Which word is in the image?", "What is written there?"
        )
        turns = [
            read,
            self._ask_place("word", place),
            self._describe(f"{item.phrase} {AT[place]}"),
            self._ask_colour("word", item.colour),
        ]
        return self._scene((side, side), [item], turns)

    def _wide(self) -> Scene:
        """An image three or four times as wide as high, with a small word or shape in each half."""
        height, parts = self.rng.choice(WIDE_HEIGHTS), self.rng.choice((3, 4))
        place = self.rng.choice(("left", "right"))
        items = [self._detail(place, self.held_out), self._detail(opposite(place), False)]
        # Names and colours differ, so that every question has one answer.
        while items[0].name == items[1].name or items[0].colour == items[1].colour:
            items[1] = self._detail(opposite(place), False)
        halves = {"left": range(parts // 2), "right": range((parts + 1) // 2, parts)}
        placed = []
        for item, side in zip(items, (place, opposite(place)), strict=True):
            size = height * self.rng.uniform(0.14, 0.19)
            left, top, right, bottom = replace(item, size=size).box
            room = 0.48 - (right - left) / height / 2, 0.48 - (bottom - top) / height / 2
            part = self.rng.choice(halves[side])
            centre = ((part + 0.5 + self._jitter(room[0])) * height, (0.5 + self._jitter(room[1])) * height)
            placed.append(replace(item, centre=centre, size=size))
        turns = [
            turn
            for item, side in zip(placed, (place, opposite(place)), strict=True)
            for turn in self._about(item, side)
        ]
        by_side = placed if place == "left" else placed[::-1]
        text = " and ".join(f"{item.phrase} {AT[side]}" for item, side in zip(by_side, PLACES[:2], strict=True))
        return self._scene((parts * height, height), placed, [*turns, self._describe(text)])

    def _detail(self, place: str, held_out: bool) -> Item:
        name, colour = self._thing(WORDS if self.rng.random() < 0.5 else SHAPES, place, held_out)
        return Item(name, colour, (0, 0), 0)

    def _about(self, item: Item, side: str) -> list[Turn]:
        kind = "word" if item.is_word else "shape"
        what = self._ask(kind, item.name, f"Which {kind} is {AT[side]}?", f"What {kind} is {AT[side]}?")
        if item.is_word:
            return [what]
        return [what, self._ask_colour(item.name, item.colour)]


def _inside(item: Item, side: int) -> tuple[float, float]:
    """The centre nearest to the item's own at which the whole item is within a square of ``side`` pixels."""
    left, top, right, bottom = item.box
    half = (right - left) / 2 + 1, (bottom - top) / 2 + 1
    x, y = (min(max(value, margin), side - margin) for value, margin in zip(item.centre, half, strict=True))
    return x, y


def opposite(place: str) -> str:
    return "right" if place == "left" else "left"


def plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


# ---- what each soft token should tell ---------------------------------------------------------------------------

# Name, colour, side of the image, and the number of shapes in the image; "" where there is nothing to tell.
Label = tuple[str, str, str, str]
LABELS: tuple[Sequence[str], ...] = ((*SHAPES, *WORDS), tuple(COLOURS), PLACES, NUMBERS)
NOTHING: Label = ("", "", "", "")


def view_labels(scene: Scene, view: Box, grid: int) -> list[Label]:
    """What is in each cell of the part ``view`` of an image, which has grid × grid cells, row by row.

    A shape belongs to the cell of its centre, and a word to every cell that the middle line of its ink crosses.
    """
    left, top, right, bottom = view
    shapes = sum(not item.is_word for item in scene.items)
    labels = [NOTHING] * (grid * grid)
    for item in scene.items:
        x, y = item.centre
        if not (left <= x < right and top <= y < bottom):
            continue
        row = int((y - top) / (bottom - top) * grid)
        ends = (item.box[0], item.box[2]) if item.is_word else (x, x)
        first, last = (int((end - left) / (right - left) * grid) for end in ends)
        # A crop shows neither its own place in the image nor everything else in the image.
        about_all = ("", "")
        if view == (0, 0, *scene.image.size):
            about_all = scene.place(item), NUMBERS[shapes - 1] if shapes else ""
        for column in range(max(0, first), min(grid - 1, last) + 1):
            labels[row * grid + column] = (item.name, item.colour, *about_all)
    return labels


# ---- files -----------------------------------------------------------------------------------------------------

EVALUATION: dict[Kind, int] = {"single": 20, "pair": 30, "count": 25, "word": 30, "wide": 50}
TRAINING_SAMPLE: dict[Kind, int] = {"single": 40, "pair": 90, "count": 70, "word": 90, "wide": 70}


def category(scene: Scene, turn: Turn) -> str:
    return f"wide {turn.category}" if scene.wide else turn.category


def save(image: Image.Image, path: Path) -> None:
    """Save a palette PNG with exactly the same pixels."""
    exact = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=len(image.getcolors() or ()))
    assert exact.convert("RGB").tobytes() == image.tobytes()
    exact.save(path, optimize=True)


def write_questions(out: Path, seed: int) -> None:
    """Write ``questions_images.jsonl`` and its images: held-out compositions, one question per line."""
    lines = []
    for name, scene in _written(EVALUATION, out, "images", seed, held_out=True):
        for turn in scene.turns:
            data = {"category": category(scene, turn), "images": [name], "prompt": turn.prompt, "answer": turn.answer}
            lines.append(json.dumps(data))
    (out / "questions_images.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_training_sample(out: Path, seed: int) -> None:
    """Write ``qat_images.jsonl`` and its images: training compositions, one conversation about each image."""
    lines = []
    for name, scene in _written(TRAINING_SAMPLE, out, "qat_images", seed, held_out=False):
        messages: list[dict[str, Any]] = []
        for turn in scene.turns:
            text = {"type": "text", "text": turn.prompt}
            content = [text] if messages else [{"type": "image", "image": name}, text]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
        lines.append(json.dumps({"messages": messages}))
    random.Random(seed).shuffle(lines)
    (out / "qat_images.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _written(
    counts: Mapping[Kind, int], out: Path, folder: str, seed: int, held_out: bool
) -> Iterator[tuple[str, Scene]]:
    """Save images of each kind in ``out / folder``. Yields each path, relative to ``out``, and its scene."""
    (out / folder).mkdir(exist_ok=True)
    for kind, count in counts.items():
        for number, scene in enumerate(islice(Scenes(kind, seed, held_out), count)):
            name = f"{folder}/{kind}-{number:02}.png"
            save(scene.image, out / name)
            yield name, scene
