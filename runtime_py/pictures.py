"""Images in prompts: reads them from files, prepares them for the vision model, and puts them at the text's markers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma3.chat import IMAGE_MARKER, Image, Part, place_images
from gemma3.config import VisionConfig
from gemma3.errors import BadInput, counted
from gemma3.images import Pixels, prepare


@dataclass(frozen=True)
class Picture:
    """An image file, prepared: the pixels of the whole image, then those of its Pan & Scan crops."""

    pixels: tuple[Pixels, ...]


def read_pictures(paths: Sequence[Path], vision: VisionConfig | None, pan_and_scan: bool = False) -> list[Picture]:
    """The image files, in order. ``vision`` None is a text-only model.

    Raises BadInput for an image for a text-only model, and as ``gemma3.images.prepare`` does.
    """
    if vision is None:
        if paths:
            raise BadInput(f"{paths[0]}: an image for a text-only model; leave it out, or use a multimodal model")
        return []
    return [Picture(tuple(prepare(path, vision.image_size, pan_and_scan))) for path in paths]


def placed(text: str, pictures: Sequence[Picture], vision: VisionConfig | None) -> list[Part]:
    """The parts of a prompt: ``text`` with the pictures in place of its markers ``<image>``, in order.

    If the text has no marker, the pictures come first. For a text-only model ``<image>`` is ordinary text. Raises
    BadInput when there are markers, but not as many as pictures.
    """
    if vision is not None and not pictures and IMAGE_MARKER in text:
        markers = counted(text.count(IMAGE_MARKER), "marker")
        raise BadInput(f"the text has {markers} {IMAGE_MARKER} for 0 images; give one image for each marker")
    return place_images(text, [Image(crops=len(picture.pixels) - 1) for picture in pictures])


def content_of(text: str, pictures: Sequence[Picture], vision: VisionConfig | None) -> str | list[Part]:
    """The content of a user's message: the text alone, or with pictures the parts. Raises BadInput as ``placed``."""
    parts = placed(text, pictures, vision)
    return parts if pictures else text


def views(pictures: Iterable[Picture]) -> list[Pixels]:
    """What the vision model sees, in the order of the prompt: each image whole, then its crops."""
    return [pixels for picture in pictures for pixels in picture.pixels]
