import pytest
import torch

from gemma3.cache import cache_layout
from gemma3.errors import BadInput, DoesNotFit
from runtime_py.eager_session import EagerSession
from runtime_py.session import check_ids, chunks
from tests.shapes import random_model, random_tokens, tiny_config


def test_no_ids_are_refused() -> None:
    with pytest.raises(BadInput, match="empty"):
        check_ids([], vocab_size=8, position=0, context=4)


@pytest.mark.parametrize("token", [-1, 8])
def test_an_id_outside_the_vocabulary_is_named(token: int) -> None:
    with pytest.raises(BadInput, match=rf"id {token} at index 1 .* of 8"):
        check_ids([7, token], vocab_size=8, position=0, context=4)


def test_the_last_position_is_usable_and_the_next_is_not() -> None:
    check_ids([1, 1], vocab_size=8, position=2, context=4)
    with pytest.raises(DoesNotFit, match="3 tokens after position 2 are over the context of 4"):
        check_ids([1, 1, 1], vocab_size=8, position=2, context=4)


def test_chunks_keep_order() -> None:
    assert [list(piece) for piece in chunks(range(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_eager_session_is_the_network_however_it_is_fed() -> None:
    config = tiny_config(sliding_window=8)
    model = random_model(config)
    session = EagerSession(model, cache_layout(config, "ring", context=64, chunk=5))
    ids = random_tokens(config, 50)
    full = model(torch.tensor([ids]))[0].numpy()
    session.prefill(ids[:23])
    assert abs(session.logits - full[22]).max() < 1e-4
    for position in range(23, 50):
        assert abs(session.step(ids[position]) - full[position]).max() < 1e-4


def test_eager_session_refuses_before_it_feeds_and_resets_to_the_start() -> None:
    config = tiny_config(sliding_window=8)
    session = EagerSession(random_model(config), cache_layout(config, "ring", context=16, chunk=4))
    ids = random_tokens(config, 16)
    first = session.prefill(ids[:6]).copy()
    with pytest.raises(DoesNotFit):
        session.prefill(ids[:11])
    assert session.position == 6
    session.reset()
    assert session.position == 0
    assert (session.prefill(ids[:6]) == first).all()
