import json
from pathlib import Path

import pytest
import torch

from gemma3.errors import BadInput
from quant.quantize import in_recipe
from quant.recipe import DEFAULT, Recipe, scheme_recipe
from quant.source import QuantizedCheckpoint, open_source
from quant.stored import save_quantized
from quant.weights import QuantizedWeights


def opened(path: Path, recipe: Recipe | None = None) -> QuantizedCheckpoint:
    return in_recipe(open_source(path), recipe)


@pytest.fixture(scope="module")
def quantized(checkpoint: Path) -> Path:
    made = opened(checkpoint, scheme_recipe("int4-channel"))
    out = checkpoint.parent / "quantized"
    save_quantized(out, made.weights, made.recipe, "gptq", source=checkpoint)
    return out


def test_a_float_checkpoint(checkpoint: Path) -> None:
    source = opened(checkpoint)
    assert (source.recipe, source.method) == (DEFAULT, "mse")
    assert source.weights.integers
    assert opened(checkpoint, scheme_recipe("fp32")).weights.integers == {}


@pytest.mark.parametrize("scheme", [None, "int4-channel"])
def test_stored_integers_stay_as_they_are(checkpoint: Path, quantized: Path, scheme: str | None) -> None:
    made = opened(checkpoint, scheme_recipe("int4-channel"))
    source = opened(quantized, None if scheme is None else scheme_recipe(scheme))
    assert (source.path, source.recipe, source.method) == (quantized, made.recipe, "gptq")
    assert source.config == made.config
    for name, weight in made.weights.integers.items():
        assert torch.equal(source.weights.integers[name].codes, weight.codes)
        assert torch.equal(source.weights.integers[name].scales, weight.scales)


def test_another_scheme_is_refused(quantized: Path) -> None:
    with pytest.raises(BadInput, match=r"is quantized as int4-channel\+embedding-int8 already, not int4-block32\+emb"):
        opened(quantized, scheme_recipe("int4-block32"))


def test_weights_of_another_model(checkpoint: Path, quantized: Path, tmp_path: Path) -> None:
    source = opened(quantized)
    tensors = {name: weight for name, weight in source.weights.tensors.items() if "layers.1.mlp.up" not in name}
    verdicts = {name: source.weights.verdicts[name] for name in tensors}
    save_quantized(tmp_path / "one", QuantizedWeights(tensors, verdicts), source.recipe, "rtn", source=checkpoint)
    with pytest.raises(BadInput, match=r"one: weight model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        opened(tmp_path / "one")

    save_quantized(tmp_path / "two", source.weights, source.recipe, "rtn", source=checkpoint)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    (tmp_path / "two" / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(BadInput, match=r"_proj\.weight has shape \[.*\], config\.json asks for"):
        opened(tmp_path / "two")
