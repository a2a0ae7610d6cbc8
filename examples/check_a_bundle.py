"""Replay the proof of a bundle, and list the figures that are nearest to their limits.

    python examples/check_a_bundle.py BUNDLE

exits with 5 if a check fails.
"""

import argparse
from pathlib import Path

from export.checks import require_passed
from gemma3.errors import UserError
from runtime_py.api import validate
from runtime_py.proof.limits import AT_LEAST


def main(bundle: Path) -> None:
    checks = validate(bundle)
    limited = [check for check in checks if check.limit and check.metric not in AT_LEAST]
    for check in sorted(limited, key=lambda check: -check.value / (check.limit or 1.0))[:5]:
        print(f".{check.artifact} {check.id} {check.metric}: {check.value:.3g}, the limit is {check.limit:.3g}")
    require_passed(checks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    try:
        main(parser.parse_args().bundle)
    except UserError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
