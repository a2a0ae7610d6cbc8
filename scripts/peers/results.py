"""What scripts/bench_peers.py measured, as data, and the arithmetic and the tables of it.

Times are kept as they were taken, one for each round. Medians, spreads and ratios are computed when a table is drawn.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gemma3.errors import counted
from runtime_py.report import table

# The runner to which ratios refer.
BASE = "llama.cpp"
NOTHING = "–"


@dataclass(frozen=True)
class Depth:
    """Decoding with about ``depth`` tokens in the cache.

    ``fill_tokens`` were fed to get there in ``fill_seconds``, after what the cache held before. ``step_seconds`` has
    the mean time of a step in each round, and ``peak_bytes`` the largest memory of the process so far.
    """

    depth: int
    fill_tokens: int
    fill_seconds: float
    step_seconds: tuple[float, ...]
    peak_bytes: int


@dataclass(frozen=True)
class Row:
    """One file in one runtime. ``prefill_seconds`` has the time of the prompt in each round, from an empty cache.

    ``load_seconds`` is the time to open the file, after the runtime's libraries are imported. These, and the
    interpreter, take ``libraries_bytes``, which peaks include. ``divergence`` is KL(llama.cpp ‖ this) after the
    prompt, in nats.
    """

    name: str
    version: str
    context: int
    file_bytes: int
    load_seconds: float
    libraries_bytes: int
    prefill_seconds: tuple[float, ...]
    depths: tuple[Depth, ...]
    divergence: float | None = None

    def at(self, depth: int) -> Depth | None:
        return next((one for one in self.depths if one.depth == depth), None)


@dataclass(frozen=True)
class Run:
    """Runners that took turns with the same number of threads.

    ``bandwidth`` is what the machine reads, in bytes per second. A step reads ``weight_bytes`` of weights (those of the
    first bundle) and, at each depth, ``cache_bytes`` of keys and values in float32. ``skipped`` says why others, or the
    larger depths of others, are missing.
    """

    model: str
    machine: str
    threads: int
    prompt: int
    steps: int
    bandwidth: float
    weight_bytes: int
    cache_bytes: dict[str, int]
    rows: tuple[Row, ...]
    skipped: dict[str, str]

    @property
    def depths(self) -> list[int]:
        return sorted(map(int, self.cache_bytes))

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def floor_seconds(self, depth: int) -> float:
        """The least time of a step: that of reading the weights and the caches once."""
        return (self.weight_bytes + self.cache_bytes[str(depth)]) / self.bandwidth


@dataclass(frozen=True)
class Results:
    """The content of a --json file."""

    runs: tuple[Run, ...]


def spread(values: Sequence[float]) -> float:
    """Half the distance between the largest and the smallest value, relative to the median."""
    return (max(values) - min(values)) / 2 / statistics.median(values)


def figure(values: Sequence[float], digits: int) -> str:
    """The median of ``values`` and their spread, for a cell of a table."""
    return f"{statistics.median(values):.{digits}f} ± {100 * spread(values):.0f} %"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f}"


def ratio(base: Sequence[float], own: Sequence[float]) -> float:
    """How many times as fast as the base: the median over the rounds, each of which compares what ran side by side."""
    return statistics.median(one / other for one, other in zip(base, own, strict=True))


def first_token_seconds(row: Row, prompt: int, depth: int) -> float | None:
    """The time to read ``depth`` tokens from an empty cache; None where that was not measured.

    The steps that were decoded on the way count as if they had been read at the mean speed of the prefill.
    """
    below = [one for one in row.depths if one.depth <= depth]
    if not below or below[-1].depth != depth:
        return None
    seconds = statistics.median(row.prefill_seconds) + sum(one.fill_seconds for one in below)
    return seconds * depth / (prompt + sum(one.fill_tokens for one in below))


def tables(run: Run) -> str:
    """The tables of a run in Markdown, with the floors and what was skipped."""
    parts = [
        f"### {run.model}, {counted(run.threads, 'thread')}",
        f"{run.machine}. It reads {run.bandwidth / 2**30:.1f} GiB/s. A step reads {run.weight_bytes / 1e6:.0f} MB of "
        "weights, and the caches in float32 (llama.cpp's are float16); *least* is the time that this takes at least.",
        speed_table(run),
        *([prompt_table(run)] if any(depth > run.prompt for depth in run.depths) else []),
        memory_table(run),
        *(f"Skipped: {name}: {reason}" for name, reason in run.skipped.items()),
    ]
    return "\n\n".join(parts) + "\n"


def speed_table(run: Run) -> str:
    """A row for each runner: prefill and decode speed, and how many times as fast as llama.cpp."""
    base = run.row(BASE)
    header = ["", f"prefill {run.prompt}, tok/s", f"× {BASE}"]
    for depth in run.depths:
        header += [f"decode at {depth}, ms", f"× {BASE}"]
    rows = []
    for row in run.rows:
        cells = [row.name, figure([run.prompt / one for one in row.prefill_seconds], 0)]
        cells.append(NOTHING if base is None else f"{ratio(base.prefill_seconds, row.prefill_seconds):.2f}")
        for depth in run.depths:
            own, other = row.at(depth), None if base is None else base.at(depth)
            cells.append(NOTHING if own is None else figure([1e3 * one for one in own.step_seconds], 2))
            cells.append(
                NOTHING if own is None or other is None else f"{ratio(other.step_seconds, own.step_seconds):.2f}"
            )
        rows.append(cells)
    least = ["*least*", "", ""]
    for depth in run.depths:
        least += [f"{1e3 * run.floor_seconds(depth):.2f}", ""]
    return table(header, [*rows, least])


def prompt_table(run: Run) -> str:
    """The time that long prompts take."""
    depths = [depth for depth in run.depths if depth > run.prompt]
    rows = []
    for row in run.rows:
        seconds = [first_token_seconds(row, run.prompt, depth) for depth in depths]
        rows.append([row.name, *(NOTHING if one is None else f"{one:.1f}" for one in seconds)])
    return table(["", *(f"prompt of {depth}, s" for depth in depths)], rows)


def memory_table(run: Run) -> str:
    """Versions, files, and the memory of each process; and whether its logits are those of llama.cpp."""
    header = ["", "version", "file, MB", "load, s", "libraries, MiB"]
    rows = []
    for row in run.rows:
        cells = [row.name, row.version, f"{row.file_bytes / 1e6:.0f}", f"{row.load_seconds:.2f}"]
        cells.append(mebibytes(row.libraries_bytes))
        for depth in run.depths:
            cells.append(NOTHING if (at := row.at(depth)) is None else mebibytes(at.peak_bytes))
        cells.append(NOTHING if row.divergence is None else f"{row.divergence:.1e}")
        rows.append(cells)
    return table([*header, *(f"peak at {depth}, MiB" for depth in run.depths), f"KL to {BASE}"], rows, left=2)
