"""An .onnx file, run by ONNX Runtime on the CPU. Works without torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.onnx.file import LAST_LOGITS, LOGITS_TO_KEEP, VISION_FILE, data_file, load_graph
from export.target import most_logits
from gemma3.cache import CacheDtype, CacheLayout
from gemma3.config import SLIDING, ModelConfig
from gemma3.errors import BadInput
from gemma3.images import Pixels, network_input
from runtime_py.sessions.protocol import Image, Logits, SoftTokens, calls, check_image, is_pixels

# runtime_py/__init__.py turns telemetry off before the import. This is for a process that had the library already.
ort.disable_telemetry_events()

PARTS = ("key", "value")
INTEGER_INPUTS = ("input_ids", "attention_mask", LOGITS_TO_KEEP)
CACHES = ("past_key_values.", "present.")


class OnnxSession:
    """A session over an .onnx. Its KV cache is one set of buffers, bound as past and present, and updated in place.

    With ``threads`` None, ONNX Runtime chooses their number. ``logits`` is how many the graph computes at a position
    (None: the whole vocabulary). Raises BadInput when the file is damaged, refers to anything unsafe, or does not have
    the caches and the vocabulary of ``layout`` and ``config``.

    The vision model is in memory only while a prompt's images are encoded, before the prompt is fed. Loading it takes
    little time compared with encoding an image, and on a phone the text model needs the memory.
    """

    def __init__(
        self,
        path: Path,
        layout: CacheLayout,
        config: ModelConfig,
        threads: int | None = None,
        *,
        logits: int | None = None,
    ) -> None:
        self._threads = threads
        logits = logits or config.vocab_size
        self._session = open_graph(path, threads)
        shapes = _cache_shapes(layout)
        expected: dict[str, Sequence[int | str]] = {
            "input_ids": [1, "sequence_length"],
            "attention_mask": [1, "total_sequence_length"],
            "logits": [1, 1, logits],
            **shapes,
            **{_present(name): shape for name, shape in shapes.items()},
        }
        _check_shapes(path, self._session, expected, layout.dtype)
        # A file that an older version exported has no such input.
        keeps = LOGITS_TO_KEEP in {value.name for value in self._session.get_overridable_initializers()}
        if keeps:
            _check_shapes(path, self._session, {LOGITS_TO_KEEP: [1], LAST_LOGITS: [1, LOGITS_TO_KEEP, logits]})
        if config.vision is not None:
            _check_shapes(path, self._session, {"soft_tokens": [1, "soft_tokens_length", config.hidden_size]})
        self.context = layout.context
        self.chunk = layout.chunk
        self.most_logits = most_logits(layout) if keeps else 1
        self._layout = layout
        self._window = config.sliding_window
        self.vocab_size = config.vocab_size
        self.vision = config.vision
        self.position = 0
        self.logits: Logits = np.empty(0, np.float32)

        self._vision_path = path.with_name(VISION_FILE)
        if config.vision is not None:
            load_graph(self._vision_path)
        self._no_soft_tokens = np.empty((1, 0, config.hidden_size), np.float32)
        self._mask = np.ones((1, layout.context), np.int64)
        self._logits = np.empty((1, self.most_logits, logits), np.float32)
        self._binding = self._session.io_binding()
        self._output = LAST_LOGITS if keeps else "logits"
        self._count = 0
        self._keep(1)
        # Kept here, because a binding does not own the memory it refers to.
        self._buffers = {name: np.zeros(shape, layout.dtype) for name, shape in shapes.items()}
        self._caches = [ort.OrtValue.ortvalue_from_numpy(buffer) for buffer in self._buffers.values()]
        for name, cache in zip(shapes, self._caches, strict=True):
            self._binding.bind_ortvalue_input(name, cache)
            self._binding.bind_ortvalue_output(_present(name), cache)

    def reset(self) -> None:
        """Go back to position 0. The buffers keep their bytes: the position alone decides which rows are read."""
        self.position = 0
        self.logits = np.empty(0, np.float32)

    def live(self, position: int) -> dict[str, NDArray[Any]]:
        """The OrtValues share their memory with these arrays, [1, K, rows, D] each."""
        kinds = [layer.kind for layer in self._layout.layers for _ in PARTS]
        return {
            name: buffer if kind == SLIDING else buffer[:, :, :position]
            for (name, buffer), kind in zip(self._buffers.items(), kinds, strict=True)
        }

    def resume(self, ids: Sequence[int], logits: Logits) -> None:
        self.position, self.logits = len(ids), logits

    def step(self, token: int) -> Logits:
        return self.prefill([token])

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        split = calls(self, ids, images)
        encoded = iter(self._encode(images))
        for call in split:
            if call.image is None:
                self._feed(np.array([call.ids], np.int64), self._no_soft_tokens)
            else:
                self._feed(np.empty((1, 0), np.int64), next(encoded))
        self.logits = self._logits[0, 0].copy()
        return self.logits

    def verify(self, ids: Sequence[int]) -> Logits:
        assert len(ids) <= self.most_logits
        (call,) = calls(self, ids)
        self._keep(len(ids))
        try:
            self._feed(np.array([call.ids], np.int64), self._no_soft_tokens)
        finally:
            self._keep(1)
        rows: Logits = self._logits[0, : len(ids)].copy()
        self.logits = rows[-1]
        return rows

    def can_rewind(self, written: int, position: int) -> bool:
        return self._layout.can_rewind(written, position, self._window)

    def rewind(self, position: int) -> None:
        assert self.can_rewind(self.position, position)
        self.position = position
        self.logits = np.empty(0, np.float32)

    def encode_image(self, image: Pixels) -> SoftTokens:
        assert self.vision is not None
        check_image(image, self.vision)
        (soft_tokens,) = self._encode([image])
        return soft_tokens[0]

    def _keep(self, count: int) -> None:
        """Let the next calls give the logits of the last ``count`` positions."""
        if count == self._count:
            return
        self._count = count
        self._binding.bind_ortvalue_output(self._output, ort.OrtValue.ortvalue_from_numpy(self._logits[:, :count]))
        if self.most_logits > 1:
            # In a variable of the session, as the soft tokens below.
            self._kept = ort.OrtValue.ortvalue_from_numpy(np.array([count], np.int64))
            self._binding.bind_ortvalue_input(LOGITS_TO_KEEP, self._kept)

    def _feed(self, tokens: NDArray[np.int64], soft_tokens: SoftTokens) -> None:
        """Feed tokens [1, S] or soft tokens [1, M, E]; the other one is empty."""
        end = self.position + tokens.shape[1] + soft_tokens.shape[1]
        self._binding.bind_cpu_input("input_ids", tokens)
        self._binding.bind_cpu_input("attention_mask", self._mask[:, :end])
        if self.vision is not None:
            # In a variable, because the binding does not own the memory while the graph runs. (bind_cpu_input does not
            # accept inputs with a default value.)
            soft_tokens_buffer = ort.OrtValue.ortvalue_from_numpy(soft_tokens)
            self._binding.bind_ortvalue_input("soft_tokens", soft_tokens_buffer)
        self._session.run_with_iobinding(self._binding)
        self.position = end

    def _encode(self, images: Sequence[Image]) -> list[SoftTokens]:
        """The soft tokens [1, T, E] of each image. An image that is given as soft tokens is passed through."""
        encoder = open_encoder(self._vision_path, self._threads) if any(map(is_pixels, images)) else None
        encoded: list[SoftTokens] = []
        for image in images:
            if encoder is not None and is_pixels(image):
                encoded += encoder.run(["soft_tokens"], {"pixels": network_input(image)})
            else:
                encoded.append(np.asarray(image[None], np.float32))
        return encoded


def open_encoder(path: Path, threads: int | None) -> ort.InferenceSession:
    """An ONNX Runtime session over the vision model's graph. Raises BadInput as ``open_graph`` does.

    It has no memory plan, because with one ONNX Runtime would keep 100 MB from the second image on.
    """
    return open_graph(path, threads, plan_memory=False)


def open_graph(path: Path, threads: int | None, plan_memory: bool = True) -> ort.InferenceSession:
    """An ONNX Runtime session over a graph. Raises BadInput when the file is damaged or refers to anything unsafe."""
    load_graph(path)  # raises for a graph that ONNX Runtime must not open
    options = ort.SessionOptions()
    options.enable_mem_pattern = plan_memory
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    graph: Path | bytes = path
    data = data_file(path)
    if data.is_symlink():
        # ONNX Runtime follows no link out of the graph's folder, but takes the content.
        graph = path.read_bytes()
        content = np.memmap(data, np.uint8, mode="r")
        options.add_external_initializers_from_files_in_memory([data.name], [content], [len(content)])
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path}: ONNX Runtime does not load it ({reason}); export it again") from None


def _cache_shapes(layout: CacheLayout) -> dict[str, list[int]]:
    return {
        f"past_key_values.{index}.{part}": list(layer.by_head)
        for index, layer in enumerate(layout.layers)
        for part in PARTS
    }


def _present(past: str) -> str:
    """The name of the output that belongs to a cache's input."""
    return past.replace("past_key_values", "present")


def _check_shapes(
    path: Path,
    session: ort.InferenceSession,
    expected: Mapping[str, Sequence[int | str]],
    caches: CacheDtype = "float32",
) -> None:
    """Raises BadInput unless the graph declares the ``expected`` shapes and types, by which buffers are allocated."""
    declared = {
        value.name: (value.type, value.shape)
        for value in (*session.get_inputs(), *session.get_overridable_initializers(), *session.get_outputs())
    }
    for name, shape in expected.items():
        kind, found = declared.get(name, (None, None))
        wanted = "tensor(int64)" if name in INTEGER_INPUTS else "tensor(float)"
        if caches == "int8" and name.startswith(CACHES):
            wanted = "tensor(int8)"
        if found != shape:
            raise BadInput(f"{path}: {name} is {found}, expected {shape}; the file is not the one of this layout")
        if kind != wanted:
            raise BadInput(f"{path}: {name} is {kind}, expected {wanted}; the file is not the one of this layout")
