"""Layers of weights that are read later: they must become the layers of the weights themselves."""

import copy

import pytest
import torch
from torch import Tensor, nn

from export.executorch.layers import Embedding, Linear, fill, flatten, later, rope_half, rows
from quant.integers import IntegerWeight, round_to_nearest
from quant.weights import OnDemand, Weight, Weights, form_of

FORMS: dict[str, tuple[int, int | None] | None] = {
    "int4 in groups": (4, 32),
    "int4": (4, None),
    "int8": (8, None),
    "float": None,
}


class Some(nn.Module):
    """Every kind of layer that holds a weight, over one table, whose head is tied."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        table = weights["table"]
        self.embedding, self.head = Embedding(table), Linear(table, torch.ones(64))
        self.halves = nn.ModuleList(Linear(rows(weights["table"], rope_half(2, 32, half))) for half in (0, 1))


def table(form: tuple[int, int | None] | None) -> Weight:
    values = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    return values.bfloat16() if form is None else round_to_nearest(values, *form)


@pytest.mark.parametrize("name", FORMS)
def test_filled_buffers_are_those_of_the_weight(name: str) -> None:
    weight = table(FORMS[name])
    expected = dict(Some({"table": weight}).named_buffers())
    model = Some(later({"table": weight}))
    state = dict(model.named_buffers())
    assert {key: (one.shape, one.dtype) for key, one in state.items()} == {
        key: (one.shape, one.dtype) for key, one in expected.items()
    }
    flatten(state, model)
    assert torch.equal(state["head.bias"], torch.ones(64))
    fill(state, model)
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def test_no_value_is_read_before_the_layers_are_filled() -> None:
    asked: list[str] = []
    weight = table((4, 32))

    def make(name: str) -> Weight:
        asked.append(name)
        return weight

    model = Some(later(OnDemand({"table": form_of(weight)}, make)))
    state = dict(model.named_buffers())
    flatten(state, model)
    assert asked == []
    part = {"head.codes": state["head.codes"]}
    fill(part, model)
    assert asked == ["table"]
    assert part.keys() == {"head.codes"}


def test_copies_of_flattened_buffers_take_no_room() -> None:
    model = Some(later({"table": round_to_nearest(torch.ones(64, 4096), 4, 32)}))
    state: dict[str, Tensor] = dict(model.named_buffers())
    flatten(state, model)
    copied = copy.deepcopy(state["head.codes"])
    assert copied.shape == (64, 4096)
    assert copied.untyped_storage().nbytes() == 1


def test_a_tied_table_is_one_buffer() -> None:
    """As without ``later``: torch.export then sees one constant, and the file holds the same bytes."""
    weight = table((8, None))
    assert isinstance(weight, IntegerWeight)
    for weights in ({"table": weight}, later({"table": weight})):
        model = Some(weights)
        assert model.embedding.get_buffer("table") is model.head.get_buffer("codes")
