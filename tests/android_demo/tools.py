"""Loads the tools of android_demo/ci/apk, which are scripts and no package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "android_demo/ci/apk"


def load(name: str) -> ModuleType:
    """The module of a tool; those that it imports must have been loaded before."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
