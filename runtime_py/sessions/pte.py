"""A .pte file, run by ExecuTorch on the CPU, with the XNNPACK delegate and the thread pool of the Python wheel."""

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# ExecuTorch has its own threads. If torch's matrix library starts more threads in each of them, decoding takes twice as
# long. The variable is read when torch is imported, so it is set before that. ``torch.set_num_threads`` cannot do the
# same later: after a call of it, ExecuTorch's threads start those of torch's matrix library after all. A file is then
# ten times slower, and gives other bits each time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch  # loads libtorch, which the libraries below need

# The native library itself. The Python module around it also imports the compiler, which takes ten seconds.
from executorch.extension.pybindings import _portable_lib as runtime
from numpy.typing import NDArray

from export.executorch.caches import by_position
from export.target import FORWARD, LOGITS_STRIDE, TEXT_DECODER, TOKEN_EMBEDDING, VISION_ENCODER
from gemma3.cache import CacheLayout
from gemma3.config import SLIDING, ModelConfig
from gemma3.errors import BadInput
from gemma3.images import Pixels, network_input
from runtime_py.sessions.protocol import Image, Logits, SoftTokens, calls, soft_tokens_of

# The libraries with the operators of attention, the caches and the quantized embedding. Loading a library registers its
# operators.
OPERATORS = {
    "executorch.extension.llm.custom_ops": "*custom_ops_aot_lib.*",
    "executorch.kernels.quantized": "*quantized_ops_aot_lib.*",
}
for package, library in OPERATORS.items():
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    found = next(Path(spec.submodule_search_locations[0]).glob(library))
    torch.ops.load_library(str(found))  # type: ignore[no-untyped-call]

# What ExecuTorch writes to stderr without need: on every machine it looks for files that only ARM machines have, and
# reports that they are missing. It also reports every change of its thread pool.
NOISE = ("[cpuinfo_utils.cpp", "Resetting threadpool")

PARTS = ("keys", "values")


class PteSession:
    """A session over a .pte. The KV cache is inside the loaded program; its content beyond the position is never read.

    The vision model, which is most of a small multimodal model, is loaded when there is an image to encode. It is
    unloaded before the text model takes the image's soft tokens.

    With ``threads`` None, ExecuTorch chooses their number; a number applies to the whole process. Raises BadInput when
    the file does not load, or does not have the chunk and context of ``layout`` and the vocabulary of ``config``.
    """

    def __init__(self, path: Path, layout: CacheLayout, config: ModelConfig, threads: int | None = None) -> None:
        self._path = path
        with native_errors(path):
            if threads is not None:
                runtime._unsafe_reset_threadpool(threads)
            self._program = program = open_program(path)
            methods = {program.get_method_name(index) for index in range(program.num_methods())}
            self._decoder = program.load_method(FORWARD if config.vision is None else TEXT_DECODER)
            self._embedding = None if config.vision is None else program.load_method(TOKEN_EMBEDDING)
        self._encoder: Any = None
        expected = {
            "get_max_seq_len": layout.chunk,
            "get_max_context_len": layout.context,
            "get_vocab_size": config.vocab_size,
        }
        for name, value in expected.items():
            declared = program.load_method(name).call(())[0] if name in methods else None
            if declared != value:
                raise BadInput(
                    f"{path}: {name} is {declared}, expected {value}; the file is not the one of this layout"
                )
        self.config = config
        self._layout = layout
        self.context = layout.context
        self.chunk = layout.chunk
        # A file that an older version exported has no such method.
        name = "get_most_logits"
        self.most_logits = int(program.load_method(name).call(())[0]) if name in methods else 1
        self._window = config.sliding_window
        self.vocab_size = config.vocab_size
        self.vision = config.vision
        self.position = self._written = 0
        self.logits: Logits = np.empty(0, np.float32)

    def rows(self, layer: int, positions: range) -> tuple[Logits, Logits]:
        """Copies of one layer's keys and values at ``positions``, which its cache must still hold: [n, K, D] each."""
        names = (f"layers.{layer}.attention.keys", f"layers.{layer}.attention.values")
        buffers = [self._decoder.get_attribute(name).numpy() for name in names]
        caches = by_position(self._layout.layers[layer], *buffers)  # not copied
        keys, values = (cache[[position % len(cache) for position in positions]] for cache in caches)
        return keys, values

    def live(self, position: int) -> dict[str, NDArray[Any]]:
        """What is written into these arrays, [1, rows, K, D] for full-attention layers, is in the program's memory."""
        views: dict[str, NDArray[Any]] = {}
        for index, layer in enumerate(self._layout.layers):
            for part in PARTS:
                name = f"layers.{index}.attention.{part}"
                buffer = self._decoder.get_attribute(name).numpy()
                views[name] = buffer if layer.kind == SLIDING else buffer[:, :position]
        assert len(views) == self._decoder.method_meta().num_attributes(), "every buffer of the program must be here"
        return views

    def resume(self, ids: Sequence[int], logits: Logits) -> None:
        self.position = self._written = len(ids)
        self.logits = logits

    def reset(self) -> None:
        """Go back to position 0. The caches keep their bytes, because masks hide every slot not written since."""
        self.position = self._written = 0
        self.logits = np.empty(0, np.float32)

    def can_rewind(self, written: int, position: int) -> bool:
        return self._layout.can_rewind(max(written, self._written), position, self._window)

    def rewind(self, position: int) -> None:
        assert self.can_rewind(self.position, position)
        self._written = max(self._written, self.position)
        self.position = position
        self.logits = np.empty(0, np.float32)

    def encode_image(self, image: Pixels) -> SoftTokens:
        if self._encoder is None:
            with native_errors(self._path):
                self._encoder = self._program.load_method(VISION_ENCODER)
        output = self._encoder.call((torch.from_numpy(network_input(image)),), clone_outputs=False)[0]
        soft_tokens: SoftTokens = output[0, :, :-1].numpy().copy()  # without the last channel, the image flag
        return soft_tokens

    def step(self, token: int) -> Logits:
        return self.prefill([token])

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        split = calls(self, ids, images)
        encoded = iter([soft_tokens_of(self, image) for image in images])
        self._encoder = None
        for call in split:
            if call.image is not None:
                output = self._feed(image_embeddings(next(encoded)))
            else:
                output = self._feed_text(call.ids)
        self.logits = output[0].copy()
        return self.logits

    def verify(self, ids: Sequence[int]) -> Logits:
        assert len(ids) <= self.most_logits
        (call,) = calls(self, ids)
        self._encoder = None
        rows = self._feed_text(call.ids, len(ids)).copy()
        self.logits = rows[-1]
        return rows

    def _feed_text(self, ids: Sequence[int], count: int = 1) -> Logits:
        inputs = torch.tensor([ids], dtype=torch.int64)
        if self._embedding is not None:
            inputs = self._embedding.call((inputs,))[0]
        return self._feed(inputs, count)

    def _feed(self, inputs: torch.Tensor, count: int = 1) -> Logits:
        """Feed tokens [1, S] or embeddings [1, S, E + 1]. Returns the logits of the last positions, [count, V].

        They are the program's own memory, which the next call of any method overwrites.
        """
        start = torch.tensor([self.position + (count - 1) * LOGITS_STRIDE], dtype=torch.int64)
        output = self._decoder.call((inputs, start), clone_outputs=False)[0]
        self.position += inputs.shape[1]
        rows: Logits = output[0].numpy()
        return rows


def open_program(path: Path) -> Any:
    return runtime._load_program(str(path), program_verification=runtime.Verification.InternalConsistency)


def image_embeddings(soft_tokens: SoftTokens) -> torch.Tensor:
    """The text decoder's input for soft tokens [T, E]: float32 [1, T, E + 1], with 1 (image) in the last channel."""
    return torch.nn.functional.pad(torch.from_numpy(soft_tokens), (0, 1), value=1.0)[None]


@contextmanager
def native_errors(path: Path) -> Iterator[None]:
    """Turns a failure to load ``path`` into BadInput, with the reason that ExecuTorch writes to stderr.

    Without a failure, the output of ExecuTorch is passed on to stderr, except for NOISE.
    """
    written = io.StringIO()
    try:
        with redirect_stderr(written):  # ExecuTorch's bindings write through Python's
            yield
    except RuntimeError:
        failed = True
    else:
        failed = False
    lines = [line for line in written.getvalue().splitlines() if not any(noise in line for noise in NOISE)]
    if failed:
        reason = lines[-1] if lines else "no reason given"
        raise BadInput(f"{path}: ExecuTorch does not load it ({reason}); export it again")
    for line in lines:
        print(line, file=sys.stderr)
