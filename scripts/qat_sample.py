"""Write the text-only demo's training sample: what ``gemma-edge qat demo`` learns from when it is given no data.

    python -m scripts.qat_sample gemma3/demo

The sample is a part of what the demo checkpoint was trained on (scripts/demo_corpus.py). It holds no held-out data.
"""

import argparse
import json
import random
from pathlib import Path

from scripts import demo_corpus

TEXT_CHARACTERS = 750_000
CONVERSATIONS = 800
SEED = 2  # the conversations of train_demo.py come from other seeds


def text() -> str:
    """Training documents in random order, cut off at TEXT_CHARACTERS."""
    documents, _ = demo_corpus.split_text()
    random.Random(SEED).shuffle(documents)
    chosen: list[str] = []
    while sum(map(len, chosen)) < TEXT_CHARACTERS:
        chosen.append(documents.pop())
    return "\n\n".join(chosen)[:TEXT_CHARACTERS] + "\n"


def conversations() -> str:
    """Lines of JSON, each {"messages": […]}."""
    stream = demo_corpus.Conversations(SEED)
    lines = (json.dumps({"messages": next(stream)}, ensure_ascii=False) for _ in range(CONVERSATIONS))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to write qat.txt and qat.jsonl")
    out: Path = parser.parse_args().directory
    (out / "qat.txt").write_text(text(), encoding="utf-8")
    (out / "qat.jsonl").write_text(conversations(), encoding="utf-8")


if __name__ == "__main__":
    main()
