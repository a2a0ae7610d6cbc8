"""The committed multimodal demo checkpoint is what its script and its model card say."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gemma3
from gemma3.checkpoint import load_model, open_checkpoint
from gemma3.model import Gemma3
from gemma3.tokenizer import END_OF_IMAGE, IMAGE_SOFT_TOKEN, START_OF_IMAGE, Tokenizer
from scripts import demo_corpus, demo_images, train_demo, train_demo_vision

DEMO = Path(gemma3.__file__).parent / "demo"
SEEING = DEMO.with_name("demo_vision")
TOKENIZER = Tokenizer(SEEING)


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SEEING / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def model() -> Gemma3:
    return load_model(open_checkpoint(SEEING))


def test_configuration_and_vocabulary_agree() -> None:
    config, text = open_checkpoint(SEEING).config, open_checkpoint(DEMO).config
    vision = config.vision
    assert vision is not None
    assert (vision.image_size, vision.tokens_per_image) == (112, 16)
    names = (START_OF_IMAGE, END_OF_IMAGE, IMAGE_SOFT_TOKEN)
    ids = (vision.begin_image_token_id, vision.end_image_token_id, vision.image_token_id)
    assert ids == tuple(map(TOKENIZER.special_id, names))
    assert {**vars(config), "vision": None} == vars(text)
    for name in train_demo_vision.TEXT_FILES:
        assert (SEEING / name).read_bytes() == (DEMO / name).read_bytes()


def test_the_checkpoint_is_small_enough_to_be_committed() -> None:
    assert sum(path.stat().st_size for path in SEEING.rglob("*") if path.is_file()) < 10.5e6


@pytest.mark.parametrize(
    ("name", "folder", "write", "seed"),
    [
        ("questions_images.jsonl", "images", demo_images.write_questions, train_demo_vision.QUESTIONS_SEED),
        ("qat_images.jsonl", "qat_images", demo_images.write_training_sample, train_demo_vision.SAMPLE_SEED),
    ],
)
def test_questions_and_images_follow_from_the_script(
    name: str, folder: str, write: Any, seed: int, tmp_path: Path
) -> None:
    write(tmp_path, seed)
    assert (tmp_path / name).read_text() == (SEEING / name).read_text()
    drawn, stored = (sorted((root / folder).iterdir()) for root in (tmp_path, SEEING))
    assert [path.name for path in drawn] == [path.name for path in stored]
    for ours, theirs in zip(drawn, stored, strict=True):
        with Image.open(ours) as one, Image.open(theirs) as other:
            assert np.array_equal(np.asarray(one.convert("RGB")), np.asarray(other.convert("RGB")))


def test_no_question_is_in_the_training_sample() -> None:
    pictures = {path.read_bytes() for path in (SEEING / "qat_images").iterdir()}
    assert not pictures & {path.read_bytes() for path in (SEEING / "images").iterdir()}


def test_files_name_every_image() -> None:
    asked = {name for line in lines("questions_images.jsonl") for name in line["images"]}
    shown = {line["messages"][0]["content"][0]["image"] for line in lines("qat_images.jsonl")}
    stored = {str(path.relative_to(SEEING)) for path in SEEING.rglob("*.png")}
    assert asked | shown == stored


@pytest.mark.slow
def test_answers_are_right(model: Gemma3) -> None:
    """On other images than the committed ones. The bounds are below the measured accuracy (see the model card)."""
    counts: dict[demo_images.Kind, int] = {"single": 6, "pair": 8, "count": 8, "word": 8, "wide": 30}
    score = train_demo_vision.image_scores(model, TOKENIZER, counts, seed=5)
    groups: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, (right, asked) in score.items():
        group = groups[name.split()[0] if not name.startswith("wide") else f"wide{name.partition(',')[2]}"]
        group[0] += right
        group[1] += asked
    square = [pair for name, pair in groups.items() if not name.startswith("wide")]
    assert sum(right for right, _ in square) / sum(asked for _, asked in square) >= 0.9
    plain, scanned = (right / asked for right, asked in (groups["wide"], groups["wide Pan & Scan"]))
    assert scanned >= plain + 0.2


@pytest.mark.slow
def test_text_is_not_forgotten(model: Gemma3) -> None:
    """Compared with the text-only checkpoint, on part of the held-out text; and on every fourth held-out question."""
    ids = TOKENIZER.encode((DEMO / "heldout.txt").read_text(encoding="utf-8")[:8000], bos=False)
    text_only = load_model(open_checkpoint(DEMO))
    perplexities = [train_demo.perplexity(one, ids, TOKENIZER.bos_id) for one in (text_only, model)]
    assert perplexities[1] <= perplexities[0] * 1.05
    questions = demo_corpus.evaluation_questions()[::4]
    right = sum(right for right, _ in train_demo.exact_match(model, TOKENIZER, questions).values())
    assert right / len(questions) >= 0.68


def test_transformers_reads_the_same_network(model: Gemma3) -> None:
    from transformers import Gemma3ForConditionalGeneration

    theirs = Gemma3ForConditionalGeneration.from_pretrained(SEEING, dtype=torch.float32, attn_implementation="eager")
    scene = next(iter(demo_images.Scenes("pair", 5, held_out=True)))
    row = train_demo_vision.image_row(TOKENIZER, scene, scene.turns, pan_and_scan=False)
    tokens, pixels = torch.tensor([row.ids]), train_demo_vision.to_pixels(row.images)
    vision = open_checkpoint(SEEING).config.vision
    assert vision is not None
    is_image = (tokens == vision.image_token_id).long()
    with torch.no_grad():
        expected = theirs.train(False)(input_ids=tokens, pixel_values=pixels * 2 - 1, token_type_ids=is_image).logits
        ours = model(tokens, soft_tokens=model.encode_images(pixels))
    assert float((ours - expected).abs().max()) <= 1e-4
