"""How much memory this process has taken."""

import resource
import sys
from pathlib import Path


def peak_rss() -> int:
    """The largest resident set of this process so far, in bytes.

    Linux's ``ru_maxrss`` counts the parent's memory before exec; ``VmHWM`` does not.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
