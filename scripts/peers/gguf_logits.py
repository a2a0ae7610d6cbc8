"""The logits that llama.cpp gives after every id of some stretches of text.

    INTERPRETER -m scripts.peers.gguf_logits FILE.gguf STRETCHES.json FOLDER

The interpreter is that of an environment with the package llama-cpp-python. STRETCHES.json is a list of lists of ids.
Each is fed from an empty cache. FOLDER gets INDEX.npy with float32 [ids, V] for each.
"""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def main() -> None:
    stretches = json.loads(Path(sys.argv[2]).read_text())
    longest = max(map(len, stretches))
    llama = Llama(sys.argv[1], n_ctx=longest, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    for index, ids in enumerate(stretches):
        llama.reset()
        llama.eval(ids)
        np.save(Path(sys.argv[3], f"{index}.npy"), llama.scores[: len(ids)])


if __name__ == "__main__":
    main()
