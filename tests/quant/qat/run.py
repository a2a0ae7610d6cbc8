"""One tiny training run in a process of its own, alone or under torchrun: ``python -m tests.quant.qat.run --help``."""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemma3.config import ModelConfig
from gemma3.model import Gemma3
from quant.methods import quantize_weights
from quant.qat.loop import Settings, train
from quant.qat.processes import processes
from quant.recipe import scheme_recipe
from quant.weights import QuantizedWeights
from tests.shapes import random_model, random_pixels, random_tokens, tiny_config, tiny_vision_config, with_images

CONFIG = tiny_config("all-local", vocab_size=64, hidden_size=32, intermediate_size=32, head_dim=16, num_hidden_layers=2)
LENGTH = 16
SEEING = tiny_vision_config()


def networks(config: ModelConfig = CONFIG, scheme: str = "int4-block32") -> tuple[Gemma3, Gemma3, QuantizedWeights]:
    """(student, teacher, the student's weights rounded to nearest)."""
    student = random_model(config)
    start = quantize_weights(student.named_parameters(), scheme_recipe(scheme))
    return student, random_model(config), start


def rows(count: int = 12, seed: int = 0) -> Tensor:
    return torch.tensor([random_tokens(CONFIG, LENGTH, seed=seed + row) for row in range(count)])


def illustrated(rows: int) -> tuple[Tensor, list[Tensor], list[int]]:
    """Tokens, each row's images (one, none, two, one, …), and the ids whose predictions are not trained."""
    assert SEEING.vision is not None
    kinds: list[list[int | None]] = [[3, None, 18 - 3], [24], [1, None, 2, None, 9]]
    tokens = [with_images(SEEING, kinds[row % 3], seed=10 * row) for row in range(rows)]
    pixels = [random_pixels(SEEING, kinds[row % 3].count(None), seed=row) for row in range(rows)]
    images = [(255 * row).to(torch.uint8) for row in pixels]
    return torch.tensor(tokens), images, [SEEING.vision.image_token_id]


def flat(weights: QuantizedWeights) -> dict[str, Tensor]:
    """Codes, dequantized values and floats, to be compared or saved."""
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.tensors.items():
        if isinstance(weight, Tensor):
            tensors[name] = weight
        else:
            tensors |= {f"{name}.codes": weight.codes, f"{name}.dequantized": weight.dequantize()}
    return tensors


def once(run: Path, out: Path, steps: int, save_every: int, see: bool = False) -> None:
    """Begin or resume the run, finish it, and save its weights at ``out``."""
    torch.set_num_threads(1)
    with processes() as (_, first):
        student, teacher, start = networks(SEEING, "int4-channel") if see else networks()
        tokens, images, ignored = illustrated(12) if see else (rows(), None, [])
        weights = train(
            student,
            teacher,
            start,
            tokens,
            Settings(steps=steps, batch=4, warmup=0),
            run,
            images=images,
            ignored=ignored,
            resume=any(run.glob("step-????????")),
            save_every=save_every,
            micro_batch=1,
        )
        if first:
            save_file(flat(weights), out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--images", action="store_true")
    args = parser.parse_args()
    once(args.run, args.out, args.steps, args.save_every, args.images)


if __name__ == "__main__":
    main()
