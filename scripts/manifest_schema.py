"""Write the JSON Schemas of a bundle's two JSON files from the dataclasses that read them.

    python -m scripts.manifest_schema

writes docs/manifest.schema.json and docs/plan.schema.json. A test compares them with the code.
"""

import json
from pathlib import Path

from export.manifest import MAJOR, MINOR, Manifest
from gemma3.typed_json import json_schema
from runtime_py.proof.plan_file import SCHEMA_VERSION, ProofPlan

DOCS = Path(__file__).parent.parent / "docs"


def schemas() -> dict[str, str]:
    """The content of each file by its name."""
    found = {
        "manifest.schema.json": json_schema(Manifest, f"manifest.json of a gemma-edge bundle, version {MAJOR}.{MINOR}"),
        "plan.schema.json": json_schema(ProofPlan, f"proof/plan.json of a gemma-edge bundle, version {SCHEMA_VERSION}"),
    }
    return {name: json.dumps(schema, indent=1, ensure_ascii=False) + "\n" for name, schema in found.items()}


def main() -> None:
    for name, text in schemas().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(DOCS / name)


if __name__ == "__main__":
    main()
