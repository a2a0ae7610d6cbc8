import json
from pathlib import Path

import pytest

from gemma3.errors import VerificationFailed
from runtime_py.proof.plan import make_plan
from runtime_py.proof.plan_file import ReferenceProof, load_plan, save_plan
from tests.manifests import manifest_of, seeing_manifest
from tests.shapes import tiny_config, tiny_vision_config


@pytest.fixture(params=["text-only", "multimodal"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    text_only = request.param == "text-only"
    plan = make_plan(manifest_of(tiny_config()) if text_only else seeing_manifest(tiny_vision_config()))
    within = {"walk/chunks": {"kl_mean": 1e-5}, "reset": {"max_abs": 0.0}}
    proofs = {
        "pte": {"int8-per-token": ReferenceProof("int8-per-token", "why", within)},
        "onnx": {name: ReferenceProof(name, "why", {}) for name in ("int8-per-block", "int8-kleidiai")},
    }
    save_plan(tmp_path / "plan.json", plan, proofs)
    proof = load_plan(tmp_path / "plan.json")
    assert (proof.plan, proof.artifacts) == (plan, proofs)
    assert bool(proof.plan.image_places) == bool(proof.plan.image_numbers) == (not text_only)
    return tmp_path / "plan.json"


def test_everything_a_replay_needs_is_plain_data(path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    plan = data["plan"]
    assert all(sum(lengths) == len(plan["ids"]) for lengths in plan["walks"].values())
    assert plan["walks"].keys() == {"odd-sizes", "one-by-one", "chunks", "whole-prompt"}
    assert all(0 <= position < len(plan["ids"]) for position in plan["landmarks"].values())
    assert data["at_least"] == ["top1_agreement", "float_equal", "equal"]
    assert data["artifacts"]["pte"]["int8-per-token"]["tolerances"]["reset"] == {"max_abs": 0.0}
    # Ids and names are plain ASCII, so that any language can use them as keys.
    assert all(key.isascii() and " " not in key for key in (*plan["walks"], *plan["landmarks"]))


@pytest.mark.parametrize("damage", ["{", "[]", "null", '{"schema_version": 2}', "\x00"])
def test_damage_is_one_line(path: Path, damage: str) -> None:
    path.write_text(damage, encoding="utf-8")
    with pytest.raises(VerificationFailed, match=r"plan\.json: not the plan of a proof") as error:
        load_plan(path)
    assert "\n" not in str(error.value)


def test_another_version_is_refused(path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | {"schema_version": 1}), encoding="utf-8")
    with pytest.raises(VerificationFailed, match="schema_version is 1"):
        load_plan(path)
