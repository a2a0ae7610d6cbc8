"""From a checkpoint to an answer: quantize, export to ONNX, prove, generate.

    python examples/export_and_ask.py [DIRECTORY]

Uses the demo checkpoint, and keeps the bundle in DIRECTORY if one is given.
"""

import sys
import tempfile
from pathlib import Path

from runtime_py.api import export_bundle, generate, open_bundle, open_checkpoint, quantize


def main(directory: Path) -> None:
    checkpoint = open_checkpoint("demo")
    quantized = quantize(checkpoint, "int4-block32")
    manifest = export_bundle(quantized, directory / "bundle", formats=["onnx"])
    print(f"{manifest.artifacts['onnx'].bytes / 1e6:.1f} MB, {len(manifest.validation)} figures measured")

    bundle = open_bundle(directory / "bundle")
    for text in generate(bundle, "What is the capital of France?", chat=True, max_new_tokens=32):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
