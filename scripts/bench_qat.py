"""Measure what fake quantization costs: how much longer a training step takes with it than without it.

    python -m scripts.bench_qat demo --repetitions 10

A step consists of the teacher's and the student's forward passes, the loss over the whole vocabulary, the gradients
and AdamW. The schemes take turns within one run.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gemma3.checkpoint import load_model, open_checkpoint, resolve_checkpoint
from quant.methods import quantize_weights
from quant.qat.fake import prepare
from quant.qat.loss import Distillation
from quant.recipe import scheme_recipe
from runtime_py.report import table

RECIPES = (("int4-block32", "int8"), ("int4-block32", "int4"), ("int4-channel", "int8"), ("sfp8", "sfp8"))


def step(student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Callable[[], None]:
    """A training step on ``tokens`` as a function. The learning rate is 0, so every call does the same work."""
    distillation = Distillation(student, teacher)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.0)

    def run() -> None:
        (distillation(tokens)[0] / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a directory, demo or demo-vision")
    parser.add_argument("--batch", type=int, default=4, help="rows per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument(
        "--repetitions", type=int, default=10, help="measured steps of each scheme; one more is the warm-up"
    )
    args = parser.parse_args()
    checkpoint = open_checkpoint(resolve_checkpoint(args.checkpoint))
    tokens = torch.randint(checkpoint.config.vocab_size, (args.batch, args.length))
    teacher = load_model(checkpoint)
    plain = load_model(checkpoint)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("norm" not in name)  # as in training
    steps = {"none": step(plain, teacher, tokens)}
    for scheme, embedding in RECIPES:
        start = quantize_weights(checkpoint.items(), scheme_recipe(scheme, embedding))
        steps[f"{scheme}, embedding {embedding}"] = step(prepare(load_model(checkpoint), start), teacher, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repetitions + 1):
        for name, run in steps.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    rows = [(name, f"{1000 * median:.0f}", f"{median / medians['none']:.2f}") for name, median in medians.items()]
    print(f"{args.batch} × {args.length} tokens per step, {torch.get_num_threads()} threads")
    print(table(("fake quantization", "ms per step (median)", "ratio"), rows))


if __name__ == "__main__":
    main()
