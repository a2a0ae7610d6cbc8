"""Which files may import which, imports inside functions included, and what must run without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A floor imports from itself and from those before it.
FLOORS = ("gemma3", "quant", "export", "runtime_py", "cli")

# Files that hold tensors or run the eager network or ExecuTorch. Everything else in runtime_py works without torch.
WITH_TORCH = {
    *("runtime_py.demo", "runtime_py.sessions.eager", "runtime_py.sessions.pte"),
    *("runtime_py.proof.references", "runtime_py.proof.single_steps", "runtime_py.measure.candidates"),
    "runtime_py.measure.lm_eval_adapter",  # the harness imports it
}
TORCH_IS_NAMED = {
    *("runtime_py.sessions.eager", "runtime_py.sessions.pte"),
    *("runtime_py.proof.references", "runtime_py.proof.single_steps", "runtime_py.mask_picture"),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    name_of(path): path
    for path in [ROOT / "cli.py", *(path for floor in FLOORS[:-1] for path in sorted((ROOT / floor).rglob("*.py")))]
}


@cache
def imported(module: str) -> tuple[str, ...]:
    """Every module that ``module`` imports, anywhere in it; of ours the files, not the names in them."""
    return tuple(_imported(SOURCES[module]))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in SOURCES else node.module for name in submodules)


def floor_of(module: str) -> int | None:
    package = module.split(".")[0]
    return FLOORS.index(package) if package in FLOORS else None


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_from_those_before_it(floor: str) -> None:
    modules = [module for module in SOURCES if module.split(".")[0] == floor]
    assert modules
    for module in modules:
        for other in imported(module):
            below = floor_of(other)
            assert below is None or below <= FLOORS.index(floor), f"{module} imports {other}"


def test_no_files_import_each_other() -> None:
    """Not even through others: the files are in some order in which each imports only those before it."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for other in imported(module):
            if other in SOURCES:
                visit(other, (*path, module))
        done.add(module)

    for module in SOURCES:
        visit(module, ())


def test_torch_is_named_in_runtime_py_where_the_eager_model_or_a_pte_runs() -> None:
    users = {
        module
        for module in SOURCES
        if floor_of(module) == FLOORS.index("runtime_py")
        for other in imported(module)
        if other.split(".")[0] in ("torch", "torchao")
    }
    assert users == TORCH_IS_NAMED


@pytest.mark.parametrize(
    "module",
    [
        *("cli", "export.manifest", "export.onnx.file", "quant.recipe", "gemma3.chat"),
        *(module for module in SOURCES if module.startswith("runtime_py.") and module not in WITH_TORCH),
    ],
)
def test_runs_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
