import json
from pathlib import Path

import jsonschema
import pytest

import scripts.manifest_schema
from export.manifest import MANIFEST, PLAN
from tests import schemas
from tests.bundles import EXPORT, Cli
from tests.schemas import DOCS, check


def test_the_schemas_in_docs_follow_from_the_code() -> None:
    """If this fails: python -m scripts.manifest_schema, and a new MINOR in export/manifest.py if a key was added."""
    for name, text in scripts.manifest_schema.schemas().items():
        assert (DOCS / name).read_text(encoding="utf-8") == text
        jsonschema.Draft202012Validator.check_schema(json.loads(text))


def test_what_a_test_writes_is_checked(gemma_edge: Cli, checkpoint: Path, tmp_path: Path) -> None:
    before = dict(schemas.written)
    result = gemma_edge("export", checkpoint, "-o", tmp_path / "out", "--format", "onnx", *EXPORT)
    assert result.code == 0, result.err
    assert schemas.written["manifest.schema.json"] == before["manifest.schema.json"] + 2
    assert schemas.written["plan.schema.json"] == before["plan.schema.json"] + 1
    for schema, name, key in (("manifest.schema.json", MANIFEST, "chunk"), ("plan.schema.json", PLAN, "at_least")):
        data = json.loads((tmp_path / "out" / name).read_text())
        (tmp_path / "more.json").write_text(json.dumps(data | {"a key of a later version": 1}))
        check(schema, tmp_path / "more.json")
        data[key] = {"another": "type"}
        (tmp_path / "wrong.json").write_text(json.dumps(data))
        with pytest.raises(jsonschema.ValidationError):
            check(schema, tmp_path / "wrong.json")


def test_the_example_in_the_docs_is_a_manifest() -> None:
    text = (DOCS / "bundle.md").read_text(encoding="utf-8")
    example = text.split("```json\n")[1].split("```")[0]
    (version,) = {json.loads(example)["schema_version"]}
    from export.manifest import Manifest

    assert Manifest.from_json(example).schema_version == version
    schemas.validator("manifest.schema.json").validate(json.loads(example))
