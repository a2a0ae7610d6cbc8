"""Measure the 4B's vision model with random weights: peak memory, and time compared with transformers.

    python -m scripts.bench_vision onnx|pte [--layers 27] [--threads 2] [--rounds 3]

Each file first encodes an image in a process of its own, which gives its peak memory. Then the files and transformers
encode the same image in turns, so that any other load on the machine affects all of them alike.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.onnx.layers import write_graph
from export.onnx.vision import vision_model
from gemma3.config import ModelConfig, parse_config
from quant.methods import quantize_weights
from quant.recipe import KEPT, VISION_LINEARS, Recipe
from quant.weights import Weight
from runtime_py.proof.golden import relative_rms
from runtime_py.report import table
from runtime_py.sessions.onnx import open_encoder
from scripts.random_checkpoint import SHAPES, random_weights

PARTS = ("vision_tower.", "multi_modal_projector.")
INT8 = Recipe("int8", (*KEPT, *VISION_LINEARS))

# What runs in a process of its own. It prints VmHWM, because the peak that getrusage reports starts from the parent's.
ALONE = {
    "onnx": """
import sys
from pathlib import Path
import numpy as np
from runtime_py.sessions.onnx import open_encoder
encoder = open_encoder(Path(sys.argv[1]), int(sys.argv[2]))
shape = encoder.get_inputs()[0].shape
encoder.run(None, {"pixels": np.random.default_rng(0).random(shape, np.float32)})
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
""",
    "pte": """
import sys
from pathlib import Path
from export.target import VISION_ENCODER
from runtime_py.sessions.pte import open_program, runtime, torch
runtime._unsafe_reset_threadpool(int(sys.argv[2]))
encoder = open_program(Path(sys.argv[1])).load_method(VISION_ENCODER)
shape = encoder.method_meta().input_tensor_meta(0).sizes()
encoder.call((torch.rand(shape),), clone_outputs=False)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
""",
}

Pixels = NDArray[np.float32]  # [1, 3, S, S] in 0 … 1
SoftTokens = NDArray[np.float32]  # [1, T, E]
Encode = Callable[[Pixels], SoftTokens]


def write(format: str, config: ModelConfig, weights: dict[str, Weight], path: Path) -> None:
    """Write the vision model alone."""
    if format == "onnx":
        write_graph(path, "gemma3-vision", weights, (), lambda graph: vision_model(graph, config))
    else:
        write_pte(config, weights, path)


def write_pte(config: ModelConfig, weights: dict[str, Weight], path: Path) -> None:
    from export.executorch.lower import lower, trace_encoder

    with torch.no_grad(), path.open("wb") as stream:
        lower(trace_encoder(config, weights), {}).write_to_file(stream)


def read(format: str, path: Path, threads: int) -> Encode:
    if format == "pte":
        return read_pte(path, threads)
    session = open_encoder(path, threads)

    def encode(pixels: Pixels) -> SoftTokens:
        soft_tokens: SoftTokens = session.run(["soft_tokens"], {"pixels": pixels})[0]
        return soft_tokens

    return encode


def read_pte(path: Path, threads: int) -> Encode:
    from executorch.extension.pybindings import _portable_lib as runtime

    from export.target import VISION_ENCODER
    from runtime_py.sessions.pte import open_program

    runtime._unsafe_reset_threadpool(threads)
    encoder = open_program(path).load_method(VISION_ENCODER)

    def encode(pixels: Pixels) -> SoftTokens:
        torch.set_num_threads(1)  # MKL's threads within each of ExecuTorch's: see runtime_py/sessions/pte.py
        soft_tokens: SoftTokens = encoder.call((torch.from_numpy(pixels),))[0][..., :-1].numpy()
        torch.set_num_threads(threads)
        return soft_tokens

    return encode


def transformers_encoder(described: dict[str, Any], weights: dict[str, Tensor], attention: str) -> Encode:
    from transformers import Gemma3Config, SiglipVisionModel
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    config: Any = Gemma3Config(**described, attn_implementation=attention)  # type: ignore[call-arg]
    tower: nn.Module = SiglipVisionModel(config.vision_config)
    projector: nn.Module = Gemma3MultiModalProjector(config)
    modules: list[tuple[nn.Module, str]] = [
        (tower, "vision_tower.vision_model."),
        (projector, "multi_modal_projector."),
    ]
    for module, prefix in modules:
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        module.eval().load_state_dict(own, assign=True)

    @torch.inference_mode()
    def encode(pixels: Pixels) -> SoftTokens:
        soft_tokens: SoftTokens = projector(tower(torch.from_numpy(pixels * 2 - 1)).last_hidden_state).numpy()
        return soft_tokens

    return encode


def peak_bytes(format: str, path: Path, threads: int) -> int:
    """Peak memory of a process that loads the file and encodes one image."""
    command = [sys.executable, "-c", ALONE[format], str(path), str(threads)]
    return 1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def take_turns(
    encoders: dict[str, Encode], pixels: Pixels, rounds: int
) -> tuple[dict[str, tuple[float, float]], dict[str, SoftTokens]]:
    """By name: the median (seconds on the clock, CPU seconds), and the soft tokens.

    The first round is the warm-up, unless it is the only one.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in encoders}
    found = {}
    for _ in range(rounds):
        for name, encode in encoders.items():
            start = time.perf_counter(), time.process_time()
            found[name] = encode(pixels)
            taken[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    counted = {name: times[1:] or times for name, times in taken.items()}
    medians = {
        name: (statistics.median(wall for wall, _ in times), statistics.median(cpu for _, cpu in times))
        for name, times in counted.items()
    }
    return medians, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("format", choices=ALONE)
    parser.add_argument("--layers", type=int, default=27, help="of the vision model; the 4B has 27")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="the first is the warm-up, unless it is the only one")
    parser.add_argument(
        "--attention", choices=["sdpa", "eager"], default="sdpa", help="the attention implementation of transformers"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    described = copy.deepcopy(SHAPES["4b"])
    described["vision_config"]["num_hidden_layers"] = arguments.layers
    config = parse_config(described)
    weights = {name: weight.float() for name, weight in random_weights(described, 0, PARTS).items()}
    stored: dict[str, dict[str, Weight]] = {
        "fp32": dict(weights),
        "int8": dict(quantize_weights(weights.items(), INT8).tensors),
    }

    name = f"transformers ({arguments.attention})"
    encoders = {name: transformers_encoder(described, weights, arguments.attention)}
    sizes, peaks = {}, {}
    with tempfile.TemporaryDirectory() as directory:
        for form, tensors in stored.items():
            path = Path(directory) / f"{form}.{arguments.format}"
            write(arguments.format, config, tensors, path)
            sizes[form] = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
            peaks[form] = peak_bytes(arguments.format, path, arguments.threads)
            encoders[form] = read(arguments.format, path, arguments.threads)
        size = described["vision_config"]["image_size"]
        pixels = np.random.default_rng(0).random((1, 3, size, size), np.float32)
        times, found = take_turns(encoders, pixels, arguments.rounds)

    header = ["", "file, MB", "peak, MB", "seconds", "ratio", "CPU seconds", "CPU ratio", "relative RMS"]
    rows = [
        [
            encoder,
            f"{sizes[encoder] / 1e6:.0f}" if encoder in sizes else "",
            f"{peaks[encoder] / 1e6:.0f}" if encoder in peaks else "",
            f"{wall:.1f}",
            f"{wall / times[name][0]:.2f}",
            f"{cpu:.1f}",
            f"{cpu / times[name][1]:.2f}",
            f"{relative_rms(found[encoder], found[name]):.1e}",
        ]
        for encoder, (wall, cpu) in times.items()
    ]
    print(f"{arguments.layers} layers, {arguments.threads} threads")
    print(table(header, rows))


if __name__ == "__main__":
    main()
