from pathlib import Path

import pytest
import torch

from gemma3.errors import BadInput
from quant.integers import IntegerWeight
from quant.methods import quantize_weights
from quant.recipe import PRESETS, SCHEMES, Integers, Recipe, Rule, Verdict, named_recipe, read_recipe, scheme_recipe
from quant.sfp8 import Sfp8Weight
from tests.shapes import random_model, tiny_config, tiny_vision_config


def weights(shape: str = "like-270m") -> list[tuple[str, torch.Tensor]]:
    return list(random_model(tiny_config(shape)).named_parameters())


@pytest.mark.parametrize("shape", ["like-270m", "untied"])
@pytest.mark.parametrize("scheme", ["int4-block32", "int4-channel"])
@pytest.mark.parametrize("embedding", [None, "int4", "int8"])
def test_schemes(shape: str, scheme: str, embedding: str | None) -> None:
    quantized = quantize_weights(weights(shape), scheme_recipe(scheme, embedding))
    assert quantized.verdicts.keys() == dict(weights(shape)).keys()
    for name, weight in quantized.tensors.items():
        if "norm" in name:
            assert isinstance(weight, torch.Tensor)
            assert str(quantized.verdicts[name]).startswith("float32: kept by rule *norm*.weight")
            continue
        assert isinstance(weight, IntegerWeight)
        table = "embed" in name or "lm_head" in name
        assert weight.bits == (8 if table and embedding != "int4" else 4)
        per_channel = embedding != "int4" if table else scheme == "int4-channel"
        assert weight.per_channel == per_channel
        if not per_channel:
            assert weight.group_size == 32
    assert ("lm_head.weight" in quantized.tensors) == (shape == "untied")


@pytest.mark.parametrize("shape", ["like-270m", "untied"])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_every_model(shape: str, name: str) -> None:
    text = quantize_weights(weights(shape), named_recipe(name))
    seeing = quantize_weights(random_model(tiny_vision_config()).named_parameters(), named_recipe(name))
    for found in (text, seeing):
        assert all("norm" in weight or "proj" not in weight or weight in found.integers for weight in text.tensors)
    assert (text.integers["model.embed_tokens.weight"].bits, named_recipe(name).name) == (8, name)


def test_the_bits_of_presets_are_in_order() -> None:
    sizes = {name: quantize_weights(weights(), recipe).ideal_bytes for name, recipe in PRESETS.items()}
    assert sizes["fast"] <= sizes["balanced"] <= sizes["exact"]


@pytest.mark.parametrize("scheme", ["fp32", "int4-block32", "int4-channel", "sfp8"])
def test_of_the_vision_model_only_the_linear_layers_are_quantized(scheme: str) -> None:
    named = list(random_model(tiny_vision_config()).named_parameters())
    quantized = quantize_weights(named, scheme_recipe(scheme))
    vision = [(name, weight) for name, weight in named if name.startswith(("vision_tower.", "multi_modal_projector."))]
    linears = [name for name, weight in vision if name.endswith(("proj.weight", "fc1.weight", "fc2.weight"))]
    assert len(linears) == 2 * 6
    for name, weight in vision:
        stored = quantized.tensors[name]
        if name in linears and scheme != "fp32":
            assert isinstance(stored, IntegerWeight)
            assert (stored.bits, stored.per_channel) == (8, True)
        else:
            assert stored is weight


def test_a_recipe_may_quantize_the_vision_model_in_another_way(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'embedding = "int8"\n[[rule]]\npattern = "vision_tower.*_proj.weight"\nscheme = "int4-channel"\n'
        '[[rule]]\npattern = "*_proj.weight"\nscheme = "int4-channel"\n'
    )
    recipe = read_recipe(path)
    assert len({rule.pattern for rule in recipe.rules}) == len(recipe.rules)
    quantized = quantize_weights(random_model(tiny_vision_config()).named_parameters(), recipe)
    layer = "vision_tower.vision_model.encoder.layers.0"
    assert quantized.integers[f"{layer}.self_attn.out_proj.weight"].bits == 4
    assert quantized.integers[f"{layer}.mlp.fc2.weight"].bits == 8


def test_fp32_keeps_everything() -> None:
    quantized = quantize_weights(weights(), scheme_recipe("fp32"))
    assert not quantized.integers
    for name, weight in weights():
        kept = quantized.tensors[name]
        assert isinstance(kept, torch.Tensor)
        assert torch.equal(kept, weight)
    assert quantized.ideal_bytes == 4 * sum(weight.numel() for _, weight in weights())


def test_first_match_wins() -> None:
    recipe = Recipe("mine", (Rule("*.mlp.*", "int4-channel"), Rule("*", "float32")))
    verdicts = quantize_weights(weights(), recipe).verdicts
    assert {name for name, verdict in verdicts.items() if "int4" in verdict.scheme} == {
        n for n in verdicts if ".mlp." in n
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((Rule("model.*", "float32"), Rule("*vision*", "float32")), r"rule \*vision\* matches no weight"),
        ((Rule("*proj.weight", "int4-block32"),), "no rule of recipe mine matches"),
    ],
)
def test_rules_that_do_not_fit(rules: tuple[Rule, ...], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        quantize_weights(weights(), Recipe("mine", rules))


def test_bad_weights_are_named() -> None:
    weight = torch.full((2, 32), float("nan"))
    with pytest.raises(BadInput, match=r"a_proj.weight: cannot be stored as int4-block32: 64 values are NaN"):
        quantize_weights([("a_proj.weight", weight)], Recipe("mine", (Rule("*", "int4-block32"),)))
    with pytest.raises(BadInput, match="40 columns do not divide"):
        quantize_weights([("a_proj.weight", torch.zeros(2, 40))], Recipe("mine", (Rule("*", "int4-block32"),)))


def test_unknown_names() -> None:
    with pytest.raises(BadInput, match="scheme 'int3' is unknown; use one of fp32, int4-block32"):
        scheme_recipe("int3")
    with pytest.raises(BadInput, match="recipe 'int3' is unknown; use one of fast, balanced, exact, fp32"):
        named_recipe("int3")
    with pytest.raises(BadInput, match="embedding 'int2' is unknown; use one of int8, int4"):
        scheme_recipe("int4-block32", "int2")
    with pytest.raises(BadInput, match="has no meaning with scheme fp32"):
        scheme_recipe("fp32", "int8")


def test_sfp8() -> None:
    quantized = quantize_weights(weights("untied"), scheme_recipe("sfp8", "sfp8"))
    assert all(isinstance(weight, Sfp8Weight) or "norm" in name for name, weight in quantized.tensors.items())
    mixed = quantize_weights(weights("untied"), scheme_recipe("sfp8", "int4")).tensors
    assert isinstance(mixed["model.layers.0.mlp.up_proj.weight"], Sfp8Weight)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = mixed[name]
        assert isinstance(table, IntegerWeight)
        assert table.bits == 4


def test_sfp8_scales_by_name() -> None:
    for scheme, rows in (("sfp8", 1), ("sfp8-channel", 2)):
        weight = quantize_weights([("a", torch.ones(2, 32))], Recipe("mine", (Rule("a", scheme),))).tensors["a"]
        assert isinstance(weight, Sfp8Weight)
        assert weight.scale.shape == (rows, 1)


def test_scheme_names_state_bits_and_groups() -> None:
    for name, scheme in SCHEMES.items():
        if isinstance(scheme, Integers):
            group = "channel" if scheme.group_size is None else f"block{scheme.group_size}"
            assert name == f"int{scheme.bits}-{group}" + ("-padded" if scheme.pad else "")


def test_the_verdict_states_the_padding() -> None:
    quantized = quantize_weights([("a", torch.ones(2, 40)), ("b", torch.ones(2, 64))], Recipe("", (Rule("*", PADDED),)))
    assert quantized.verdicts == {
        "a": Verdict(PADDED, "round to nearest with the least squared error, its last group 8 of 32 columns"),
        "b": Verdict(PADDED, "round to nearest with the least squared error"),
    }
    assert quantized.integers["a"].scales.shape == (2, 2)


PADDED = "int4-block32-padded"


def test_vectors_and_values_that_are_not_finite_are_refused() -> None:
    for scheme in ("int4-channel", "sfp8"):
        with pytest.raises(
            BadInput, match=rf"a: cannot be stored as {scheme}: it is not a matrix but has the shape \[3\]"
        ):
            quantize_weights([("a", torch.ones(3))], Recipe("mine", (Rule("*", scheme),)))
    with pytest.raises(BadInput, match="a: cannot be stored as float32: 1 values are NaN"):
        quantize_weights([("a", torch.tensor([1.0, torch.nan]))], Recipe("mine", (Rule("*", "float32"),)))
    with pytest.raises(BadInput, match="a: cannot be stored as sfp8: 2 values are NaN"):
        quantize_weights([("a", torch.full((1, 2), torch.inf))], Recipe("mine", (Rule("*", "sfp8"),)))


def test_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "first-layer.toml"
    path.write_text("""
        embedding = "int4"
        [[rule]]
        pattern = "model.layers.0.*_proj.weight"
        scheme = "int8-channel"
        [[rule]]
        pattern = "*_proj.weight"
        scheme = "int4-block128-padded"
    """)
    recipe = read_recipe(path)
    assert recipe.name == "first-layer"
    verdicts = quantize_weights(weights(), recipe).verdicts
    assert str(verdicts["model.embed_tokens.weight"]).startswith("int4-block32:")
    assert str(verdicts["model.layers.0.mlp.up_proj.weight"]).startswith("int8-channel:")
    assert str(verdicts["model.layers.1.mlp.up_proj.weight"]).startswith("int4-block128-padded:")
    assert str(verdicts["model.layers.0.self_attn.q_norm.weight"]).startswith("float32:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rule = [", "not TOML"),
        ("", "there is no rule"),
        ("rule = 3", "there is no rule"),
        ("rule = [3]", "a rule has 3; it needs pattern and scheme"),
        ("[[rule]]\npattern = 'a'", r"a rule has \['pattern'\]; it needs"),
        ("[[rule]]\npattern = 'a'\nscheme = 'int3'", "scheme 'int3' of 'a' is unknown; use one of float32"),
        ("[[rule]]\npattern = 'a'\nscheme = []", r"scheme '\[\]' of 'a' is unknown"),
        ("embedding = 'int2'", "embedding 'int2' is unknown"),
        ("embeding = 'int8'", "key 'embeding' is unknown"),
    ],
)
def test_bad_recipe_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=f"{path}: {message}"):
        read_recipe(path)


def test_no_recipe_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none.toml: no such file"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(BadInput, match=r"bytes.toml: not UTF-8"):
        read_recipe(tmp_path / "bytes.toml")
