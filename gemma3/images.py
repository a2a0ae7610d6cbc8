"""From image files to the arrays that the vision model takes, as transformers' Gemma3 processor makes them.

``Pixels`` are uint8 [S, S, 3] in RGB, where S is the vision model's ``image_size``: an image is resized to a square,
whatever its aspect ratio. Pan & Scan (the Gemma 3 report, arXiv 2503.19786, section 2.1) adds crops of an image that is
far from square. Uses only Pillow and numpy. Files are not trusted: the size of the file, and the image size that its
header states, are checked before anything is decoded.
"""

import math
import re
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from gemma3.errors import BadInput

FORMATS, READABLE = ("JPEG", "PNG", "WEBP", "BMP", "GIF"), "JPEG, PNG, WebP, BMP or GIF"
# 8192 × 8192 pixels: decoding them takes 0.6 GB, putting them on white 1.1 GB. 65,535 is the longest side of a JPEG.
MAX_PIXELS, MAX_SIDE = 2**26, 65_535
MAX_BYTES = 2**29

# The settings of Pan & Scan as published, from transformers' Gemma3Processor.
MIN_CROP, MAX_CROPS, MIN_RATIO = 256, 4, 1.2

EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]


def prepare(
    source: Path | str | Image.Image, size: int, pan_and_scan: bool = False, min_crop: int = MIN_CROP
) -> list[Pixels]:
    """The whole image, then with ``pan_and_scan`` its crops (none if it is near square or small).

    Each array is uint8 [size, size, 3], resized bilinearly with Pillow's antialiasing. It equals the result of
    transformers' Pillow processor bit for bit. Raises BadInput as ``read_image`` and ``to_rgb`` do.
    """
    image = to_rgb(source) if isinstance(source, Image.Image) else read_image(source)
    boxes = pan_and_scan_boxes(*image.size, min_crop) if pan_and_scan else []
    # Crops are cut out before they are resized, so that a neighbouring crop's pixels do not bleed in.
    return [_resize(image, size), *(_resize(image.crop(box), size) for box in boxes)]


def network_input(image: Pixels) -> NDArray[np.float32]:
    """Pixels [S, S, 3] as the vision model takes them: float32 [1, 3, S, S] in 0 … 1. The model normalizes them."""
    channels_first = image.transpose(2, 0, 1)[None]
    return np.ascontiguousarray(channels_first, np.float32) / np.float32(255)


def pan_and_scan_boxes(width: int, height: int, min_crop: int = MIN_CROP) -> list[Box]:
    """The boxes that Pan & Scan cuts: (left, top, right, bottom) in pixels of up to 4 crops along the longer side.

    They are in reading order. There are none when the ratio of the sides is under 1.2 or a side of a crop would be
    under ``min_crop``.
    """
    long, short = max(width, height), min(width, height)
    if long / short < MIN_RATIO:
        return []
    wanted = min(math.floor(long / short + 0.5), long // min_crop)
    count = min(max(wanted, 2), MAX_CROPS)
    step = math.ceil(long / count)
    if min(step, short) < min_crop:
        return []
    spans = [(start, min(start + step, long)) for start in range(0, long, step)]
    if width >= height:
        return [(start, 0, end, height) for start, end in spans]
    return [(0, start, width, end) for start, end in spans]


def read_image(path: Path | str) -> Image.Image:
    """The image in a JPEG, PNG, WebP, BMP or GIF file, upright, in mode RGB. The content decides, not the name.

    An animation gives its first frame. A readable EXIF orientation is applied. Raises BadInput when the file is
    missing, is larger than ``MAX_BYTES``, has another format, is damaged or truncated, or when its header states more
    than ``MAX_PIXELS`` or a side over ``MAX_SIDE``.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise BadInput(f"{path}: no such file; give an image ({READABLE})")
        if path.stat().st_size > MAX_BYTES:
            raise BadInput(f"{path}: {path.stat().st_size / 1e6:.0f} MB, over {MAX_BYTES / 1e6:.0f}; make it smaller")
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about sizes and odd metadata; both are handled here
            return _read(file, path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error}); give an image ({READABLE})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` in mode RGB, with transparent parts on white, as transformers' ``convert_to_rgb`` does it.

    16-bit grey, which transformers would clip at 255, keeps its high byte, as Pillow keeps that of 16-bit colours.
    Raises BadInput for a mode without a defined range (32-bit integers, floats).
    """
    if image.mode.startswith("I;16"):
        deep = np.asarray(image)
        grey = (deep >> 8).astype(np.uint8)
        grey[deep == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadInput(f"an image of mode {image.mode} has no stated range; scale it to 8 bits (mode L) first")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _read(file: BinaryIO, path: Path) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadInput(f"{path}: {width} × {height} pixels, over the limit of {MAX_PIXELS}; make it smaller")
        if max(width, height) > MAX_SIDE:
            raise BadInput(f"{path}: {width} × {height} pixels, a side over {MAX_SIDE}; cut it")
        image.load()
        turn = UPRIGHT.get(_orientation(image))
        upright = to_rgb(image)
        return upright if turn is None else upright.transpose(turn)
    except (BadInput, MemoryError):
        raise
    except UnidentifiedImageError:
        file.seek(0)
        raise BadInput(f"{path}: begins with {file.read(12)!r}, not an image in {READABLE}; convert it") from None
    except Image.DecompressionBombError as error:  # Pillow's own limit is a little higher; it states the count
        count = next(iter(re.findall(r"\d+", str(error))), "too many")
        raise BadInput(f"{path}: {count} pixels, over the limit of {MAX_PIXELS}; make it smaller") from None
    except Exception as error:  # decoders raise anything on damaged data: OSError, SyntaxError, struct.error, …
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"{path}: damaged or cut short ({reason}); get it again") from None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # metadata is often broken where the image is not
        return 1


def _resize(image: Image.Image, size: int) -> Pixels:
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR))
