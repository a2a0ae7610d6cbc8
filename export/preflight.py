"""What an export will need, said before it begins: time, memory and disk. What cannot fit is refused.

The figures follow from the sizes of the weights. What sets the peak of memory:

* the libraries (BASE), and for a target its compiler and the graph of each layer;
* of a small model, its tokenizer;
* reading the largest matrix, nearly always the embedding table: its stored values, mapped, and a byte a code;
* how often a target holds its file, and the codes of the largest matrix, while it writes the file or reads it back;
* running the file for the proof: its mapped bytes, the kernels' packed copy of the matrices, and the caches.

A target's record has its share of these (``export.target.Cost``).
docs/bundle.md compares them with measured peaks. An estimate is meant to be within a third, so only what is TOO_MUCH
over the room is refused.
"""

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from export.target import Target
from gemma3.cache import CacheLayout
from gemma3.checkpoint import weight_shapes
from gemma3.config import ModelConfig
from gemma3.errors import DoesNotFit, counted
from gemma3.host.memory import Room, memory_room
from gemma3.names import EMBEDDING, HEAD, VISION_TOWER, head_of
from quant.integers import IntegerWeight
from quant.methods import form_in
from quant.recipe import SCHEMES, Recipe
from quant.source import QuantizedCheckpoint, Source
from quant.weights import Weight, ideal_bytes, shape_of

log = logging.getLogger(__name__)

# An upper bound on the proof, the manifest and the tokenizer together.
SMALL_FILES_BYTES = 64 << 20
BASE = 800 << 20  # a process with torch
TOKEN_BYTES = 2900  # of a process that compares and writes the tokenizer's files, for each token of the vocabulary
START_SECONDS, TOKEN_SECONDS = 8.0, 7e-5
SEARCH_SECONDS = 1e-8  # to choose the scale of a 4-bit weight (quant.methods.mse), once
# The proof feeds the text model a sequence of about so many windows, at most the context, and compares so many of its
# logits (or all of a short one's). It feeds the vision model so many images.
WINDOWS, COMPARED, IMAGES = 2.5, 300, 2
TOO_MUCH = 1.25


@dataclass(frozen=True)
class Need:
    """What an export needs: seconds on two cores of a laptop, and bytes of memory and of disk."""

    seconds: float
    memory: int
    disk: int

    def __str__(self) -> str:
        minutes = counted(max(1, round(self.seconds / 60)), "minute")
        return f"about {minutes} on two cores, {self.memory / 1e9:.1f} GB of memory, {self.disk / 1e9:.1f} GB of disk"


def preflight(
    source: Source, targets: Sequence[Target], recipe: Recipe, layouts: Mapping[str, CacheLayout], folder: Path
) -> Need:
    """Log what the export of ``source`` into a new directory in ``folder`` needs. Reads no weights.

    Raises DoesNotFit when the disk has no room for it, or the memory, swap included, is far from enough.
    """
    need = need_of(source, targets, recipe, layouts)
    log.info("this takes %s", need)
    check_disk(folder, need.disk)
    check_memory(need.memory, memory_room())
    return need


def check_disk(folder: Path, needed: int) -> None:
    """Raises DoesNotFit when the disk of ``folder`` has no room for a bundle of so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DoesNotFit(
            f"{folder}: {free >> 20} MiB free, the bundle needs {needed >> 20} MiB; make room or choose another -o"
        )


def check_memory(needed: int, room: Room | None) -> None:
    """Raises DoesNotFit when ``needed`` bytes are TOO_MUCH for ``room``; says when it will swap."""
    if room is None or needed <= room.memory:
        return
    figures = f"about {needed / 1e9:.1f} GB of memory are needed, {room.memory / 1e9:.1f} GB are free"
    swap = f" and {room.swap / 1e9:.1f} GB of swap" if room.swap else ""
    if needed > TOO_MUCH * (room.memory + room.swap):
        raise DoesNotFit(f"{figures}{swap}; end other programs, export one --format at a time, or use a larger machine")
    log.warning("%s%s: it may %s", figures, swap, "swap and take longer" if room.swap else "not be enough")


def need_of(source: Source, targets: Sequence[Target], recipe: Recipe, layouts: Mapping[str, CacheLayout]) -> Need:
    """The estimate that the module's docstring describes."""
    config, forms = source.config, forms_in(source, recipe)
    name, largest = max(forms.items(), key=lambda item: _count(item[1]))
    table = _count(largest)
    reading = table if isinstance(source, QuantizedCheckpoint) else table * (1 + source.tensor(name).element_size())
    trillions = fed(config, forms, max(layout.context for layout in layouts.values())) / 1e12
    layers = config.num_layers + (config.vision.num_hidden_layers if config.vision else 0)
    seconds = START_SECONDS + TOKEN_SECONDS * config.vocab_size
    searched = [
        form
        for form in forms.values()
        if isinstance(form, IntegerWeight) and form.bits == 4 and not isinstance(source, QuantizedCheckpoint)
    ]
    seconds += SEARCH_SECONDS * sum(map(_count, searched))
    base = BASE + 2 * sum(form.scales.numel() for form in searched)  # the chosen scales are kept, in bfloat16
    memory, disk = base + TOKEN_BYTES * config.vocab_size, SMALL_FILES_BYTES
    for target in targets:
        cost, size = (
            target.cost,
            bundle_bytes(config, target, {name: _held(form, target) for name, form in forms.items()}),
        )
        writing = cost.base + cost.layer_bytes * layers + reading + int(cost.file * size + cost.tables * table)
        running = int(cost.running * size) + layouts[target.name].total_bytes
        memory = max(memory, base + max(writing, running))
        seconds += cost.layer_seconds * layers + cost.trillion_seconds * trillions
        disk += size
    return Need(seconds, memory, disk)


def fed(config: ModelConfig, forms: Mapping[str, Weight], context: int) -> float:
    """How many multiplications one pass of the proof takes: each weight, by the positions (patches) that it meets."""
    patches = 0 if config.vision is None else IMAGES * config.vision.patches_per_side**2
    text = min(context, WINDOWS * config.sliding_window)

    def positions(name: str) -> float:
        if name in (EMBEDDING, HEAD):
            return min(text, COMPARED) if name == head_of(config) else 0
        return patches if name.startswith(VISION_TOWER) else text

    return sum(_count(form) * positions(name) for name, form in forms.items())


def forms_in(source: Source, recipe: Recipe) -> Mapping[str, Weight]:
    """The form of each weight of ``source`` in ``recipe``, by name, without reading any."""
    if isinstance(source, QuantizedCheckpoint):
        return source.weights.forms
    shapes = weight_shapes(source.config)
    return {name: form_in(SCHEMES[recipe.rule(name).scheme], shapes[name]) for name in source.names}


def bundle_bytes(config: ModelConfig, target: Target, forms: Mapping[str, Weight]) -> int:
    """The bytes of the weights in the files of ``target``, as often as they hold them."""
    return ideal_bytes(forms.values()) + target.repeated_bytes(config, forms)


def _held(form: Weight, target: Target) -> Weight:
    """The form that the file of ``target`` holds: that of a stand-in, if ``form`` gets one."""
    scheme = None if isinstance(form, Tensor) else target.stand_ins.get(form.kind)
    return form if scheme is None else form_in(SCHEMES[scheme], tuple(shape_of(form)))


def _count(form: Weight) -> int:
    return math.prod(shape_of(form))
