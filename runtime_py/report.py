"""Small text tables, and the line that sums up an export."""

from collections.abc import Sequence
from pathlib import Path

from export.manifest import Manifest


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that is also readable as plain text. All columns after the first ``left`` are right-aligned."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in (cells[0], rule, *cells[1:])
    )


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def bundle_line(out: Path, manifest: Manifest) -> str:
    """One line on a proven bundle: the size of each artifact, also as a multiple of its ideal bytes."""
    sizes = [
        f".{format} {megabytes(artifact.bytes)} ({artifact.bytes / artifact.ideal_bytes:.3f} × ideal)"
        for format, artifact in manifest.artifacts.items()
    ]
    return f"{out}: {', '.join(sizes)}, every check passed"
