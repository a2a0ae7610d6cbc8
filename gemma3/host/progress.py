"""How far a long computation is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from typing import TextIO

BAR = 24
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_DRAWINGS = 0.1


class Progress:
    """``total`` steps, of which ``done`` were there before. Writes to ``file`` (standard error)."""

    def __init__(self, total: int, done: int = 0, file: TextIO | None = None) -> None:
        self._total, self._first = total, done
        self._file = file or sys.stderr
        self._terminal = self._file.isatty()
        self._began = self._written = time.monotonic()
        self._width = 0

    def show(self, done: int, text: str) -> None:
        """``done`` of the steps are finished; ``text`` says how it goes."""
        now = time.monotonic()
        pause = SECONDS_BETWEEN_DRAWINGS if self._terminal else SECONDS_BETWEEN_LINES
        if done < self._total and now - self._written < pause:
            return
        self._written = now
        left = (now - self._began) / max(done - self._first, 1) * (self._total - done)
        line = f"{done}/{self._total} {text}, {minutes(left)} left"
        if not self._terminal:
            print(line, file=self._file, flush=True)
            return
        filled = BAR * done // max(self._total, 1)
        line = f"[{'#' * filled}{'.' * (BAR - filled)}] {line}"
        print(f"\r{line:<{self._width}}", end="", file=self._file, flush=True)
        self._width = len(line)

    def close(self) -> None:
        """Leave the bar as it is and go on below it."""
        if self._terminal and self._width:
            print(file=self._file, flush=True)


def minutes(seconds: float) -> str:
    """As 1:05, or 2:10:00."""
    whole = round(seconds)
    clock = f"{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{clock}" if whole >= 3600 else clock
