"""Feeds a proof to a model on another machine: the calls as a script, and its answers as a session.

``check_session`` (runtime_py/proof/walks.py) decides what is fed. A ``Transcript`` stands in for the session and writes
down the calls. When the other machine has answered them, the same ``check_session`` meets a transcript that gives those
answers, and judges them with the limits of any other session.

A script has a line for each call: ``reset``, ``encode IMAGE SIDE``, ``text ID …``, ``image IMAGE`` (its soft tokens),
and ``logits`` where the logits are asked for. The answers to ``encode`` and ``logits`` are float32, in order.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.manifest import Manifest
from gemma3.images import Pixels
from runtime_py.sessions.protocol import Image, Logits, SoftTokens, calls, is_pixels


class Transcript:
    """A session of ``format`` that writes down what it is fed. Its answers are ``answers``; without them, zeros.

    ``images`` are those that may be fed.
    """

    def __init__(
        self,
        manifest: Manifest,
        format: str,
        images: NDArray[np.uint8],
        answers: NDArray[np.float32] | None = None,
    ) -> None:
        layout = manifest.artifacts[format].cache
        self.context, self.chunk = layout.context, layout.chunk
        self.vocab_size, self.vision = manifest.model.vocab_size, manifest.model.vision
        self.position = 0
        self.logits: Logits = np.empty(0, np.float32)
        self.lines: list[str] = []
        self._width = manifest.model.hidden_size
        self._images = images
        self._encoded: list[tuple[SoftTokens, int]] = []
        self._answers, self._used = answers, 0

    def reset(self) -> None:
        self.lines.append("reset")
        self.position = 0
        self.logits = np.empty(0, np.float32)

    def step(self, token: int) -> Logits:
        return self.prefill([token])

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        split = calls(self, ids, images)
        encoded = iter([self.encode_image(image) if is_pixels(image) else image for image in images])
        for call in split:
            if call.image is None:
                self.lines.append("text " + " ".join(map(str, call.ids)))
            else:
                self.lines.append(f"image {self._number_of(next(encoded))}")
            self.position += len(call.ids)
        self.lines.append("logits")
        self.logits = self._answer(self.vocab_size)
        return self.logits

    def encode_image(self, image: Pixels) -> SoftTokens:
        assert self.vision is not None
        number = next(index for index, one in enumerate(self._images) if np.array_equal(one, image))
        self.lines.append(f"encode {number} {self.vision.image_size}")
        soft_tokens = self._answer(self.vision.tokens_per_image * self._width).reshape(-1, self._width)
        self._encoded.append((soft_tokens, number))
        return soft_tokens

    def _number_of(self, soft_tokens: Image) -> int:
        return next(number for one, number in self._encoded if one is soft_tokens)

    def _answer(self, count: int) -> NDArray[np.float32]:
        start, self._used = self._used, self._used + count
        if self._answers is None:
            return np.zeros(count, np.float32)
        found = self._answers[start : self._used]
        if len(found) < count:
            raise ValueError(f"{len(self._answers)} numbers answered, {self._used} needed")
        return found

    def finish(self) -> None:
        """Raises ValueError if there are more answers than were asked for."""
        if self._answers is not None and len(self._answers) != self._used:
            raise ValueError(f"{len(self._answers)} numbers answered, {self._used} needed")


def write_pixels(path: Path, inputs: Sequence[NDArray[np.float32]]) -> None:
    """The images as the vision model takes them, one after another."""
    path.write_bytes(b"".join(one.tobytes() for one in inputs))
