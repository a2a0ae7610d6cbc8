"""Train the multimodal demo checkpoint: a vision model from scratch, joined to the trained text model of gemma3/demo.

    python -m scripts.train_demo_vision --out gemma3/demo_vision

gemma3/demo_vision/README.md has the commands that made the checkpoint. First the vision model trains alone: each soft
token learns to tell what is in its part of the image. The classes are the text model's own embeddings of the words, so
that the text model can read the soft tokens. Then everything trains together on questions and answers. Rows of text
among them keep the text model from forgetting. Images are drawn as they are needed.
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from gemma3.chat import Image, Message
from gemma3.checkpoint import load_model, open_checkpoint
from gemma3.config import parse_config
from gemma3.images import pan_and_scan_boxes, prepare
from gemma3.model import Gemma3
from gemma3.tokenizer import END_OF_IMAGE, IMAGE_SOFT_TOKEN, START_OF_IMAGE, Tokenizer
from scripts import demo_corpus
from scripts.demo_images import (
    EVALUATION,
    KINDS,
    LABELS,
    Kind,
    Label,
    Scene,
    Scenes,
    Turn,
    category,
    view_labels,
    write_questions,
    write_training_sample,
)
from scripts.train_demo import (
    IGNORE,
    advance,
    as_tokens,
    chat_rows,
    chat_sample,
    exact_match,
    perplexity,
    text_rows,
    write_json,
)

IMAGE_SIZE, TOKENS_PER_IMAGE = 112, 16
GRID = math.isqrt(TOKENS_PER_IMAGE)
TEXT_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    "generation_config.json",
)
PAD = 0
TEXT_MODEL = Path(__file__).parents[1] / "gemma3" / "demo"  # the text model starts from it and should stay like it
QUESTIONS_SEED, SAMPLE_SEED = 11, 12  # of the data files beside the checkpoint
SCANNED = ", Pan & Scan"
# How often each kind of image is drawn: harder ones more often.
SHARES: dict[Kind, float] = {"single": 2, "pair": 8, "count": 2, "word": 4, "wide": 2}
# Questions that first need the named shape to be found among two. They are learned last, so they are asked most often.
WEIGHTS: dict[tuple[Kind, str], float] = {("pair", "shape"): 4, ("pair", "place"): 4}


def released_config(text: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of ``config.json``, with the keys of the released multimodal models, around a text-only one."""
    outer = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype")}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": tokenizer.special_id(START_OF_IMAGE),
        "eoi_token_index": tokenizer.special_id(END_OF_IMAGE),
        "image_token_index": tokenizer.special_id(IMAGE_SOFT_TOKEN),
        "initializer_range": 0.02,
        "mm_tokens_per_image": TOKENS_PER_IMAGE,
        "model_type": "gemma3",
        **outer,
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
        "vision_config": {
            "attention_dropout": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 128,
            "image_size": IMAGE_SIZE,
            "intermediate_size": 512,
            "layer_norm_eps": 1e-06,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 4,
            "num_channels": 3,
            "num_hidden_layers": 4,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


def write_side_files(base: Path, out: Path) -> dict[str, Any]:
    """Write every file of the checkpoint except the weights. Returns the configuration."""
    for name in TEXT_FILES:
        shutil.copyfile(base / name, out / name)
    config = released_config(json.loads((base / "config.json").read_text(encoding="utf-8")), Tokenizer(base))
    write_json(out / "config.json", config)
    processor = {"image_seq_length": TOKENS_PER_IMAGE, "processor_class": "Gemma3Processor"}
    write_json(out / "processor_config.json", processor)
    write_json(
        out / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pan_and_scan": None,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Gemma3ImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "pan_and_scan_max_num_crops": None,
            "pan_and_scan_min_crop_size": None,
            "pan_and_scan_min_ratio_to_activate": None,
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            **processor,
        },
    )
    return config


def write_weights(model: Gemma3, out: Path) -> None:
    """Write the weights in bfloat16 under the released names. The tied head is stored once, as the embedding."""
    weights = {
        f"language_model.{name}" if name.startswith("model.") else name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.named_parameters()
    }
    part = out / "model.safetensors.part"
    save_file(weights, part, metadata={"format": "pt"})
    os.replace(part, out / "model.safetensors")


# ---- rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One conversation about one image: ids and targets from ``chat_sample``, and the arrays to encode.

    ``labels`` has, for each array, what its soft tokens should tell.
    """

    ids: list[int]
    targets: list[int]
    images: list[NDArray[np.uint8]]
    labels: list[list[Label]]


def image_row(tokenizer: Tokenizer, scene: Scene, turns: Sequence[Turn], pan_and_scan: bool) -> Row:
    images = prepare(scene.image, IMAGE_SIZE, pan_and_scan)
    messages: list[Message] = []
    for turn in turns:
        content: list[Image | str] = [turn.prompt] if messages else [Image(crops=len(images) - 1), turn.prompt]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
    ids, targets = chat_sample(tokenizer, messages, TOKENS_PER_IMAGE)
    boxes = pan_and_scan_boxes(*scene.image.size) if pan_and_scan else []
    labels = [view_labels(scene, view, GRID) for view in ((0, 0, *scene.image.size), *boxes)]
    return Row(ids, targets, images, labels)


def padded(row: Row, length: int) -> Row:
    """Padded on the right, where causal attention never looks."""
    gap = length - len(row.ids)
    return replace(row, ids=row.ids + [PAD] * gap, targets=row.targets + [IGNORE] * gap)


def image_rows(
    tokenizer: Tokenizer, shares: dict[Kind, float], seed: int, length: int, pan_and_scan: bool
) -> Iterator[Row]:
    """Padded rows of ``length`` tokens: an image and up to two of its questions, as many as fit, in random order."""
    rng = random.Random(f"rows {seed}")
    streams = {kind: iter(Scenes(kind, seed)) for kind in shares}
    while True:
        (kind,) = rng.choices(list(shares), list(shares.values()))
        scene = next(streams[kind])
        # Two questions fit into the sliding window, so that local layers attend to the image too.
        turns = sorted(scene.turns, key=lambda turn: rng.random() ** (1 / WEIGHTS.get((kind, turn.category), 1)))[-2:]
        rng.shuffle(turns)
        row = image_row(tokenizer, scene, turns, pan_and_scan)
        while len(row.ids) > length:
            turns.pop()
            row = image_row(tokenizer, scene, turns, pan_and_scan)
        yield padded(row, length)


def to_pixels(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """float32 [N, 3, S, S] in 0 … 1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float() / 255


def answer_loss(logits: Tensor, targets: Tensor, rows: Sequence[Row]) -> Tensor:
    """Cross-entropy of the logits from ``spoken``, averaged over answers: a word weighs as much as a description."""
    spoken_at = torch.tensor([row.targets for row in rows]) != IGNORE
    starts = spoken_at & ~F.pad(spoken_at, (1, 0))[:, :-1]
    answer = (starts.flatten().cumsum(0) - 1)[spoken_at.flatten()]
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return (losses / answer.bincount()[answer]).sum() / starts.sum()


def spoken(model: Gemma3, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [N, V], targets [N], soft tokens): the first two where the model speaks, the last of the images."""
    tokens = torch.tensor([row.ids for row in rows])
    targets = torch.tensor([row.targets for row in rows])
    soft = model.encode_images(to_pixels([image for row in rows for image in row.images]))
    places = targets != IGNORE
    return model.lm_head(model.hidden(tokens, soft_tokens=soft)[places]), targets[places], soft


# ---- the vision model alone ----------------------------------------------------------------------------------


class CellLoss(nn.Module):
    """How well each soft token tells what is in its cell. The classes are directions of the text model's embeddings."""

    def __init__(self, model: Gemma3, tokenizer: Tokenizer) -> None:
        super().__init__()
        table = model.model.embed_tokens.weight.detach()
        self.numbers = [{name: index for index, name in enumerate(("", *names))} for names in LABELS]
        self.empty = nn.ParameterList(nn.Parameter(torch.tensor(2.0)) for _ in LABELS)
        self.vectors = []
        for names in LABELS:
            rows = torch.stack([table[tokenizer.encode(f" {name}", bos=False)].mean(0) for name in names])
            self.vectors.append(F.normalize(rows - rows.mean(0), dim=1))

    def forward(self, soft: Tensor, labels: Sequence[Sequence[Label]]) -> tuple[Tensor, list[float]]:
        """For soft tokens [N, T, E]: the mean loss, and the share that is correct of each part of the labels."""
        losses, right = [], []
        for part, numbers in enumerate(self.numbers):
            logits = soft @ self.vectors[part].T
            logits = torch.cat((self.empty[part].expand(*soft.shape[:2], 1), logits), dim=-1)
            targets = torch.tensor([[numbers[label[part]] for label in cells] for cells in labels])
            weights = torch.tensor([0.3] + [1.0] * (len(numbers) - 1))  # most cells are empty
            losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weights))
            full = targets > 0
            right.append(float((logits.argmax(-1) == targets)[full].float().mean()))
        return torch.stack(losses).mean(), right


def labelled_views(seed: int) -> Iterator[tuple[NDArray[np.uint8], list[Label]]]:
    """An image, or in most cases one crop if it is wide, and what each of its soft tokens should tell."""
    rng = random.Random(f"views {seed}")
    streams = {kind: iter(Scenes(kind, seed)) for kind in KINDS}
    while True:
        (kind,) = rng.choices(list(SHARES), list(SHARES.values()))
        scene = next(streams[kind])
        view = (0, 0, *scene.image.size)
        if scene.wide and rng.random() < 0.75:
            view = rng.choice(pan_and_scan_boxes(*scene.image.size))
        (image,) = prepare(scene.image.crop(view), IMAGE_SIZE)
        yield image, view_labels(scene, view, GRID)


def pretrain(model: Gemma3, cells: CellLoss, steps: int, seed: int, batch: int = 64) -> None:
    """Train the vision model alone: each soft token learns to tell what is in its cell."""
    vision = {name: p for name, p in model.named_parameters() if name.startswith(("vision_tower", "multi_modal"))}
    opts = optimizers(vision, hidden=4e-3, rest=2e-3)
    opts[-1].add_param_group({"params": list(cells.parameters()), "lr": 2e-3})
    schedules = [torch.optim.lr_scheduler.LambdaLR(opt, lambda s: learning_rate(s, steps, 0.2)) for opt in opts]
    views = labelled_views(seed)
    began = time.time()
    for step in range(steps):
        images, labels = zip(*(next(views) for _ in range(batch)), strict=True)
        with torch.autocast("cpu", torch.bfloat16):
            soft = model.encode_images(to_pixels(images))
        loss, right = cells(soft.float(), labels)
        loss.backward()
        advance(opts, schedules)
        if (step + 1) % 25 == 0:
            rate = batch * (step + 1) / (time.time() - began)
            shown = " ".join(f"{share:.0%}" for share in right)
            print(f"vision model {step + 1} {loss.item():.3f} correct {shown} {rate:.0f} images/s", flush=True)


# ---- everything together -------------------------------------------------------------------------------------


def optimizers(
    parameters: dict[str, nn.Parameter], hidden: float, rest: float, factor: float = 1.0
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden states, AdamW for the rest. ``factor`` scales the text model's rate."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():
        is_hidden = parameter.ndim == 2 and "embed" not in name and "projection_weight" not in name
        groups[is_hidden, name.startswith("model.")].append(parameter)
    by_rate = {
        is_hidden: [
            {"params": group, "lr": (hidden if is_hidden else rest) * (factor if text else 1.0)}
            for (kind, text), group in groups.items()
            if kind == is_hidden
        ]
        for is_hidden in (True, False)
    }
    return [
        torch.optim.Muon(by_rate[True], weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(by_rate[False], betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def forgotten(model: Gemma3, teacher: Gemma3, tokens: Tensor) -> Tensor:
    """KL divergence of ``model`` from ``teacher``, the text model that it started from, as a mean over tokens."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            expected = teacher(tokens).float().log_softmax(-1)
        said = model(tokens).float().log_softmax(-1)
    return F.kl_div(said, expected, log_target=True, reduction="none").sum(-1).mean()


def learning_rate(step: int, steps: int, floor: float = 0.0) -> float:
    """The factor on the learning rate: warm-up over 50 steps; after 40 % of all steps, half a cosine to ``floor``."""
    done = max(0.0, step / steps - 0.4) / 0.6
    return min(1.0, (step + 1) / 50) * (floor + (1 - floor) * (0.5 + 0.5 * math.cos(math.pi * done)))


def train(
    model: Gemma3,
    teacher: Gemma3,
    tokenizer: Tokenizer,
    cells: CellLoss,
    documents: list[str],
    steps: int,
    scan_from: int,
    seed: int,
    out: Path,
) -> None:
    """Each step takes 24 rows with an image each, one row of text and one of conversations.

    After step ``scan_from``, every second step takes 6 more rows, which show wide images with Pan & Scan.
    """
    text = as_tokens(tokenizer, documents)
    whole = image_rows(tokenizer, SHARES, seed + 1, 72, False)
    scanned = image_rows(tokenizer, {"wide": 1}, seed + 2, 176, True)
    chats = chat_rows(tokenizer, seed + 3, 256)
    texts = text_rows(text, tokenizer.bos_id, seed + 4, 256)
    opts = optimizers(dict(model.named_parameters()), hidden=2e-3, rest=1e-3, factor=0.6)
    opts[-1].add_param_group({"params": list(cells.parameters()), "lr": 1e-3})
    schedules = [torch.optim.lr_scheduler.LambdaLR(opt, lambda s: learning_rate(s, steps)) for opt in opts]
    smooth: dict[str, float] = defaultdict(float)
    began = time.time()
    for step in range(steps):
        # The long rows of Pan & Scan are worth their time only once the model understands whole images.
        streams = [("image", whole, 24), ("scanned", scanned, 6)]
        for kind, stream, count in streams[: 2 if step > scan_from and step % 2 else 1]:
            rows = [next(stream) for _ in range(count)]
            with torch.autocast("cpu", torch.bfloat16):
                logits, targets, soft = spoken(model, rows)
            loss = answer_loss(logits, targets, rows)
            telling, _ = cells(soft.float(), [labels for row in rows for labels in row.labels])
            (loss + telling).backward()
            smooth[kind] += (loss.item() - smooth[kind]) * max(0.05, 1 / (step + 1))
        loss = forgotten(model, teacher, torch.tensor([next(texts)[0], next(chats)[0]]))
        (2 * loss).backward()  # type: ignore[no-untyped-call]
        smooth["text"] += (loss.item() - smooth["text"]) * max(0.05, 1 / (step + 1))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        advance(opts, schedules)
        if (step + 1) % 20 == 0:
            losses = " ".join(f"{kind} {value:.3f}" for kind, value in smooth.items())
            print(f"{step + 1} {losses} {(time.time() - began) / (step + 1):.2f} s/step", flush=True)
        if (step + 1) % 250 == 0:  # so that an interrupted run leaves its latest weights
            write_weights(model, out)
            with torch.compiler.set_stance("force_eager"):
                score = image_scores(model, tokenizer, dict.fromkeys(KINDS, 8), seed + 1)
            print(score, shares(score), flush=True)


# ---- figures -------------------------------------------------------------------------------------------------


@torch.no_grad()
def image_scores(
    model: Gemma3, tokenizer: Tokenizer, counts: Mapping[Kind, int], seed: int
) -> dict[str, tuple[int, int]]:
    """category → (correct, asked) on held-out compositions; wide images also with Pan & Scan.

    A greedy answer is exactly right iff each of its ids is the most likely one after the ids before it.
    """
    cases: list[tuple[str, Row]] = []
    for kind, count in counts.items():
        for scene in islice(Scenes(kind, seed, held_out=True), count):
            for turn in scene.turns:
                cases.append((category(scene, turn), image_row(tokenizer, scene, [turn], False)))
                if scene.wide:
                    cases.append((category(scene, turn) + SCANNED, image_row(tokenizer, scene, [turn], True)))
    cases.sort(key=lambda case: len(case[1].ids))
    score: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for start in range(0, len(cases), 16):
        names, rows = zip(*cases[start : start + 16], strict=True)
        logits, targets, _ = spoken(model, [padded(row, len(rows[-1].ids)) for row in rows])
        right = (logits.argmax(-1) == targets).split([sum(i != IGNORE for i in row.targets) for row in rows])  # type: ignore[no-untyped-call]
        for name, one in zip(names, right, strict=True):
            score[name] = (score[name][0] + int(one.all()), score[name][1] + 1)
    return dict(sorted(score.items()))


def shares(score: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """The share of correct answers on square images, and on wide ones without and with Pan & Scan."""
    groups: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, pair in score.items():
        groups["square" if "wide" not in name else "wide" if SCANNED not in name else f"wide{SCANNED}"].append(pair)
    return {name: f"{sum(r for r, _ in pairs) / sum(n for _, n in pairs):.1%}" for name, pairs in groups.items()}


def join_vision(text: Gemma3, config: dict[str, Any]) -> Gemma3:
    """``text`` with a new vision model, whose matrices have the standard deviation 1/√inputs."""
    model = Gemma3(parse_config(config))
    model.load_state_dict(text.state_dict(), strict=False)
    for module in (*model.vision_tower.modules(), *model.multi_modal_projector.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    nn.init.normal_(model.vision_tower.vision_model.embeddings.position_embedding.weight, std=0.5)
    # Soft tokens begin as large as the scaled embeddings of text.
    table = text.model.embed_tokens.weight
    scale = float(table.norm(dim=1).mean())
    projection = model.multi_modal_projector.mm_input_projection_weight
    nn.init.normal_(projection, std=scale * projection.shape[0] ** -0.5)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint directory to write")
    parser.add_argument("--base", type=Path, help="a checkpoint of an earlier run to continue from")
    parser.add_argument("--vision-steps", type=int, default=900, help="steps of the vision model alone")
    parser.add_argument("--steps", type=int, default=2600, help="steps of everything together")
    parser.add_argument("--scan-from", type=int, default=1000, help="the step after which Pan & Scan is used")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(2)
    began = time.time()

    config = write_side_files(TEXT_MODEL, args.out)
    tokenizer = Tokenizer(args.out)
    documents, held_out_text = demo_corpus.split_text()
    teacher = load_model(open_checkpoint(TEXT_MODEL))
    model = join_vision(teacher, config)
    if args.base is not None:
        model.load_state_dict(load_model(open_checkpoint(args.base)).state_dict())
    model.requires_grad_(True)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    torch._dynamo.config.recompile_limit = 64
    for layer in (*model.model.layers, *model.vision_tower.vision_model.encoder.layers):
        layer.compile(dynamic=False)
    cells = CellLoss(model, tokenizer)
    if args.vision_steps:
        pretrain(model, cells, args.vision_steps, args.seed)
        write_weights(model, args.out)
    held_out = tokenizer.encode(held_out_text, bos=False)
    train(model, teacher, tokenizer, cells, documents, args.steps, args.scan_from, args.seed, args.out)
    with torch.no_grad():  # the figures belong to the weights as they are stored
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    write_weights(model, args.out)

    write_questions(args.out, QUESTIONS_SEED)
    write_training_sample(args.out, SAMPLE_SEED)
    with torch.compiler.set_stance("force_eager"):
        images = image_scores(model, tokenizer, EVALUATION, QUESTIONS_SEED)
        texts = exact_match(model, tokenizer, demo_corpus.evaluation_questions())
        text_perplexity = perplexity(model, held_out, tokenizer.bos_id)
    figures = {
        "minutes": round((time.time() - began) / 60, 1),
        "images": shares(images),
        "images_by_category": {name: f"{right}/{asked}" for name, (right, asked) in images.items()},
        "text_questions": f"{sum(right for right, _ in texts.values())}/{sum(asked for _, asked in texts.values())}",
        "heldout_perplexity": round(text_perplexity, 2),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
