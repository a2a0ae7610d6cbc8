"""Pictures of a run: the time of a decode step and the memory of the process, against the tokens in the cache (SVG)."""

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape

from gemma3.errors import counted
from scripts.peers.results import Run

COLOURS = ("#1b6ac9", "#d1495b", "#2e8b57", "#e08e0b", "#7b4fa3", "#00899b", "#8c564b", "#c23b8f", "#5c6b73", "#9aa800")
INK, GRID = "#1f2328", "#d8dee4"
LEAST = "least"
# Pixels: a panel's axes, the space around them, the height of a run, and the lines of the legend.
WIDTH, HEIGHT = 380, 250
LEFT, TOP, BETWEEN = 60, 40, 24
ROW, LEGEND, COLUMNS = TOP + HEIGHT + 56, 18, 3

Points = Sequence[tuple[int, float]]  # (tokens in the cache, value)


def picture(runs: Sequence[Run]) -> str:
    """Two panels for each run, one run below the other, and a legend: the text of an SVG file."""
    names = list(dict.fromkeys(row.name for run in runs for row in run.rows))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)} | {LEAST: INK}
    names.append(LEAST)
    legend_top = len(runs) * ROW + 14
    width, height = 2 * (LEFT + WIDTH) + BETWEEN, legend_top + LEGEND * math.ceil(len(names) / COLUMNS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, run in enumerate(runs):
        decode = {
            row.name: [(one.depth, 1e3 * statistics.median(one.step_seconds)) for one in row.depths] for row in run.rows
        }
        decode[LEAST] = [(depth, 1e3 * run.floor_seconds(depth)) for depth in run.depths]
        memory = {row.name: [(one.depth, one.peak_bytes / 2**20) for one in row.depths] for row in run.rows}
        title = f"{run.model}, {counted(run.threads, 'thread')}"
        parts += [
            f'<g transform="translate({LEFT} {index * ROW + TOP})">',
            *panel(f"Decode, ms a token ({title})", decode, run.depths, colours),
            f'</g><g transform="translate({2 * LEFT + WIDTH + BETWEEN} {index * ROW + TOP})">',
            *panel(f"Peak memory, MiB ({title})", memory, run.depths, colours),
            "</g>",
        ]
    for index, name in enumerate(names):
        x, y = LEFT + index % COLUMNS * (width // COLUMNS), legend_top + index // COLUMNS * LEGEND
        parts.append(f'<rect x="{x}" y="{y - 7}" width="14" height="4" fill="{colours[name]}"/>')
        parts.append(f'<text x="{x + 20}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(title: str, series: Mapping[str, Points], depths: Sequence[int], colours: Mapping[str, str]) -> list[str]:
    """The elements of one panel: a grid, and a line for each series. The horizontal axis is logarithmic."""
    ticks = round_steps(max((value for points in series.values() for _, value in points), default=1.0))
    first, last = math.log2(min(depths)), math.log2(max(depths))

    def x(depth: int) -> float:
        return WIDTH * (math.log2(depth) - first) / (last - first) if last > first else WIDTH / 2

    def y(value: float) -> float:
        return HEIGHT * (1 - value / ticks[-1])

    parts = [f'<text y="-14" font-weight="bold">{escape(title)}</text>']
    for tick in ticks:
        parts.append(f'<path d="M0 {y(tick):.1f}h{WIDTH}" stroke="{GRID}"/>')
        parts.append(f'<text x="-6" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for depth in depths:
        parts.append(f'<path d="M{x(depth):.1f} 0v{HEIGHT}" stroke="{GRID}"/>')
        parts.append(f'<text x="{x(depth):.1f}" y="{HEIGHT + 18}" text-anchor="middle">{depth}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT + 34}" text-anchor="middle">tokens in the cache</text>')
    for name, points in series.items():
        path = " ".join(f"{x(depth):.1f},{y(value):.1f}" for depth, value in points)
        dashes = ' stroke-dasharray="4 4"' if name == LEAST else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"{dashes}/>')
        parts += [
            f'<circle cx="{x(depth):.1f}" cy="{y(value):.1f}" r="3" fill="{colours[name]}"/>' for depth, value in points
        ]
    return parts


def round_steps(largest: float) -> list[float]:
    """From zero to ``largest`` or a little more, in four to eight steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(largest / 4))
    step = max(factor * power for factor in (1, 2, 5) if factor * power <= largest / 4)
    return [index * step for index in range(math.ceil(largest / step) + 1)]
