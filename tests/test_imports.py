"""The arrows between the packages, lazy imports included, and what must run without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("gemma3", "quant", "export", "runtime_py", "cli")

# What a package may import: whole packages of ours, or single modules.
ALLOWED = {
    "gemma3": {"gemma3"},
    "quant": {"quant"},
    "export": {"export", "gemma3", "quant"},
    "runtime_py": {
        "runtime_py",
        *(f"gemma3.{module}" for module in ("config", "cache", "errors", "tokenizer", "chat", "data", "images")),
        *("export.manifest", "export.onnx.file"),
    },
}
# The modules of runtime_py that may see the network, because they run it or show it.
EAGER = {ROOT / "runtime_py" / name for name in ("demo.py", "eager_session.py", "own_cache.py", "mask_picture.py")}
EAGER_ALSO = {"gemma3.model", "gemma3.checkpoint", "quant"}


def imported(path: Path) -> Iterator[str]:
    """Every module that ``path`` imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows(package: str) -> None:
    assert sources(package)
    for path in sources(package):
        allowed = ALLOWED[package] | (EAGER_ALSO if path in EAGER else set())
        for module in imported(path):
            if module.split(".")[0] in OURS:
                assert module.split(".")[0] in allowed or module in allowed, f"{path.name} imports {module}"


def test_torch_is_named_in_runtime_py_where_the_eager_model_or_a_pte_runs() -> None:
    users = {
        path.name
        for path in sources("runtime_py")
        for module in imported(path)
        if module.split(".")[0] in ("torch", "torchao")
    }
    assert users <= {*(path.name for path in EAGER), "pte_session.py"}


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "export.manifest",
        *(
            f"runtime_py.{path.stem}"
            for path in sources("runtime_py")
            if path.stem not in ("demo", "eager_session", "own_cache", "pte_session", "lm_eval_adapter")
        ),
    ],
)
def test_runs_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
