from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma3.cache import cache_layout
from gemma3.errors import BadInput, DoesNotFit
from gemma3.images import Pixels
from quant.source import open_source
from runtime_py.sessions.eager import EagerSession, open_eager
from runtime_py.sessions.protocol import calls, check_ids, chunks
from tests.bundles import SEEING_CONFIG, write_checkpoint
from tests.function_session import counting
from tests.shapes import VISION_SHAPES, random_model, random_tokens, tiny_config, tiny_vision_config, with_images


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


def test_eager_session_equals_the_network_however_it_is_fed() -> None:
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


# Images: the tiny "like-4b" takes 28 × 28 pixels and has 4 soft tokens per image; the image token is 153.


def seeing_session(shape: str = "like-4b", context: int = 64, chunk: int = 16) -> EagerSession:
    config = tiny_vision_config(shape)
    return EagerSession(random_model(config), cache_layout(config, "ring", context, chunk))


def random_images(size: int, count: int) -> list[Pixels]:
    return list(np.random.default_rng(3).integers(256, size=(count, size, size, 3)).astype(np.uint8))


def test_calls_are_text_within_the_chunk_and_whole_images() -> None:
    session = seeing_session()
    images = random_images(28, 2)
    ids = with_images(session.model.config, [6, None, 2, None])
    split = calls(session, ids, images, text_chunk=4)
    assert [len(call.ids) for call in split] == [4, 3, 4, 4, 4, 1]
    assert [token for call in split for token in call.ids] == ids
    assert [call.image is not None for call in split] == [False, False, True, False, True, False]
    assert split[2].image is images[0]
    assert split[4].image is images[1]


@pytest.mark.parametrize("places", [0, 1, 3])
def test_there_must_be_one_run_of_image_tokens_for_each_image(places: int) -> None:
    session = seeing_session()
    ids = [5, *with_images(session.model.config, [None] * places)]
    with pytest.raises(BadInput, match=f"image tokens for {places} images?, but 2 given"):
        session.prefill(ids, random_images(28, 2))
    assert session.position == 0


@pytest.mark.parametrize("length", [3, 5])
def test_a_run_of_image_tokens_that_is_not_as_long_as_an_image_is_refused(length: int) -> None:
    session = seeing_session()
    with pytest.raises(BadInput, match=f"{length} image tokens in a row, but an image has 4"):
        session.prefill([5, *[153] * length, 6], random_images(28, 1))


@pytest.mark.parametrize(
    "image", [np.zeros((28, 28, 3), np.float32), np.zeros((3, 28, 28), np.uint8), np.zeros((27, 28, 3), np.uint8)]
)
def test_an_image_of_another_shape_or_kind_is_refused(image: Pixels) -> None:
    session = seeing_session()
    with pytest.raises(BadInput, match=r"expected uint8 \[28, 28, 3\]"):
        session.prefill(with_images(session.model.config, [3, None]), [image])


def test_an_image_for_a_text_only_model_is_refused() -> None:
    with pytest.raises(BadInput, match="1 image for a text-only model"):
        counting(8).prefill([1, 2], random_images(28, 1))


def test_an_image_that_does_not_fit_is_refused_with_the_counts_before_anything_is_fed() -> None:
    session = seeing_session(context=16)
    session.prefill([5, 6, 7])
    ids = with_images(session.model.config, [8, None])
    with pytest.raises(DoesNotFit, match=r"14 tokens \(1 image among them\) after position 3 are over .* of 16"):
        session.prefill(ids, random_images(28, 1))
    assert session.position == 3


@pytest.mark.parametrize("shape", VISION_SHAPES)
def test_eager_session_with_images_equals_the_network_however_it_is_fed(shape: str) -> None:
    session = seeing_session(shape, context=128)
    model, vision = session.model, session.vision
    assert vision is not None
    images = random_images(vision.image_size, 3)
    ids = with_images(model.config, [7, None, 5, None, None, 4])
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    full = model(torch.tensor([ids]), soft_tokens=model.encode_images(pixels))[0].numpy()
    assert abs(session.prefill(ids, images) - full[-1]).max() < 1e-4

    def feed(text_chunk: int) -> Sequence[float]:
        session.reset()
        errors = []
        for call in calls(session, ids, images, text_chunk):
            errors += [abs(logits - full[position]).max() for position, logits in session.call(call)]
        return errors

    assert max(feed(1)) < 1e-4
    assert max(feed(5)) < 1e-4


def test_an_opened_checkpoint_has_room_for_an_image_in_its_ring(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", SEEING_CONFIG)
    session = open_eager(open_source(checkpoint), context=96, chunk=2)
    assert session.chunk == 4
