"""The oracle is transformers: Gemma 3's image processor (the Pillow one) on the same images."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from gemma3.errors import BadInput
from gemma3.images import FORMATS, network_input, pan_and_scan_boxes, prepare, read_image, to_rgb

PUBLISHED: dict[str, Any] = {
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
SIZE = 56
ORACLE: Any = Gemma3ImageProcessorPil(
    size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, **PUBLISHED
)
SIDES = st.one_of(st.integers(1, 5000), st.sampled_from([1, 255, 256, 257, 511, 512, 513, 768, 1024, 1279, 1280]))


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise over a gradient, which resizing must average in the same way."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 128, width)[None, :, None] + np.linspace(0, 64, height)[:, None, None]
    values = (slope + rng.integers(0, 64, (height, width, 4))).astype(np.uint8)
    bands = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}
    if mode in bands:
        return Image.fromarray(
            values[..., : bands[mode]].squeeze(-1) if mode == "L" else values[..., : bands[mode]], mode
        )
    return Image.fromarray(values[..., :3]).convert(mode)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG with any header, even one that asks for more data than there is."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def write(directory: Path, data: bytes, name: str = "picture") -> Path:
    path = directory / name
    path.write_bytes(data)
    return path


# Pan & Scan


@settings(max_examples=3000)
@given(SIDES, SIDES)
def test_boxes_are_transformers(width: int, height: int) -> None:
    """transformers returns parts of an array. Of arrays of coordinates, these parts show the boxes."""
    x = np.broadcast_to(np.arange(width, dtype=np.int16), (height, width))
    y = np.broadcast_to(np.arange(height, dtype=np.int16)[:, None], (height, width))
    cut_x = ORACLE.pan_and_scan(x[None], *PUBLISHED.values())
    cut_y = ORACLE.pan_and_scan(y[None], *PUBLISHED.values())
    expected = [
        (int(cx[0, 0, 0]), int(cy[0, 0, 0]), int(cx[0, -1, -1]) + 1, int(cy[0, -1, -1]) + 1)
        for cx, cy in zip(cut_x, cut_y, strict=True)
    ]
    assert pan_and_scan_boxes(width, height) == expected


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 300))
def test_boxes_are_a_partition(width: int, height: int, min_crop: int) -> None:
    boxes = pan_and_scan_boxes(width, height, min_crop)
    area = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
    assert area == (width * height if boxes else 0)
    assert len(boxes) != 1
    assert len(boxes) <= 4
    assert boxes == sorted(boxes)
    assert all(right > left and bottom > top for left, top, right, bottom in boxes)


@pytest.mark.parametrize(
    ("width", "height", "crops"),
    [(895, 896, 0), (1024, 896, 0), (1076, 896, 2), (600, 300, 2), (511, 255, 0), (900, 300, 3), (9000, 300, 4)],
)
def test_how_many_crops(width: int, height: int, crops: int) -> None:
    assert len(pan_and_scan_boxes(width, height)) == len(pan_and_scan_boxes(height, width)) == crops


def test_a_smaller_minimum_crop_for_smaller_vision_models() -> None:
    assert pan_and_scan_boxes(224, 112) == []
    assert pan_and_scan_boxes(224, 112, min_crop=32) == [(0, 0, 112, 112), (112, 0, 224, 112)]


# Pixels


@pytest.mark.parametrize("pan_and_scan", [False, True])
@pytest.mark.parametrize(
    "shape", [(56, 56), (40, 30), (300, 300), (1000, 333), (333, 1000), (801, 600), (1, 1), (7, 1), (3000, 1)]
)
def test_pixels_are_transformers(shape: tuple[int, int], pan_and_scan: bool) -> None:
    image = picture(*shape)
    images = prepare(image, SIZE, pan_and_scan)
    expected = ORACLE(image, do_pan_and_scan=pan_and_scan, return_tensors="np")
    assert len(images) == 1 + expected["num_crops"][0]
    ours = np.concatenate([network_input(one) for one in images])
    assert ours.dtype == np.float32
    assert ours.shape == expected["pixel_values"].shape
    np.testing.assert_allclose((ours - 0.5) / 0.5, expected["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 30), (300, 300), (1000, 333), (333, 1000), (57, 55), (7, 1), (3000, 1)])
def test_pixels_are_within_one_step_of_torchvision(shape: tuple[int, int]) -> None:
    """transformers' other backend uses torchvision, which calls this function on uint8."""
    image = picture(*shape)
    (ours,) = prepare(image, SIZE)
    channels_first = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    theirs = torch.nn.functional.interpolate(
        channels_first, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False
    )
    assert np.abs(ours.transpose(2, 0, 1).astype(int) - theirs[0].numpy().astype(int)).max() <= 1


def test_resizing_and_cropping_are_both_exercised_above() -> None:
    assert len(prepare(picture(1000, 333), SIZE, pan_and_scan=True)) == 4


def test_pixels_are_scaled_and_channels_first() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 1] = (255, 51, 0)
    assert network_input(image)[0, :, 0, 1].tolist() == pytest.approx([1.0, 0.2, 0.0])
    assert network_input(image).sum() == pytest.approx(1.2)
    assert network_input(image).flags.c_contiguous


# Modes


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_become_rgb_as_in_transformers(mode: str) -> None:
    image = picture(20, 10, "RGBA").convert("LA").convert("PA") if mode == "PA" else picture(20, 10, mode)
    ours = to_rgb(image)
    assert ours.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(ours), convert_to_rgb(image, return_numpy=True))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF"])
def test_transparent_pixels_become_white(format: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (4, 0, 8, 4))
    read = read_image(write(tmp_path, saved(image, format, **({"lossless": True} if format == "WEBP" else {}))))
    assert read.getpixel((1, 1)) == (255, 255, 255)
    assert read.getpixel((6, 1)) == (200, 0, 0)


def test_half_transparent_pixels_are_blended(tmp_path: Path) -> None:
    read = read_image(write(tmp_path, saved(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG")))
    assert read.getpixel((0, 0)) == (127, 127, 127)


def test_transparent_palette_entries_and_colours_become_white(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for transparency in (0, b"\x00\xff"):
        read = read_image(write(tmp_path, saved(palette, "PNG", transparency=transparency)))
        assert list(read.get_flattened_data()) == [(255, 255, 255), (40, 50, 60)]
    for mode, colour, other in (("RGB", (1, 2, 3), (9, 9, 9)), ("L", 7, 9)):
        image = Image.new(mode, (2, 1), colour)
        image.putpixel((1, 0), other)
        read = read_image(write(tmp_path, saved(image, "PNG", transparency=colour)))
        assert list(read.get_flattened_data()) == [(255, 255, 255), (9, 9, 9)]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = [0x0000, 0x00FF, 0x0100, 0x7FFF, 0x8000, 0xFFFF]
    samples = np.array(values, ">u2").tobytes()
    grey = read_image(write(tmp_path, png(6, 1, 16, 0, b"\0" + samples)))
    high = [(v >> 8,) * 3 for v in values]
    assert list(grey.get_flattened_data()) == high
    colour = read_image(write(tmp_path, png(6, 1, 16, 2, b"\0" + np.repeat(np.array(values, ">u2"), 3).tobytes())))
    assert list(colour.get_flattened_data()) == high
    white_first = read_image(write(tmp_path, png(6, 1, 16, 0, b"\0" + samples, (b"tRNS", b"\x00\x00"))))
    assert list(white_first.get_flattened_data()) == [(255,) * 3, *high[1:]]
    array = np.array([values], np.uint16)
    for image in (Image.fromarray(array), Image.frombytes("I;16B", (6, 1), samples)):
        assert list(to_rgb(image).get_flattened_data()) == high


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_bad_input(mode: str) -> None:
    with pytest.raises(BadInput, match=f"mode {mode} has no stated range"):
        prepare(Image.new(mode, (4, 4)), SIZE)


# Files


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_every_format_and_mode_is_read(format: str, mode: str, tmp_path: Path) -> None:
    image = picture(30, 20, "L").convert("I;16") if mode == "I;16" else picture(30, 20, mode)
    try:
        data = saved(image, format)
    except (OSError, ValueError):
        return  # the format has no such mode
    read = read_image(write(tmp_path, data, "picture.txt"))
    assert (read.mode, read.size) == ("RGB", (30, 20))


def test_every_format_has_some_modes(tmp_path: Path) -> None:
    for format in FORMATS:
        assert read_image(write(tmp_path, saved(picture(30, 20), format))).size == (30, 20)
        assert read_image(write(tmp_path, saved(picture(30, 20, "L"), format))).size == (30, 20)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(format: str, orientation: int, tmp_path: Path) -> None:
    """The red corner goes where Pillow's ImageOps puts it."""
    from PIL import ImageOps

    image = Image.new("RGB", (32, 16), "white")
    image.paste((255, 0, 0), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(tmp_path, saved(image, format, exif=exif.tobytes(), quality=95))
    upright = read_image(path)
    with Image.open(path) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    np.testing.assert_array_equal(np.asarray(upright), np.asarray(expected))
    assert upright.size == ((16, 32) if 5 <= orientation <= 8 else (32, 16))


def test_unreadable_exif_leaves_the_image_as_it_is(tmp_path: Path) -> None:
    plain = read_image(write(tmp_path, saved(picture(30, 20), "JPEG")))
    for exif in (
        b"Exif\0\0",
        b"Exif\0\0nonsense",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x07\0\xff\xff\xff\xff\xff\xff\xff\xff",
    ):
        read = read_image(write(tmp_path, saved(picture(30, 20), "JPEG", exif=exif)))
        np.testing.assert_array_equal(np.asarray(read), np.asarray(plain))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation(format: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert read_image(write(tmp_path, data)).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (20_000, 1), (1, 20_000), (65_535, 2)])
def test_extreme_shapes_work(width: int, height: int, tmp_path: Path) -> None:
    path = write(tmp_path, saved(Image.new("RGB", (width, height), (9, 200, 30)), "PNG"))
    for image in prepare(path, SIZE, pan_and_scan=True):
        assert image.shape == (SIZE, SIZE, 3)
        assert (image == (9, 200, 30)).all()


@pytest.mark.parametrize(
    ("width", "height", "said"),
    [
        (20_000, 15_000, "300000000 pixels, over the limit of 67108864"),
        (10_000, 10_000, "10000 × 10000 pixels, over the limit of 67108864"),
        (8193, 8192, "8193 × 8192 pixels, over the limit"),
        (65_536, 1, "65536 × 1 pixels, a side over 65535"),
    ],
)
def test_large_images_are_refused_from_the_header(width: int, height: int, said: str, tmp_path: Path) -> None:
    """The data is missing: whoever decoded it would say so."""
    with pytest.raises(BadInput, match=said):
        read_image(write(tmp_path, png(width, height, 8, 2, b"")))


def test_the_largest_allowed_are_not(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="damaged or cut short"):
        read_image(write(tmp_path, png(8192, 8192, 8, 2, b"")))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
def test_refusing_300_megapixels_takes_no_memory(tmp_path: Path) -> None:
    path = write(tmp_path, png(20_000, 15_000, 1, 0, bytes(15_000 * 2501)))
    code = (
        "import resource, sys, gemma3.images as i, gemma3.errors as e\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "try: i.read_image(sys.argv[1])\n"
        "except e.BadInput: print((peak() - before) * 1024)"
    )
    grown = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 20e6


def test_refusing_a_large_file_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.write(saved(picture(8, 8), "PNG"))
        file.truncate(2**29 + 1)
    with pytest.raises(BadInput, match=r"large\.png: 537 MB, over 537"):
        read_image(path)


# Bad files

OTHERS = {
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "fits": b"SIMPLE  =                    T".ljust(2880),
    "text": b"a cat on a mat\n",
    "empty": b"",
    "pdf": b"%PDF-1.7\n",
    "zeros": bytes(64),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, OTHERS[name], "picture.png")
    with pytest.raises(BadInput, match=r"picture\.png: begins with .*, not an image in JPEG, PNG, WebP, BMP or GIF"):
        read_image(path)


@pytest.mark.parametrize("format", ["TIFF", "ICO", "PPM", "TGA", "PCX", "JPEG2000", "AVIF", "EPS", "DIB", "ICNS"])
def test_other_formats_that_pillow_knows_are_refused(format: str, tmp_path: Path) -> None:
    Image.init()
    if format not in Image.SAVE:
        pytest.skip("this Pillow cannot write it")
    with pytest.raises(BadInput, match="not an image in JPEG, PNG"):
        read_image(write(tmp_path, saved(picture(64, 64), format), "picture.jpg"))


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.png", tmp_path, Path("/dev/null"), tmp_path / ("x" * 300)):
        with pytest.raises(BadInput, match="give an image") as error:
            read_image(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("width", [0, 1])
def test_a_side_of_zero_is_refused(width: int, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        read_image(write(tmp_path, png(width, 1 - width, 8, 2, b"")))


TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
SAMPLES = {
    **{format: saved(picture(40, 30, seed=1), format) for format in FORMATS},
    "progressive": saved(picture(40, 30), "JPEG", progressive=True),
    "CMYK": saved(picture(40, 30, "CMYK"), "JPEG"),
    "palette": saved(picture(40, 30, "P"), "PNG", transparency=3),
    "16 bits": saved(picture(40, 30, "L").convert("I;16"), "PNG"),
    "lossless": saved(picture(40, 30, "RGBA"), "WEBP", lossless=True),
    "animated": saved(picture(40, 30), "GIF", save_all=True, append_images=[picture(40, 30, seed=3)]),
    "BMP, palette": saved(picture(40, 30, "P"), "BMP"),
    "oriented": saved(picture(40, 30), "JPEG", exif=TURNED),
}


def read_or_refuse(path: Path) -> Image.Image | None:
    try:
        return read_image(path)
    except BadInput:
        return None


@pytest.mark.parametrize("name", SAMPLES)
def test_a_file_cut_short_is_refused_anywhere(name: str, tmp_path: Path) -> None:
    """Only an end that holds no image data (a trailer, further frames) may be missing."""
    data = SAMPLES[name]
    whole = np.asarray(read_image(write(tmp_path, data)))
    for length in {*range(0, len(data), max(1, len(data) // 100)), *range(max(0, len(data) - 20), len(data))}:
        read = read_or_refuse(write(tmp_path, data[:length]))
        if read is not None:
            assert length > 0.5 * len(data)
            np.testing.assert_array_equal(np.asarray(read), whole)


EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=6)
SIGNATURES = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x20\0\0\0WEBPVP8 ", b"BM", b"GIF89a"]


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), EDITS)
def test_damaged_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, edits: list[tuple[float, bytes]]
) -> None:
    """The square puts more of the edits into headers."""
    data = bytearray(SAMPLES[name])
    for where, what in edits:
        start = int(where**2 * len(data))
        data[start : start + len(what)] = what
    read_or_refuse(write(tmp_path_factory.getbasetemp(), bytes(data), "damaged"))


@settings(deadline=None)
@given(st.sampled_from(SIGNATURES), st.binary(max_size=200))
def test_a_signature_and_nonsense_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, signature: bytes, rest: bytes
) -> None:
    read_or_refuse(write(tmp_path_factory.getbasetemp(), signature + rest, "nonsense"))
