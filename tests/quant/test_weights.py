from pathlib import Path

import pytest
import torch

from export.onnx.target import ONNX
from export.stand_ins import for_target
from gemma3.checkpoint import open_checkpoint
from gemma3.errors import BadInput
from quant.integers import IntegerWeight
from quant.methods import form_in, quantize_weights
from quant.quantize import quantize
from quant.recipe import SCHEMES, Recipe, Rule, scheme_recipe
from quant.stored import load_quantized, save_quantized
from quant.weights import OnDemand, QuantizedWeights, Weight, form_of, shape_of
from tests.bundles import rewrite_tensors, write_checkpoint


def tensors_of(weight: Weight) -> tuple[torch.Tensor, ...]:
    return (weight,) if isinstance(weight, torch.Tensor) else weight.tensors()


def on_demand(tmp_path: Path, scheme: str) -> dict[str, tuple[QuantizedWeights, QuantizedWeights]]:
    """Weights that are made when they are asked for, and the same ones in memory."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    recipe = scheme_recipe(scheme)
    rounded = quantize(checkpoint, recipe).weights
    whole = quantize_weights(checkpoint.items(), recipe)
    save_quantized(tmp_path / "saved", whole, recipe, "rtn", source=checkpoint.path)
    replaced = for_target(rounded, ONNX)[0]
    return {
        "rounded": (rounded, whole),
        "stored": (load_quantized(tmp_path / "saved").weights, whole),
        "stand-ins": (replaced, QuantizedWeights(dict(replaced.tensors), replaced.verdicts)),
    }


@pytest.mark.parametrize("scheme", ["fp32", "int4-block32", "int4-channel", "sfp8"])
def test_what_is_made_on_demand_is_the_same_each_time(tmp_path: Path, scheme: str) -> None:
    for weights, whole in on_demand(tmp_path, scheme).values():
        assert list(weights.tensors) == list(whole.tensors)
        assert weights.verdicts == whole.verdicts
        assert weights.shapes == whole.shapes
        assert weights.ideal_bytes == whole.ideal_bytes
        assert weights.integers.keys() == whole.integers.keys()
        assert weights.quantized.keys() == whole.quantized.keys()
        for name, weight in whole.tensors.items():
            for _ in range(2):
                made = weights.tensors[name]
                assert type(made) is type(weight)
                assert form_of(made).__class__ is weights.forms[name].__class__
                for one, other, form in zip(
                    tensors_of(made), tensors_of(weight), tensors_of(weights.forms[name]), strict=True
                ):
                    assert torch.equal(one, other)
                    assert (one.shape, one.dtype) == (form.shape, form.dtype)


def test_names_sizes_and_kinds_make_no_weight() -> None:
    def refuse(name: str) -> Weight:
        raise AssertionError(name)

    forms = {name: form_in(SCHEMES[name], (64, 96)) for name in SCHEMES}
    weights = QuantizedWeights(OnDemand(forms, refuse), {})
    assert len(weights.tensors) == len(SCHEMES)
    assert "int4-block32" in weights.tensors
    assert "int4-block32" in weights.integers
    assert "sfp8" in weights.quantized
    assert "sfp8" not in weights.integers
    assert "float32" not in weights.quantized
    assert weights.shapes == dict.fromkeys(SCHEMES, (64, 96))
    assert weights.ideal_bytes > 0
    with pytest.raises(AssertionError, match="sfp8"):
        weights.quantized["sfp8"]
    with pytest.raises(KeyError):
        weights.integers["sfp8"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(64, 256), (3, 100), (1, 5)])
def test_a_form_is_known_before_the_weight_is_quantized(scheme: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        made = quantize_weights([("a", weight)], Recipe("mine", (Rule("*", scheme),))).tensors["a"]
    except BadInput:
        return  # this scheme cannot store the shape
    form = form_in(SCHEMES[scheme], shape)
    assert shape_of(form) == shape
    assert [(one.shape, one.dtype) for one in tensors_of(form)] == [(one.shape, one.dtype) for one in tensors_of(made)]
    if isinstance(made, IntegerWeight):
        assert isinstance(form, IntegerWeight)
        assert (form.bits, form.group, form.ideal_bytes) == (made.bits, made.group, made.ideal_bytes)


def test_a_form_has_no_values() -> None:
    form = form_of(torch.ones(2, 3))
    assert isinstance(form, torch.Tensor)
    with pytest.raises(TypeError, match="meta"):
        form.numpy()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_value_that_is_not_finite_is_refused_at_once(tmp_path: Path, value: float, name: str) -> None:
    path = write_checkpoint(tmp_path / "checkpoint")
    rewrite_tensors(path, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    with pytest.raises(BadInput, match=f"{name}: cannot be stored as .*: 1 values are NaN or infinite"):
        quantize(open_checkpoint(path), scheme_recipe("int4-block32"))
