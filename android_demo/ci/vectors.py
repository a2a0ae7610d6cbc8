"""Writes what the Kotlin tests compare with, as Python has it: runs every module of android_demo/ci/vectors.

    python android_demo/ci/vectors.py [FOLDER]

Each module's files are in a folder of its name below FOLDER (android_demo/ci/target/vectors).
"""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # this repository's packages, whatever is installed


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "target" / "vectors"
    for module in sorted((HERE / "vectors").glob("[!_]*.py")):
        importlib.import_module(f"android_demo.ci.vectors.{module.stem}").write(target / module.stem)


if __name__ == "__main__":
    main()
