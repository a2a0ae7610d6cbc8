import json
from pathlib import Path

import pytest
import torch

from gemma3.checkpoint import open_checkpoint
from gemma3.errors import BadInput
from quant.integers import round_to_nearest
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


def test_a_method_of_an_older_version(checkpoint: Path, tmp_path: Path) -> None:
    made = opened(checkpoint)
    save_quantized(tmp_path / "old", made.weights, made.recipe, "hqq", source=checkpoint)
    assert opened(tmp_path / "old").method == "hqq"
    with pytest.raises(BadInput, match="method 'hqq' is unknown; use one of mse, rtn, gptq"):
        in_recipe(open_source(checkpoint), method="hqq")


def test_the_method_of_a_bundle_is_used_again(checkpoint: Path) -> None:
    source, recipe = open_source(checkpoint), scheme_recipe("int4-channel")
    found = {method: in_recipe(source, recipe, method) for method in ("mse", "rtn")}
    name = "model.layers.0.mlp.up_proj.weight"
    assert [one.method for one in found.values()] == ["mse", "rtn"]
    assert found["mse"].weights.verdicts[name] != found["rtn"].weights.verdicts[name]
    expected = round_to_nearest(open_checkpoint(checkpoint).tensor(name), 4, None)
    rounded = found["rtn"].weights.integers[name]
    assert torch.equal(rounded.codes, expected.codes)
    assert not torch.equal(found["mse"].weights.integers[name].codes, expected.codes)


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
