"""Quantization-aware training of a checkpoint: the files it starts from, the network in between, the files it gives."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.source import open_source
from gemma3.checkpoint import load_model, open_checkpoint
from gemma3.data import Picture, pack
from gemma3.errors import BadInput
from gemma3.tokenizer import Tokenizer
from quant.atomic import refuse_target
from quant.qat import Settings, processes, train
from quant.recipe import Recipe, quantize
from quant.stored import is_quantized, save_quantized

log = logging.getLogger(__name__)

# The demo checkpoints bring their own, made by scripts/qat_sample.py and scripts/demo_images.py.
SAMPLE = ("qat.txt", "qat.jsonl", "qat_images.jsonl")


def distill_checkpoint(
    path: Path,
    recipe: Recipe,
    out: Path,
    settings: Settings,
    *,
    data: Sequence[Path],
    length: int,
    pan_and_scan: bool = False,
    init: Path | None = None,
    teacher: Path | None = None,
    micro_batch: int | None = None,
    save_every: int = 100,
    resume: bool = False,
) -> None:
    """Train the checkpoint at ``path`` in ``recipe``; the quantized checkpoint ``out`` appears when it is done.

    Training starts from the codes of the quantized checkpoint ``init``, or else rounded to nearest, on rows of
    ``length`` tokens of ``data`` (see ``gemma3.data.pack``). The teacher is the checkpoint itself unless another is
    named. The directory beside ``out`` with ".training" after its name keeps what a resumption needs, until ``out``
    is there.

    Under torchrun every process calls this. Raises BadInput for files that cannot be used or do not belong together,
    and what ``train`` and ``save_quantized`` raise.
    """
    refuse_target(out)
    if is_quantized(path):
        raise BadInput(
            f"{path}: is quantized already; give the checkpoint it was made of (--init starts from this one)"
        )
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    tokenizer = Tokenizer(path)
    files = data or [path / name for name in SAMPLE if (path / name).is_file()]
    if not files:
        raise BadInput("training needs text; give files with --data")
    start = quantize(checkpoint.items(), recipe)
    if init is not None:
        started = open_source(init, recipe)
        if started.config != config:
            raise BadInput(f"{init}: its config.json is not that of {path}; give a quantized form of that checkpoint")
        start = started.weights
    teaching = checkpoint if teacher is None else open_checkpoint(teacher)
    length = min(length, config.max_position_embeddings)
    rows = pack(files, tokenizer, length, config, pan_and_scan=pan_and_scan)
    images, ignored, vision = None, [tokenizer.pad_id], config.vision
    if vision is not None and any(rows.images):
        if teaching.config.vision != vision:
            raise BadInput(f"{teaching.path}: does not see as {path} does; give a teacher with the same image encoder")
        images = [as_tensor(row, vision.image_size) for row in rows.images]
        ignored.append(vision.image_token_id)
    run = out.with_name(f"{out.name}.training")
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
            save_quantized(out, weights, recipe, "qat", source=path)
            shutil.rmtree(run, ignore_errors=True)


def as_tensor(images: Sequence[Picture], size: int) -> Tensor:
    """uint8 [n, 3, size, size]; n may be 0."""
    return torch.from_numpy(np.array(images, np.uint8).reshape(-1, size, size, 3)).permute(0, 3, 1, 2)
