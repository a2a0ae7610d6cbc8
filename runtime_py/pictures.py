"""Pictures in prompts: read, prepared for the model's encoder, and put where the text says."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma3.chat import IMAGE_MARK, Image, Part, place_images
from gemma3.config import VisionConfig
from gemma3.errors import BadInput
from gemma3.images import prepare
from runtime_py.session import Pixels


@dataclass(frozen=True)
class Picture:
    """What the model is shown of one picture: the whole, then Pan & Scan's crops."""

    views: tuple[Pixels, ...]


def read_pictures(paths: Sequence[Path], vision: VisionConfig | None, pan_and_scan: bool = False) -> list[Picture]:
    """The files in their order. Raises BadInput for a text-only model and as ``gemma3.images.prepare`` does."""
    if vision is None:
        if paths:
            raise BadInput(f"{paths[0]}: an image for a text-only model; leave it out, or use a model that sees")
        return []
    return [Picture(tuple(prepare(path, vision.image_size, pan_and_scan))) for path in paths]


def placed(text: str, pictures: Sequence[Picture], vision: VisionConfig | None) -> list[Part]:
    """``text`` with the pictures where it says ``<image>``, one for each; in front of it where it never does.

    To a text-only model ``<image>`` is text. Raises BadInput when the marks are not as many as the pictures.
    """
    if vision is not None and not pictures and IMAGE_MARK in text:
        raise BadInput(f"the text says {IMAGE_MARK} {text.count(IMAGE_MARK)} times for 0 images; give as many images")
    return place_images(text, [Image(crops=len(picture.views) - 1) for picture in pictures])


def views(pictures: Iterable[Picture]) -> list[Pixels]:
    """Everything that is shown, in order."""
    return [view for picture in pictures for view in picture.views]
