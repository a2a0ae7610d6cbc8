import pytest
import torch

from quant.integers import IntegerWeight
from quant.recipe import Recipe, RecipeError, Rule, preset, quantize
from tests.shapes import random_model, tiny_config


def weights(shape: str = "like-270m") -> list[tuple[str, torch.Tensor]]:
    return list(random_model(tiny_config(shape)).named_parameters())


@pytest.mark.parametrize("shape", ["like-270m", "untied"])
@pytest.mark.parametrize("scheme", ["int4-block32", "int4-channel"])
@pytest.mark.parametrize("embedding", [None, "int4", "int8"])
def test_presets(shape: str, scheme: str, embedding: str | None) -> None:
    quantized = quantize(weights(shape), preset(scheme, embedding))
    assert quantized.verdicts.keys() == dict(weights(shape)).keys()
    for name, weight in quantized.tensors.items():
        if "norm" in name:
            assert isinstance(weight, torch.Tensor)
            assert quantized.verdicts[name].startswith("float32: kept by rule *norm.weight")
            continue
        assert isinstance(weight, IntegerWeight)
        table = "embed" in name or "lm_head" in name
        assert weight.bits == (8 if table and embedding != "int4" else 4)
        per_channel = embedding != "int4" if table else scheme == "int4-channel"
        assert weight.per_channel == per_channel
        if not per_channel:
            assert weight.group_size == 32
    assert ("lm_head.weight" in quantized.tensors) == (shape == "untied")


def test_fp32_keeps_everything() -> None:
    quantized = quantize(weights(), preset("fp32"))
    assert not quantized.integers
    assert all(torch.equal(quantized.tensors[name], weight) for name, weight in weights())
    assert quantized.ideal_bytes == 4 * sum(weight.numel() for _, weight in weights())


def test_first_match_wins() -> None:
    recipe = Recipe("mine", (Rule("*.mlp.*", "int4-channel"), Rule("*", "float32")))
    verdicts = quantize(weights(), recipe).verdicts
    assert {name for name, verdict in verdicts.items() if "int4" in verdict} == {n for n in verdicts if ".mlp." in n}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((Rule("model.*", "float32"), Rule("*vision*", "float32")), r"rule \*vision\* matches no weight"),
        ((Rule("*proj.weight", "int4-block32"),), "no rule of recipe mine matches"),
    ],
)
def test_rules_that_do_not_fit(rules: tuple[Rule, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quantize(weights(), Recipe("mine", rules))


def test_bad_weights_are_named() -> None:
    weight = torch.full((2, 32), float("nan"))
    with pytest.raises(RecipeError, match=r"a_proj.weight: cannot be int4-block32: 64 values are NaN"):
        quantize([("a_proj.weight", weight)], Recipe("mine", (Rule("*", "int4-block32"),)))
    with pytest.raises(RecipeError, match="40 columns do not divide"):
        quantize([("a_proj.weight", torch.zeros(2, 40))], Recipe("mine", (Rule("*", "int4-block32"),)))


def test_unknown_names() -> None:
    with pytest.raises(RecipeError, match="scheme 'int3' is unknown; use one of fp32, int4-block32"):
        preset("int3")
    with pytest.raises(RecipeError, match="embedding 'int2' is unknown; use one of int8, int4"):
        preset("int4-block32", "int2")
    with pytest.raises(RecipeError, match="has no meaning with scheme fp32"):
        preset("fp32", "int8")
