"""The three scripts in examples/, run as a user runs them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_example(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_from_a_checkpoint_to_a_checked_bundle(tmp_path: Path) -> None:
    result = run_example("export_and_ask.py", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "figures measured" in result.stdout
    assert result.stdout.splitlines()[-1]

    result = run_example("compare_logits.py", tmp_path / "bundle", "demo")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("exported: [") == result.stdout.count("original: [") == 1

    result = run_example("check_a_bundle.py", tmp_path / "bundle")
    assert result.returncode == 0, result.stderr
    assert "the limit is" in result.stdout
    data = tmp_path / "bundle" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    result = run_example("check_a_bundle.py", tmp_path / "bundle")
    assert result.returncode == 5
    assert "sha256" in result.stderr
