"""How much memory this process has taken, and how much it can still take."""

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


def peak_rss() -> int:
    """The largest resident set of this process so far, in bytes.

    Linux's ``ru_maxrss`` counts the parent's memory before exec; ``VmHWM`` does not.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def give_back() -> None:
    """Give memory that nothing uses any more back to the system, before the next step takes its own.

    Graphs are cycles of objects, which only a garbage collection frees, and glibc keeps most of what is freed.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


# The files of a control group in version 1, where version 2 has memory.max and memory.current.
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@dataclass(frozen=True)
class Room:
    """The memory that this process can still take, in bytes: without swapping, and the free swap besides."""

    memory: int
    swap: int


def memory_room(root: Path = Path("/")) -> Room | None:
    """What the system and the process's control groups leave free. None where Linux's /proc is not there to tell.

    Memory that only caches files counts as free, because the kernel takes it back. ``root`` is the file system's.
    Source: the kernel's documentation of /proc/meminfo (MemAvailable) and of the memory controllers, cgroup v1 and v2.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        found = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        memory, swap = found["MemAvailable"], found["SwapFree"]
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, KeyError, ValueError, IndexError):
        return None
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            memory = min(memory, _left_in(group, memory))
            if group == top:
                break
    return Room(max(memory, 0), swap)


def _left_in(group: Path, otherwise: int) -> int:
    """The bytes that the control group in the folder ``group`` may still take; ``otherwise`` if it has no limit."""
    names = ("memory.max", "memory.current") if (group / "memory.max").exists() else V1
    try:
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in names)
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file", "inactive_file")))
    except (OSError, ValueError, IndexError):  # no such group here, or "max": no limit
        return otherwise
    return limit - used + cached
