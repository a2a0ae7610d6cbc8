import gc
import subprocess
import sys
from pathlib import Path

import pytest

from gemma3.host.memory import Room, give_back, memory_room, peak_rss


def test_a_large_array_shows_and_stays() -> None:
    before = peak_rss()
    assert before > 5e6
    block = bytearray(before + (64 << 20))
    assert peak_rss() >= before + (64 << 20)
    del block
    assert peak_rss() >= before + (64 << 20)


def test_cycles_are_given_back() -> None:
    gone = []

    class Node:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            gone.append(self)

    gc.disable()  # so that it is no collection by chance
    try:
        Node()
        assert not gone
        give_back()
        assert len(gone) == 1
    finally:
        gc.enable()


def test_a_parents_memory_does_not_count() -> None:
    code = "from gemma3.host.memory import peak_rss; print(peak_rss())"
    block = bytearray(256 << 20)
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert child < len(block)


GIB = 1 << 30


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A made-up /proc and /sys below ``root``: 8 GiB of memory and 2 GiB of swap are free."""
    meminfo = f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\nSwapFree: {2 << 20} kB\nHugePages_Total: 0\n"
    for name, content in {"proc/meminfo": meminfo, "proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def group(folder: str, limit: str, used: int, cached: int, version: int = 2) -> dict[str, str]:
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    values = (limit, str(used), f"anon {used - cached}\nactive_file 0\ninactive_file {cached}\ninactive_anon 7\n")
    return {f"sys/fs/cgroup/{folder}memory.{name}": text for name, text in zip((*names, "stat"), values, strict=True)}


@pytest.mark.parametrize(
    ("groups", "files", "memory"),
    [
        ("0::/\n", {}, 8 * GIB),
        ("0::/\n", group("", str(4 * GIB), 3 * GIB, GIB), 2 * GIB),  # in a container
        ("0::/a/b\n", group("a/b/", "max", 3 * GIB, 0) | group("a/", str(5 * GIB), 3 * GIB, 0), 2 * GIB),
        ("0::/a\n", group("a/", str(64 * GIB), 0, 0), 8 * GIB),
        ("0::/a\n", group("a/", str(GIB), 2 * GIB, 0), 0),
        ("5:cpu:/x\n3:memory:/a\n", group("memory/a/", str(3 * GIB), GIB, GIB, version=1), 3 * GIB),
        ("5:cpu:/a\n", group("memory/a/", str(3 * GIB), GIB, 0, version=1), 8 * GIB),
    ],
)
def test_the_smallest_limit_counts(tmp_path: Path, groups: str, files: dict[str, str], memory: int) -> None:
    assert memory_room(machine(tmp_path, groups, files)) == Room(memory, 2 * GIB)


def test_a_machine_that_does_not_tell(tmp_path: Path) -> None:
    assert memory_room(tmp_path) is None


def test_this_machine() -> None:
    room = memory_room()
    assert room is None or 0 < room.memory < 1 << 50
