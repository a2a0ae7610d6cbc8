"""Write the demo's training sample: what ``gemma-edge qat demo`` learns from when it is given no data.

    python scripts/qat_sample.py gemma3/demo

A part of what the demo checkpoint was trained on (scripts/demo_corpus.py), never of what is held out.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import demo_corpus

TEXT_CHARACTERS = 750_000
CONVERSATIONS = 800
SEED = 2  # train_demo.py's conversations begin from other seeds


def text() -> str:
    """Whole documents in a random order, until there are TEXT_CHARACTERS."""
    documents, _ = demo_corpus.split_text()
    random.Random(SEED).shuffle(documents)
    chosen: list[str] = []
    while sum(map(len, chosen)) < TEXT_CHARACTERS:
        chosen.append(documents.pop())
    return "\n\n".join(chosen)[:TEXT_CHARACTERS] + "\n"


def conversations() -> str:
    """JSON lines, each {"messages": […]}."""
    stream = demo_corpus.Conversations(SEED)
    lines = (json.dumps({"messages": next(stream)}, ensure_ascii=False) for _ in range(CONVERSATIONS))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / "qat.txt").write_text(text(), encoding="utf-8")
    (out / "qat.jsonl").write_text(conversations(), encoding="utf-8")
