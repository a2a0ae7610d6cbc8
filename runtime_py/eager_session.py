"""The reference session: the eager network with the ring cache."""

from collections.abc import Sequence

import numpy as np
import torch

from gemma3.cache import CacheLayout
from gemma3.model import Gemma3, new_cache
from runtime_py.session import Logits, check_ids, chunks


class EagerSession:
    """``layout`` must be of the ring style. The model is not copied: several sessions can share one."""

    def __init__(self, model: Gemma3, layout: CacheLayout) -> None:
        self._model = model.eval()
        self._layout = layout
        self.context = layout.context
        self.chunk = layout.chunk
        self.vocab_size = model.config.vocab_size
        self.reset()

    def reset(self) -> None:
        self._cache = new_cache(self._layout)
        self.position = 0
        self.logits: Logits = np.empty(0, np.float32)

    def step(self, token: int) -> Logits:
        return self.prefill([token])

    def prefill(self, ids: Sequence[int]) -> Logits:
        check_ids(ids, vocab_size=self.vocab_size, position=self.position, context=self.context)
        for piece in chunks(ids, self.chunk):
            logits = self.forced(piece)
        self.logits = logits[-1]
        return self.logits

    @torch.inference_mode()
    def forced(self, ids: Sequence[int]) -> Logits:
        """Feed at most ``chunk`` ids and return the logits after each: float32 [len(ids), V]."""
        tokens = torch.tensor(ids, dtype=torch.int64)[None]
        logits = self._model(tokens, self._cache, self.position)
        self.position += len(ids)
        return np.asarray(logits[0].numpy(), np.float32)
