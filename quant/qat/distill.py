"""Quantization-aware training of a checkpoint: from opened checkpoints to a quantized checkpoint on disk."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gemma3.checkpoint import Checkpoint, load_model, resolve_checkpoint
from gemma3.data import pack
from gemma3.errors import BadInput
from gemma3.host.atomic import check_name, refuse_target
from gemma3.images import Pixels
from quant.methods import quantize_weights
from quant.qat.loop import Settings, train
from quant.qat.processes import processes
from quant.quantize import in_recipe
from quant.recipe import Recipe
from quant.source import QuantizedCheckpoint, full_precision, open_source
from quant.stored import save_quantized

log = logging.getLogger(__name__)

# The training data that comes with the demo checkpoints, made by scripts/qat_sample.py and scripts/demo_images.py.
SAMPLE = ("qat.txt", "qat.jsonl", "qat_images.jsonl")


@dataclass(frozen=True)
class Sources:
    """What a training run starts from.

    ``checkpoint`` is the model to train, ``init`` a quantized form of it whose codes are the start (None: those of
    ``mse``), and ``teacher`` the model to learn from (None: the checkpoint itself).
    """

    checkpoint: Checkpoint
    init: QuantizedCheckpoint | None = None
    teacher: Checkpoint | None = None


def open_sources(model: str, init: Path | None, teacher: str | None) -> Sources:
    """Open the checkpoints of a training run; ``model`` and ``teacher`` may also name a demo checkpoint.

    Raises BadInput for anything that is not a checkpoint, for a quantized ``model`` or ``teacher``, and for an ``init``
    that is not quantized.
    """
    start = None if init is None else open_source(init)
    if start is not None and not isinstance(start, QuantizedCheckpoint):
        raise BadInput(f"{init}: is not quantized; give a directory that `gemma-edge quantize` wrote")
    return Sources(
        full_precision(open_source(resolve_checkpoint(model))),
        start,
        None if teacher is None else full_precision(open_source(resolve_checkpoint(teacher))),
    )


def distill(
    sources: Sources,
    recipe: Recipe,
    out: Path,
    settings: Settings,
    *,
    data: Sequence[Path] = (),
    length: int = 256,
    pan_and_scan: bool = False,
    micro_batch: int | None = None,
    save_every: int = 100,
    resume: bool = False,
) -> None:
    """Train a checkpoint in ``recipe``. The quantized checkpoint ``out`` appears when the training is done.

    Training reads rows of ``length`` tokens of the files ``data`` (see ``gemma3.data.pack``), or of the sample that
    comes with a demo checkpoint. The directory beside ``out`` with ".training" after its name keeps the state for
    ``resume``, until ``out`` exists. The other arguments are those of ``train``.

    Under torchrun every process calls this function. Raises BadInput for files that cannot be used or do not belong
    together, and what ``train`` and ``save_quantized`` raise.
    """
    refuse_target(out)
    check_name(run := out.with_name(f"{out.name}.training"))
    checkpoint, init, teacher = sources.checkpoint, sources.init, sources.teacher
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    files = data or [checkpoint.path / name for name in SAMPLE if (checkpoint.path / name).is_file()]
    if not files:
        raise BadInput("training needs text; give files with --data")
    if init is None:
        start = quantize_weights(checkpoint.items(), recipe)
    elif init.config != config:
        raise BadInput(
            f"{init.path}: its config.json is not that of {checkpoint.path}; give a quantized form of that checkpoint"
        )
    else:
        start = in_recipe(init, recipe).weights
    teaching = teacher or checkpoint
    length = min(length, config.max_position_embeddings)
    rows = pack(files, tokenizer, length, config, pan_and_scan=pan_and_scan, chat=checkpoint.chat)
    images, ignored, vision = None, [tokenizer.pad_id], config.vision
    if vision is not None and any(rows.images):
        if teaching.config.vision != vision:
            raise BadInput(
                f"{teaching.path}: its vision model is not that of {checkpoint.path}; give a teacher with the same one"
            )
        images = [as_tensor(row, vision.image_size) for row in rows.images]
        ignored.append(vision.image_token_id)
    with processes() as (device, first):
        if first:
            shown = f" with {sum(map(len, rows.images))} images" if any(rows.images) else ""
            log.info("%d rows of %d tokens%s, %s, %d steps", *rows.tokens.shape, shown, recipe.name, settings.steps)
        weights = train(
            load_model(checkpoint).to(device),
            load_model(teaching).to(device),
            start,
            torch.from_numpy(rows.tokens),
            settings,
            run,
            images=images,
            ignored=ignored,
            resume=resume,
            save_every=save_every,
            micro_batch=micro_batch,
            identity={"recipe": recipe.name, "rules": "; ".join(f"{r.pattern} {r.scheme}" for r in recipe.rules)},
        )
        if first:
            save_quantized(out, weights, recipe, "qat", source=checkpoint.path)
            shutil.rmtree(run, ignore_errors=True)


def as_tensor(images: Sequence[Pixels], size: int) -> Tensor:
    """uint8 [n, 3, size, size] of n images [size, size, 3]; n may be 0."""
    return torch.from_numpy(np.array(images, np.uint8).reshape(-1, size, size, 3)).permute(0, 3, 1, 2)
