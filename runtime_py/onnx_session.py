"""An .onnx file run by ONNX Runtime on the CPU. Does not import torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from export.onnx_file import load_graph
from gemma3.cache import CacheLayout
from gemma3.config import ModelConfig
from gemma3.errors import BadInput
from runtime_py.session import Logits, Pixels, pieces

PARTS = ("key", "value")


class OnnxSession:
    """The cache is one set of buffers, bound as both past and present, which the graph updates in place.

    ``threads`` None leaves the number to ONNX Runtime. Raises BadInput when the file is damaged, refers to
    anything unsafe, or does not have the caches and vocabulary it should.
    """

    def __init__(self, path: Path, layout: CacheLayout, config: ModelConfig, threads: int | None = None) -> None:
        load_graph(path)  # refuses what ONNX Runtime should not be asked to open
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            reason = str(error).splitlines()[0]
            raise BadInput(f"{path}: ONNX Runtime does not load it ({reason}); export it again") from None
        shapes = _cache_shapes(layout)
        _check_shapes(path, self._session, shapes | {"logits": [1, 1, config.vocab_size]})
        self.context = layout.context
        self.chunk = layout.chunk
        self.vocab_size = config.vocab_size
        self.vision = config.vision
        self.position = 0
        self.logits: Logits = np.empty(0, np.float32)

        self._mask = np.ones((1, layout.context), np.int64)
        self._logits = np.empty((1, 1, config.vocab_size), np.float32)
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._logits))
        # Held here: a binding refers to memory that is not its own.
        self._caches = [ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for shape in shapes.values()]
        for name, buffer in zip(shapes, self._caches, strict=True):
            self._binding.bind_ortvalue_input(name, buffer)
            self._binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)

    def reset(self) -> None:
        """The buffers keep their bytes: which rows are read depends on the position alone."""
        self.position = 0
        self.logits = np.empty(0, np.float32)

    def step(self, token: int) -> Logits:
        return self.prefill([token])

    def prefill(self, ids: Sequence[int], images: Sequence[Pixels] = ()) -> Logits:
        for piece in pieces(self, ids, images):
            end = self.position + len(piece.ids)
            tokens = np.array([piece.ids], np.int64)
            self._binding.bind_cpu_input("input_ids", tokens)
            self._binding.bind_cpu_input("attention_mask", self._mask[:, :end])
            self._session.run_with_iobinding(self._binding)
            self.position = end
        self.logits = self._logits[0, 0].copy()
        return self.logits


def _cache_shapes(layout: CacheLayout) -> dict[str, list[int]]:
    return {
        f"past_key_values.{index}.{part}": [1, layout.num_key_value_heads, layer.slots, layout.head_dim]
        for index, layer in enumerate(layout.layers)
        for part in PARTS
    }


def _check_shapes(path: Path, session: ort.InferenceSession, expected: dict[str, list[int]]) -> None:
    """What the file declares must be what the layout says: the buffers are allocated by the layout."""
    declared = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    for name, shape in expected.items():
        if declared.get(name) != shape:
            raise BadInput(
                f"{path}: {name} is {declared.get(name)}, expected {shape}; the file is not the one of this layout"
            )
