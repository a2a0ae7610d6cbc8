"""Images for tiny models, and the comparison of a session that is fed with them with the eager network."""

from collections.abc import Sequence

import numpy as np
import torch

from gemma3.config import ModelConfig
from gemma3.images import Pixels, network_input
from gemma3.model import Gemma3
from runtime_py.sessions.protocol import Session
from tests.shapes import random_pixels

TOLERANCE = 1e-4


def random_images(config: ModelConfig, count: int) -> list[Pixels]:
    pixels = (random_pixels(config, count) * 255).round().to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).numpy())


def network_inputs(images: Sequence[Pixels]) -> torch.Tensor:
    """float32 [N, 3, S, S]"""
    return torch.cat([torch.from_numpy(network_input(image)) for image in images])


@torch.no_grad()
def eager_logits(model: Gemma3, ids: Sequence[int], images: Sequence[Pixels] = ()) -> torch.Tensor:
    """[len(ids), V], all ids in one call."""
    soft_tokens = model.encode_images(network_inputs(images)) if images else None
    return model(torch.tensor([ids]), soft_tokens=soft_tokens)[0]


def assert_steps_equal(
    session: Session, ids: Sequence[int], images: Sequence[Pixels], expected: torch.Tensor, chunk: int
) -> None:
    """A new session gives the logits ``expected`` [len(ids), V] after each call: up to ``chunk`` ids, or an image."""
    vision = session.vision
    assert vision is not None
    assert expected.std() > 0.1
    wanted, shown = expected.numpy(), iter(images)
    # Split here, not by ``runtime_py.sessions.protocol.calls``, which is itself under test.
    while (start := session.position) < len(ids):
        if ids[start] == vision.image_token_id:
            logits = session.prefill(ids[start : start + vision.tokens_per_image], [next(shown)])
        else:
            text = ids[start : start + chunk]
            end = text.index(vision.image_token_id) if vision.image_token_id in text else len(text)
            logits = session.prefill(text[:end])
        difference = np.abs(logits - wanted[session.position - 1]).max()
        assert difference <= TOLERANCE, f"chunks of {chunk}, position {session.position - 1}: {difference}"
