"""Token ids in, logits out: one prompt through an exported file and through its checkpoint.

    python examples/compare_logits.py BUNDLE CHECKPOINT

prints the five likeliest next tokens of both, and the largest difference between their logits.
"""

import argparse
from pathlib import Path

from gemma3.errors import UserError
from runtime_py.api import open_bundle, open_checkpoint
from runtime_py.sessions.eager import open_eager

PROMPT = "def main():\n"


def main(bundle: Path, checkpoint: str) -> None:
    opened = open_bundle(bundle)
    exported = opened.session
    original = open_eager(open_checkpoint(checkpoint), exported.context, exported.chunk)
    ids = opened.tokenizer.encode(PROMPT, bos=True)
    rows = [session.prefill(ids) for session in (exported, original)]
    for name, logits in zip(("exported", "original"), rows, strict=True):
        likeliest = [opened.tokenizer.decode([int(token)]) for token in (-logits).argsort()[:5]]
        print(f"{name}: {likeliest}")
    print(f"largest difference between logits: {abs(rows[0] - rows[1]).max():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint")
    arguments = parser.parse_args()
    try:
        main(arguments.bundle, arguments.checkpoint)
    except UserError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
