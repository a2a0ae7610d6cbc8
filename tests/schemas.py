"""Every manifest and every plan that a test writes, checked against the JSON Schemas in docs/."""

import json
from functools import cache, wraps
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from export import bundle
from export.manifest import MANIFEST
from runtime_py.proof import prove
from runtime_py.proof.plan_file import save_plan

DOCS = Path(__file__).parent.parent / "docs"
written = {"manifest.schema.json": 0, "plan.schema.json": 0}


@cache
def validator(schema: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads((DOCS / schema).read_text(encoding="utf-8")))


def check(schema: str, path: Path) -> None:
    validator(schema).validate(json.loads(path.read_text(encoding="utf-8")))
    written[schema] += 1


def check_every_file(patch: pytest.MonkeyPatch) -> None:
    """From now on, every manifest and plan is checked as soon as it is written."""
    write_manifest = bundle.write_manifest

    @wraps(write_manifest)
    def manifest(directory: Path, *rest: Any) -> None:
        write_manifest(directory, *rest)
        check("manifest.schema.json", directory / MANIFEST)

    @wraps(save_plan)
    def plan(path: Path, *rest: Any) -> None:
        save_plan(path, *rest)
        check("plan.schema.json", path)

    patch.setattr(bundle, "write_manifest", manifest)
    patch.setattr(prove, "save_plan", plan)
