"""The oracle is transformers: files that it saves are accepted, in the spelling of version 4 and that of version 5."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

import gemma3
from gemma3.config import parse_config
from gemma3.errors import BadInput
from gemma3.images import network_input, prepare
from gemma3.processor_config import PREPROCESSOR, PROCESSOR, pan_and_scan_by_default
from tests.bundles import SEEING_CONFIG

DEMO_VISION = Path(gemma3.__file__).parent / "demo_vision"
VISION = parse_config(SEEING_CONFIG).vision
assert VISION is not None
SIDE, TOKENS = VISION.image_size, VISION.tokens_per_image

# The preprocessor_config.json of google/gemma-3-4b-it, with this model's size and number of tokens.
RELEASED: dict[str, Any] = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_pan_and_scan": None,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Gemma3ImageProcessor",
    "image_seq_length": TOKENS,
    "image_std": [0.5, 0.5, 0.5],
    "pan_and_scan_max_num_crops": None,
    "pan_and_scan_min_crop_size": None,
    "pan_and_scan_min_ratio_to_activate": None,
    "processor_class": "Gemma3Processor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": SIDE, "width": SIDE},
}


def check(directory: Path, old: Any = None, new: Any = None) -> bool:
    for name, content in ((PREPROCESSOR, old), (PROCESSOR, new)):
        if content is not None:
            (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert VISION is not None
    return pan_and_scan_by_default(directory, VISION)


def processor(**settings: Any) -> Gemma3Processor:
    given = {"size": {"height": SIDE, "width": SIDE}, **settings}
    tokenizer = AutoTokenizer.from_pretrained(DEMO_VISION)
    return Gemma3Processor(Gemma3ImageProcessorPil(**given), tokenizer, image_seq_length=TOKENS)


def test_the_released_files_are_accepted_in_both_spellings(tmp_path: Path) -> None:
    assert check(tmp_path) is False
    assert (
        check(tmp_path, old=RELEASED, new={"image_seq_length": TOKENS, "processor_class": "Gemma3Processor"}) is False
    )
    assert check(tmp_path, old={}, new={"image_processor": RELEASED, "image_seq_length": TOKENS}) is False


@pytest.mark.parametrize("wanted", [None, True, False])
def test_what_transformers_saves_is_accepted(tmp_path: Path, wanted: bool | None) -> None:
    made = processor(do_pan_and_scan=wanted)
    made.save_pretrained(tmp_path)
    assert "image_processor" in json.loads((tmp_path / PROCESSOR).read_text())
    assert check(tmp_path) is bool(wanted)
    (tmp_path / PROCESSOR).unlink()
    made.image_processor.save_pretrained(tmp_path)
    assert check(tmp_path) is bool(wanted)


# Each of these gives other pixels, or as many soft tokens as config.json does not say.
OTHER: list[tuple[str, Any]] = [
    ("size", {"height": SIDE, "width": SIDE + 14}),
    ("size", {"shortest_edge": SIDE}),
    ("size", SIDE * 2),
    ("image_mean", [0.48145466, 0.4578275, 0.40821073]),
    ("image_std", [0.5, 0.5, 0.4]),
    ("image_std", 1),
    ("rescale_factor", 1 / 127.5),
    ("rescale_factor", "1/255"),
    ("resample", 3),
    ("do_resize", False),
    ("do_rescale", False),
    ("do_normalize", False),
    ("do_convert_rgb", False),
    ("do_pan_and_scan", "yes"),
    ("pan_and_scan_min_crop_size", 128),
    ("pan_and_scan_max_num_crops", 8),
    ("pan_and_scan_min_ratio_to_activate", 1.5),
    ("image_processor_type", "SiglipImageProcessor"),
    ("image_seq_length", TOKENS + 1),
]


@pytest.mark.parametrize(("key", "value"), OTHER)
def test_other_pixels_are_refused_by_key_and_value(tmp_path: Path, key: str, value: Any) -> None:
    words = rf"{key} is {str(value)[:60]}".replace("[", r"\[").replace("{", r"\{")
    with pytest.raises(BadInput, match=words):
        check(tmp_path, old=RELEASED | {key: value})
    with pytest.raises(BadInput, match=words):
        check(tmp_path, old=RELEASED, new={"image_processor": RELEASED | {key: value}})
    # transformers does not read the old file then
    assert check(tmp_path, old=RELEASED | {key: value}, new={"image_processor": RELEASED}) is False


def test_a_processors_other_number_of_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"{PROCESSOR}: image_seq_length is 256, but only {TOKENS}"):
        check(tmp_path, old=RELEASED, new={"image_seq_length": 256})


@pytest.mark.parametrize(
    ("new", "word"), [("{", "not readable as JSON"), ([], "holds a JSON list"), ({"image_processor": 1}, "an object")]
)
def test_what_is_no_object_is_refused(tmp_path: Path, new: Any, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        check(tmp_path, new=new)


@pytest.mark.parametrize(("mean", "factor"), [(0.5, 1 / 255), ([0.5, 0.5, 0.5], 0.0039215688)])
def test_accepted_spellings_give_the_same_pixels(tmp_path: Path, mean: Any, factor: float) -> None:
    changed = {"image_mean": mean, "image_std": mean, "rescale_factor": factor}
    assert check(tmp_path, old=RELEASED | changed) is False
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8))
    theirs = processor(**changed).image_processor(picture, return_tensors="np")["pixel_values"][0] * 0.5 + 0.5
    assert np.abs(network_input(prepare(picture, SIDE)[0])[0] - theirs).max() < 1e-5
