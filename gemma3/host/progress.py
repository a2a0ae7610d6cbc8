"""The progress of a long computation: a bar on a terminal; elsewhere a plain line every ten seconds."""

import sys
import time
from contextlib import suppress
from typing import TextIO

BAR = 24
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_DRAWINGS = 0.1


class Progress:
    """Shows the progress of ``total`` steps, of which an earlier run has finished ``done``.

    Writes to ``file`` (None: standard error).
    """

    def __init__(self, total: int, done: int = 0, file: TextIO | None = None) -> None:
        self._total, self._first = total, done
        self._file = file or sys.stderr
        self._terminal = self._file.isatty()
        self._began = self._written = time.monotonic()
        self._width = 0

    def show(self, done: int, text: str) -> None:
        """Show that ``done`` of the steps are finished, with ``text`` after the count. May be called at any rate."""
        now = time.monotonic()
        pause = SECONDS_BETWEEN_DRAWINGS if self._terminal else SECONDS_BETWEEN_LINES
        if done < self._total and now - self._written < pause:
            return
        self._written = now
        left = (now - self._began) / max(done - self._first, 1) * (self._total - done)
        line = f"{done}/{self._total} {text}, {minutes(left)} left"
        if not self._terminal:
            self._write(f"{line}\n")
            return
        filled = BAR * done // max(self._total, 1)
        line = f"[{'#' * filled}{'.' * (BAR - filled)}] {line}"
        self._write(f"\r{line:<{self._width}}")
        self._width = len(line)

    def close(self) -> None:
        """End the bar's line, so that later output begins below it."""
        if self._terminal and self._width:
            self._write("\n")

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a terminal or pipe that was closed is no reason to end the work
            print(text, end="", file=self._file, flush=True)


def minutes(seconds: float) -> str:
    """A duration as minutes and seconds, 1:05, or with hours, 2:10:00."""
    whole = round(seconds)
    clock = f"{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{clock}" if whole >= 3600 else clock
