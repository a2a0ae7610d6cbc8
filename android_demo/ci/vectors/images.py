"""Pictures and what gemma3/images.py makes of them, for the Kotlin tests of image preparation.

``cases.json`` lists files; beside each, ``.rgb`` has the pixels of the whole image and of its crops. The decoders of
JPEG and WebP differ between platforms in the last bits, so for these ``.argb`` has what Pillow decoded: both sides then
start from the same pixels. ``refused.json`` has files that are not to be read, ``boxes.json`` boxes of Pan & Scan.
"""

import io
import json
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gemma3.errors import BadInput
from gemma3.images import FORMATS, pan_and_scan_boxes, prepare, read_image, to_rgb

SEED = 7
DECODED_EQUALLY = ("PNG", "BMP", "GIF")
BANDS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("L", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
}
# Sides that round badly, ratios around those of Pan & Scan, and the extremes.
SHAPES = (
    *((1, 1), (2, 1), (1, 2), (7, 1), (1, 7), (3000, 1), (1, 3000), (5000, 3), (3, 5000), (56, 56), (112, 112)),
    *((895, 896), (600, 300), (300, 600), (511, 255), (900, 300), (300, 900), (1280, 260), (260, 1280), (1024, 896)),
    *((1076, 896), (768, 640), (767, 640), (1000, 333), (333, 1000), (40, 30), (57, 55), (801, 600), (2000, 1500)),
)
DRAWN = 120
SIZES = (1, 7, 28, 56, 112, 112, 224, 896)


def write(folder: Path) -> None:
    """Write everything below ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, which is what some are for
        cases = [_case(folder, f"{number:03}", *drawn) for number, drawn in enumerate(_drawn())]
    (folder / "cases.json").write_text(json.dumps(cases, indent=1))
    refused = [_refused(folder, name, data) for name, data in _not_pictures().items()]
    (folder / "refused.json").write_text(json.dumps(refused, indent=1))
    random = np.random.default_rng(SEED)
    sides = [*(random.integers(1, 5000, (3000, 2)).tolist()), *(random.integers(200, 1500, (3000, 2)).tolist())]
    boxes = [{"width": w, "height": h, "boxes": [list(box) for box in pan_and_scan_boxes(w, h)]} for w, h in sides]
    (folder / "boxes.json").write_text(json.dumps(boxes))


def _case(folder: Path, name: str, data: bytes, format: str, size: int, pan_and_scan: bool) -> dict[str, Any]:
    file = folder / f"{name}.{format.lower()}"
    file.write_bytes(data)
    arrays = prepare(file, size, pan_and_scan)
    (folder / f"{name}.rgb").write_bytes(b"".join(array.tobytes() for array in arrays))
    case: dict[str, Any] = {"file": file.name, "size": size, "pan_and_scan": pan_and_scan, "count": len(arrays)}
    case["pixels"] = f"{name}.rgb"
    if format in DECODED_EQUALLY:
        return case
    with Image.open(file) as image:
        clear = "A" in image.getbands() or "transparency" in image.info
        decoded = np.asarray(image.convert("RGBA") if clear else to_rgb(image).convert("RGBA"))
    argb = np.roll(decoded, 1, axis=-1)
    (folder / f"{name}.argb").write_bytes(argb.tobytes())
    return case | {"decoded": f"{name}.argb", "width": argb.shape[1], "height": argb.shape[0]}


def _drawn() -> Iterator[tuple[bytes, str, int, bool]]:
    random = np.random.default_rng(SEED)

    def drawn(width: int, height: int, format: str) -> bytes:
        modes = MODES[format]
        image = picture(random, width, height, modes[random.integers(len(modes))])
        options: dict[str, Any] = {}
        if format in ("PNG", "JPEG", "WEBP"):
            exif = Image.Exif()
            exif[0x0112] = int(random.integers(0, 10))  # 0 and 9 have no meaning
            options["exif"] = exif.tobytes()
        if format == "WEBP":
            options["lossless"] = bool(random.integers(2))
        return saved(image, format, **options)

    for index, (width, height) in enumerate(SHAPES):
        for format in ("PNG", ("JPEG", "WEBP", "BMP", "GIF")[index % 4]):
            yield drawn(width, height, format), format, 56 if index % 3 else 112, True
    for index in range(DRAWN):
        width, height = (int(side) for side in np.exp(random.uniform(0, np.log(500), 2)))
        format = FORMATS[index % len(FORMATS)]
        yield drawn(width, height, format), format, SIZES[index % len(SIZES)], bool(index % 2)
    for format in ("PNG", "JPEG", "WEBP"):
        for orientation in range(10):
            exif = Image.Exif()
            exif[0x0112] = orientation
            image = picture(random, 61, 37, "RGB")
            yield saved(image, format, exif=exif.tobytes()), format, 28, False
    yield from ((saved(picture(random, 301, 250, mode), "PNG"), "PNG", 896, True) for mode in MODES["PNG"])
    yield from ((data, format, 28, False) for data, format in _odd_metadata(random))


def _odd_metadata(random: np.random.Generator) -> Iterator[tuple[bytes, str]]:
    image = picture(random, 30, 20, "RGB")
    tiff = {"<": b"II*\0\x08\0\0\0", ">": b"MM\0*\0\0\0\x08"}
    for order, head in tiff.items():
        for kind, count in ((3, 1), (4, 1), (7, 1), (3, 2), (3, 3), (4, 2), (3, 70_000)):
            value = "HH" if kind == 3 and count < 3 else "I"
            numbers = (6, 0) if value == "HH" else (6,)
            entry = struct.pack(f"{order}HHI{value}", 0x0112, kind, count, *numbers)
            other = struct.pack(f"{order}HHII", 0x0100, 3, 1, 5)
            whole = head + struct.pack(f"{order}H", 2) + other + entry + bytes(4)
            yield saved(image, "JPEG", exif=b"Exif\0\0" + whole), "JPEG"
            yield saved(image, "PNG", exif=whole), "PNG"
            yield saved(image, "WEBP", exif=whole), "WEBP"
            for cut in (7, 9, 15, 25, 32):
                yield saved(image, "JPEG", exif=b"Exif\0\0" + whole[:cut]), "JPEG"
    for exif in (b"Exif\0\0", b"Exif\0\0nonsense"):
        yield saved(image, "JPEG", exif=exif), "JPEG"
    for packet in (
        b'<a tiff:Orientation="6"/>',
        b"<tiff:Orientation>8</tiff:Orientation>",
        b'<a tiff:Orientation="0"/>',
        b"<a/>",
    ):
        upright, silent = Image.Exif(), Image.Exif()
        upright[0x0112], silent[0x0100] = 3, 5
        for exif in (b"", b"Exif\0\0nonsense", upright.tobytes(), silent.tobytes()):
            yield saved(image, "JPEG", exif=exif, xmp=packet), "JPEG"
            yield saved(image, "WEBP", exif=exif, xmp=packet), "WEBP"
            text = PngInfo()
            text.add_itxt("XML:com.adobe.xmp", packet.decode())
            yield saved(image, "PNG", pnginfo=text, **({"exif": exif} if exif else {})), "PNG"
    comment = saved(image, "JPEG", comment=b"\xff\xd8\xff\xc0 a comment", progressive=True)
    yield comment, "JPEG"


def picture(random: np.random.Generator, width: int, height: int, mode: str) -> Image.Image:
    """Noise over a gradient, partly transparent if the mode can be."""
    slope = np.linspace(0, 128, width)[None, :, None] + np.linspace(0, 64, height)[:, None, None]
    values = (slope + random.integers(0, 64, (height, width, 4))).astype(np.uint8)
    values[..., 3] = random.choice([0, 1, 77, 128, 200, 254, 255], (height, width))
    if mode in BANDS:
        bands = values[..., :3] if mode == "RGB" else values if mode == "RGBA" else values[..., [0, 3]]
        return Image.fromarray(values[..., 0] if mode == "L" else bands, mode)
    return Image.fromarray(values[..., :3]).convert(mode)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def _png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _not_pictures() -> dict[str, bytes]:
    random = np.random.default_rng(SEED)
    whole = {format: saved(picture(random, 40, 30, "RGB"), format) for format in FORMATS}
    files = {
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
        "text": b"a cat on a mat\n",
        "empty": b"",
        "pdf": b"%PDF-1.7\n",
        "zeros": bytes(64),
        "tiff": saved(picture(random, 40, 30, "RGB"), "TIFF"),
        "megapixels": _png(20_000, 15_000, b""),
        "square": _png(8193, 8192, b""),
        "long": _png(65_536, 1, b""),
        "no-width": _png(0, 1, b""),
        "no-height": _png(1, 0, b""),
        "no-data": _png(64, 64, b""),
    }
    for format, data in whole.items():
        for share in (0.02, 0.1, 0.3):
            files[f"{format.lower()}-{share}"] = data[: int(share * len(data))]
    return files


def _refused(folder: Path, name: str, data: bytes) -> dict[str, str]:
    file = folder / f"not-{name}"
    file.write_bytes(data)
    try:
        read_image(file)
    except BadInput as error:
        return {"file": file.name, "said": str(error).replace(str(file), "", 1)}
    raise AssertionError(f"{name} was read")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
