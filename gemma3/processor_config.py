"""What a checkpoint says about its images: ``preprocessor_config.json`` and ``processor_config.json``.

gemma3/images.py makes pixels in one way, that of the released checkpoints. A file that asks for other pixels is
refused. transformers 4 describes the pixels in ``preprocessor_config.json``, transformers 5 under ``image_processor``
in ``processor_config.json``, and it prefers the latter.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemma3.config import VisionConfig
from gemma3.errors import BadInput
from gemma3.host.files import OWN_FILE, read_optional
from gemma3.images import MAX_CROPS, MIN_CROP, MIN_RATIO

PREPROCESSOR, PROCESSOR, NESTED = "preprocessor_config.json", "processor_config.json", "image_processor"

PROCESSOR_TYPES = ("Gemma3ImageProcessor", "Gemma3ImageProcessorFast", "Gemma3ImageProcessorPil")
BILINEAR = 2  # Pillow's number


def pan_and_scan_by_default(checkpoint: Path, vision: VisionConfig) -> bool:
    """Does the checkpoint in the directory ``checkpoint`` ask for Pan & Scan? Without the files it does not.

    Raises BadInput naming a key whose value asks for other pixels than gemma3/images.py makes or contradicts
    config.json, and for files that are no JSON objects.
    """
    old, new = read_optional(checkpoint / PREPROCESSOR, OWN_FILE), read_optional(checkpoint / PROCESSOR, OWN_FILE)
    settings, path = old, checkpoint / PREPROCESSOR
    if NESTED in new:
        settings, path = new[NESTED], checkpoint / PROCESSOR
    if not isinstance(settings, dict):
        raise BadInput(f"{path}: {NESTED} is {str(settings)[:60]!r}, expected an object")
    _check(settings, path, _expected(vision))
    _check(new, checkpoint / PROCESSOR, {"image_seq_length": _tokens(vision)})
    return settings.get("do_pan_and_scan") is True


Expected = Mapping[str, tuple[str, Callable[[Any], bool]]]  # key → the value in words, is this value equal to it?


def _expected(vision: VisionConfig) -> Expected:
    size = vision.image_size
    return {
        "image_processor_type": (PROCESSOR_TYPES[0], lambda value: value in PROCESSOR_TYPES),
        "size": (f"{size} × {size} as in config.json", lambda value: _sides(value) == (size, size)),
        "resample": (f"{BILINEAR} (bilinear)", lambda value: value == BILINEAR),
        "rescale_factor": ("1/255", lambda value: _is_number(value) and math.isclose(value, 1 / 255, rel_tol=1e-6)),
        "image_mean": ("0.5", _is_half),
        "image_std": ("0.5", _is_half),
        **{
            key: ("true", lambda value: value is True)
            for key in ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
        },
        "do_pan_and_scan": ("true or false", lambda value: isinstance(value, bool)),
        "pan_and_scan_min_crop_size": (str(MIN_CROP), lambda value: value == MIN_CROP),
        "pan_and_scan_max_num_crops": (str(MAX_CROPS), lambda value: value == MAX_CROPS),
        "pan_and_scan_min_ratio_to_activate": (str(MIN_RATIO), lambda value: value == MIN_RATIO),
        "image_seq_length": _tokens(vision),
    }


def _tokens(vision: VisionConfig) -> tuple[str, Callable[[Any], bool]]:
    tokens = vision.tokens_per_image
    return f"{tokens}, the mm_tokens_per_image of config.json", lambda value: value == tokens


def _check(settings: Mapping[str, Any], path: Path, expected: Expected) -> None:
    """A key that is missing or null has the value that is expected."""
    for key, (words, holds) in expected.items():
        value = settings.get(key)
        if value is not None and not holds(value):
            raise BadInput(
                f"{path}: {key} is {str(value)[:60]}, but only {words} is implemented; a model trained on other images "
                "cannot be used"
            )


def _sides(value: Any) -> tuple[Any, ...]:
    if isinstance(value, dict):
        given = {key: side for key, side in value.items() if side is not None}
        return (given.get("height"), given.get("width")) if given.keys() <= {"height", "width"} else ()
    return (value, value)


def _is_half(value: Any) -> bool:
    return value == 0.5 or (isinstance(value, list) and value == [0.5] * 3)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
