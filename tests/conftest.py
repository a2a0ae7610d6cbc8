import os

# Before torch is imported: nested MKL threads halve ExecuTorch's speed on a small machine, and the oracles
# must not look for a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import settings

# Machines are shared: no test fails for being slow, and every run draws the same examples.
settings.register_profile("shared-machine", deadline=None, derandomize=True)
settings.load_profile("shared-machine")
