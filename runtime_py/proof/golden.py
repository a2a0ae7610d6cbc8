"""Golden vectors: the logits of the quantized eager model at positions of a fixed sequence.

For a vocabulary of up to 8192 every logit is kept. For a larger one, a position keeps its ``TOP`` largest logits, a
random subset of columns (the same at every position) and the log-sum-exp over all columns, which is enough for an
unbiased estimate of the KL divergence (see ``ReferenceLogits.compare``). For a multimodal model the images of the
sequence and their soft tokens are kept too. With the file anyone can repeat the proof without torch and without the
checkpoint. docs/bundle.md describes its arrays.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from export.manifest import Artifact, Manifest
from gemma3.errors import VerificationFailed
from runtime_py.sessions.protocol import Logits, SoftTokens

FULL_VOCABULARY = 8192
TOP, COLUMNS, SEED = 512, 4096, 0


@dataclass(frozen=True)
class Difference:
    """How the logits of a file differ from the reference's at one position. ``sum_…`` are over the compared logits."""

    position: int
    max_abs: float
    sum_abs: float
    sum_squares: float
    reference_squares: float
    count: int  # number of compared logits
    kl: float  # in nats: KL(reference ‖ file)
    same_top: bool


@dataclass(frozen=True)
class Row:
    """The reference's logits at one position: M columns of the vocabulary that all rows have, and K of its own."""

    position: int
    columns: NDArray[np.int32]  # [M]
    values: NDArray[np.float32]  # [M]
    top_columns: NDArray[np.int32]  # [K]
    top_values: NDArray[np.float32]  # [K]
    log_sum_exp: float  # over the whole vocabulary
    argmax: int

    def compare(self, logits: Logits) -> Difference:
        """Compare the ``logits`` [V] of a file at this position.

        KL(p‖q) = Σ p log(p/q) is summed as Σ [p log(p/q) − p + q], which is the same because p and q sum to 1. All its
        terms are ≥ 0, so the random columns estimate the sum over the omitted columns with little variance.
        """
        random = ~np.isin(self.columns, self.top_columns)
        columns = np.concatenate((self.top_columns, self.columns[random]))
        expected = np.concatenate((self.top_values, self.values[random])).astype(np.float64)
        delta = logits[columns].astype(np.float64) - expected
        log_p = expected - self.log_sum_exp
        log_q = expected + delta - log_sum_exp(logits)
        # No term is negative but by float error, which logits that are nearly equal would show.
        terms = np.maximum(np.exp(log_p) * (log_p - log_q) - np.exp(log_p) + np.exp(log_q), 0.0)
        own, stands_for = len(self.top_columns), np.ones(len(columns))
        if len(columns) > own:
            stands_for[own:] = (len(logits) - own) / (len(columns) - own)
        return Difference(
            position=self.position,
            max_abs=float(np.abs(delta).max()),
            sum_abs=float(np.abs(delta).sum()),
            sum_squares=float((delta**2).sum()),
            reference_squares=float((expected**2).sum()),
            count=len(columns),
            kl=float(terms @ stands_for),
            same_top=bool(np.argmax(logits) == self.argmax),
        )


@dataclass(frozen=True)
class ReferenceLogits:
    """The reference's logits at P positions of ``ids``, and for a multimodal model its soft tokens.

    Each position has a row with the same M columns of the vocabulary and K more columns of its own (K may be 0).
    """

    ids: NDArray[np.int32]  # [T]
    positions: NDArray[np.int32]  # [P]
    columns: NDArray[np.int32]  # [M]
    values: NDArray[np.float32]  # [P, M] logits of the columns
    top_columns: NDArray[np.int32]  # [P, K]
    top_values: NDArray[np.float32]  # [P, K]
    log_sum_exp: NDArray[np.float32]  # [P], over the whole vocabulary
    argmax: NDArray[np.int32]  # [P]
    # What limits are derived from, at the positions where it was measured. For a reference with float
    # activations the first is measured and the other two are 0; for one that rounds them it is the reverse. Of the
    # references of one artifact only the first has noise of its own; the others have a copy (references.py).
    float_error: NDArray[np.float32]  # how much the order of additions matters to a logit (references.py)
    noise_kl: NDArray[np.float32]  # KL to the same model after its inputs are changed by one unit in the last place
    cost_kl: NDArray[np.float32]  # KL from the same model with float activations: what rounding them costs
    # For a multimodal model; empty otherwise.
    images: NDArray[np.uint8]  # [I, S, S, 3]
    soft_tokens: NDArray[np.float32]  # [I, T, E]
    # The relative RMS change of the soft tokens in the same comparisons: float error or changed inputs, and the cost.
    soft_noise: NDArray[np.float32]  # [L]
    soft_cost: NDArray[np.float32]  # [I]

    def at(self, positions: Iterable[int]) -> "ReferenceLogits":
        """The reference with only the rows at ``positions``. What limits are derived from is kept whole."""
        rows = np.flatnonzero(np.isin(self.positions, list(positions)))
        return replace(
            self,
            positions=self.positions[rows],
            values=self.values[rows],
            top_columns=self.top_columns[rows],
            top_values=self.top_values[rows],
            log_sum_exp=self.log_sum_exp[rows],
            argmax=self.argmax[rows],
        )

    def only_columns(self) -> "ReferenceLogits":
        """The reference as if its ``columns`` were the whole vocabulary: for a file that computes only their logits."""
        nothing = self.top_values[:, :0]
        return replace(
            self,
            columns=np.arange(len(self.columns), dtype=np.int32),
            top_columns=nothing.astype(np.int32),
            top_values=nothing,
            log_sum_exp=np.asarray([log_sum_exp(row) for row in self.values], np.float32),
            argmax=self.values.argmax(axis=1).astype(np.int32),
        )

    @property
    def gaps(self) -> NDArray[np.float32]:
        """float32 [P]: how far the largest logit is above the second largest."""
        rows = self.top_values if self.top_values.shape[1] > 1 else self.values
        largest = np.partition(rows, -2, axis=1)[:, -2:] if rows.shape[1] > 1 else np.zeros((len(rows), 2), np.float32)
        return np.asarray(largest[:, 1] - largest[:, 0], np.float32)

    def compare(self, position: int, logits: Logits) -> Difference | None:
        """Compare the ``logits`` [V] of a file at ``position``. None if the reference has no row for it."""
        found = np.flatnonzero(self.positions == position)
        if len(found) == 0:
            return None
        at = found[0]
        return Row(
            position,
            self.columns,
            self.values[at],
            self.top_columns[at],
            self.top_values[at],
            float(self.log_sum_exp[at]),
            int(self.argmax[at]),
        ).compare(logits)


def relative_rms(seen: SoftTokens, expected: SoftTokens) -> float:
    """The root mean square of the difference, divided by the root mean square of ``expected``.

    Infinite if only ``expected`` is zero.
    """
    squares = float(((seen.astype(np.float64) - expected) ** 2).sum())
    size = float((expected.astype(np.float64) ** 2).sum())
    return math.sqrt(squares / size) if size else math.inf if squares else 0.0


def log_sum_exp(logits: Logits) -> float:
    """log Σ exp(logit), in float64."""
    wide = logits.astype(np.float64)
    peak = float(wide.max())
    return peak + float(np.log(np.exp(wide - peak).sum()))


class Recorder:
    """Collects ``ReferenceLogits`` row by row, so that the logits of a large vocabulary are never all in memory."""

    def __init__(self, ids: Iterable[int], vocab_size: int) -> None:
        self._ids = np.asarray(list(ids), np.int32)
        if vocab_size <= FULL_VOCABULARY:
            self._columns, self._top = np.arange(vocab_size, dtype=np.int32), 0
        else:
            random = np.random.default_rng(SEED)
            columns = random.choice(vocab_size, COLUMNS, replace=False)
            self._columns, self._top = np.sort(columns).astype(np.int32), TOP
        self.rows: dict[int, Row] = {}  # by position

    def add(self, position: int, logits: Logits) -> Row:
        """Add the row of ``position`` from the ``logits``, float32 [V], after the id at that position."""
        top = np.sort(np.argpartition(-logits, self._top)[: self._top]).astype(np.int32)
        total = float(np.float32(log_sum_exp(logits)))
        values = logits[self._columns]
        row = Row(position, self._columns, values, top, logits[top], total, int(np.argmax(logits)))
        self.rows[position] = row
        return row

    def reference(
        self, images: NDArray[np.uint8] | None = None, soft_tokens: SoftTokens | None = None
    ) -> ReferenceLogits:
        """The rows added so far, with the given images [I, S, S, 3] and soft tokens [I, T, E].

        What limits are derived from is 0.
        """
        positions = sorted(self.rows)
        rows = [self.rows[position] for position in positions]
        return ReferenceLogits(
            ids=self._ids,
            positions=np.asarray(positions, np.int32),
            columns=self._columns,
            values=np.stack([row.values for row in rows]),
            top_columns=np.stack([row.top_columns for row in rows]),
            top_values=np.stack([row.top_values for row in rows]),
            log_sum_exp=np.asarray([row.log_sum_exp for row in rows], np.float32),
            argmax=np.asarray([row.argmax for row in rows], np.int32),
            float_error=np.zeros(len(positions), np.float32),
            noise_kl=np.zeros(len(positions), np.float32),
            cost_kl=np.zeros(len(positions), np.float32),
            images=np.zeros((0, 0, 0, 3), np.uint8) if images is None else images,
            soft_tokens=np.zeros((0, 0, 0), np.float32) if soft_tokens is None else soft_tokens,
            soft_noise=np.zeros(0 if soft_tokens is None else len(soft_tokens), np.float32),
            soft_cost=np.zeros(0 if soft_tokens is None else len(soft_tokens), np.float32),
        )


def reference_keys(manifest: Manifest) -> dict[str, dict[str, str]]:
    """For each format of a bundle, by the names of its references, their keys in the golden vectors.

    The key is the name. Artifacts share a reference of one name, unless their weights or the weights whose inputs stay
    in floating point differ; then the key ends with the format.
    """
    keys: dict[str, dict[str, str]] = {}
    owners: dict[str, Artifact] = {}
    for format, artifact in manifest.artifacts.items():
        keys[format] = {}
        for name in artifact.references:
            owner = owners.setdefault(name, artifact)
            same = same_weights(owner, artifact) and owner.float_activations == artifact.float_activations
            keys[format][name] = name if same else f"{name}-{format}"
    return keys


def same_weights(one: Artifact, other: Artifact) -> bool:
    """Have two artifacts of a bundle the same weights, and the same keys and values in their caches?"""
    rounded = "int8" in (one.cache.dtype, other.cache.dtype)  # each format rounds for an int8 cache in its own way
    return one.stand_ins == other.stand_ins and (one is other or not rounded)


IMAGES = "images"  # the same in all references, so saved once
FIELDS = tuple(field.name for field in fields(ReferenceLogits) if field.name != IMAGES)


def save_golden(path: Path, references: Mapping[str, ReferenceLogits]) -> None:
    """Write the references, by key (see ``reference_keys``), into one safetensors file: ``float.values`` and so on."""
    arrays = {
        f"{key}.{name}": np.ascontiguousarray(getattr(reference, name))
        for key, reference in references.items()
        for name in FIELDS
    }
    arrays[IMAGES] = next(iter(references.values())).images
    path.write_bytes(save(arrays))  # not save_file, whose file only the owner can read


# The axes of each array. Axes with the same letter have the same size.
AXES: dict[str, tuple[type[np.generic], str]] = {
    "ids": (np.int32, "T"),
    "positions": (np.int32, "P"),
    "columns": (np.int32, "M"),
    "values": (np.float32, "PM"),
    "top_columns": (np.int32, "PK"),
    "top_values": (np.float32, "PK"),
    "log_sum_exp": (np.float32, "P"),
    "argmax": (np.int32, "P"),
    "float_error": (np.float32, "F"),
    "noise_kl": (np.float32, "N"),
    "cost_kl": (np.float32, "C"),
    "soft_tokens": (np.float32, "ISE"),
    "soft_noise": (np.float32, "L"),
    "soft_cost": (np.float32, "I"),
}


def load_golden(path: Path) -> dict[str, ReferenceLogits]:
    """The references by key (see ``reference_keys``). Raises VerificationFailed when the file is damaged: an array is
    missing, or has another dtype or shape than the others.
    """
    try:
        arrays = load_file(str(path))
        images = arrays.pop(IMAGES)
        keys = sorted({key.partition(".")[0] for key in arrays})
        found = {}
        for key in keys:
            fields = {name: arrays[f"{key}.{name}"] for name in FIELDS}
            _check_arrays(fields, images)
            found[key] = ReferenceLogits(images=images, **fields)
    except (OSError, SafetensorError, KeyError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise VerificationFailed(f"{path}: not golden vectors ({reason}); export the bundle again") from None
    return found


def _check_arrays(fields: Mapping[str, NDArray[np.generic]], images: NDArray[np.generic]) -> None:
    """Raises ValueError for an array of another dtype or shape, and for a position or column below 0."""
    sizes: dict[str, int] = {}
    for name, (dtype, axes) in AXES.items():
        array = fields[name]
        if array.dtype != dtype or array.ndim != len(axes):
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
        for axis, size in zip(axes, array.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"{name} has the shape {list(array.shape)}, another array {sizes[axis]} along an axis")
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != sizes["I"] or images.shape[-1] != 3:
        raise ValueError(f"images are {images.dtype} {list(images.shape)} for {sizes['I']} encoded ones")
    for name in ("float_error", "noise_kl", "cost_kl", "soft_noise", "soft_cost"):
        distances = fields[name].astype(np.float64)
        if not (np.isfinite(distances).all() and (distances >= 0).all()):
            raise ValueError(f"{name} holds a value that is no distance")
    if not all(sizes[axis] for axis in "PMFNC"):
        raise ValueError("no logits to compare with")
    for name in ("positions", "columns", "top_columns", "argmax"):
        if fields[name].size and int(fields[name].min()) < 0:
            raise ValueError(f"{name} holds {fields[name].min()}")
