"""The presets on the demo checkpoints: whole exports in both formats, with their proofs."""

from pathlib import Path

import pytest

from gemma3.checkpoint import DEMOS
from quant.recipe import PRESETS
from runtime_py.api import export_bundle
from runtime_py.backends import BACKENDS


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", DEMOS)
def test_every_preset_passes_the_proof(model: str, name: str, tmp_path: Path) -> None:
    manifest = export_bundle(model, tmp_path / "bundle", recipe=name)
    assert (manifest.recipe, [*manifest.artifacts]) == (name, [*BACKENDS])
    integers = {check.artifact for check in manifest.validation if check.metric == "equal" and check.value == 1.0}
    assert integers == {*BACKENDS}
