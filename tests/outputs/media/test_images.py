"""Input pictures: turned upright, laid over white, converted to sRGB; one-line errors for unsuitable files."""

import hashlib
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from hydrarun.core.errors import UsageError
from hydrarun.core.printable import make_printable
from hydrarun.outputs.media import images

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "BMP": {}}


def saved(folder: Path, image: Image.Image, name: str = "a.png", **options: object) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    image = images.read_image(path).image
    assert image.mode == "RGB"
    return np.asarray(image)


def colors(image: Image.Image) -> set[object]:
    return {color for _, color in image.getcolors()}


def refused(path: str | Path) -> str:
    """Return the error of `read_image` without the key and the path."""
    with pytest.raises(UsageError) as caught:
        images.read_image(path)
    message = str(caught.value)
    start = make_printable(f"input.images: {path}: ")
    assert message.startswith(start)
    assert "\n" not in message
    return message.removeprefix(start)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_plain_picture_is_itself(tmp_path, kind):
    path = saved(tmp_path, PICTURE, f"a.{kind.lower()}", **LOSSLESS[kind])
    read = images.read_image(path)
    assert np.array_equal(np.asarray(read.image), PIXELS)
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read.path == path
    assert read.note is None


def test_a_jpeg_is_what_pillow_decodes(tmp_path):
    path = saved(tmp_path, PICTURE, "a.jpg")
    assert np.array_equal(pixels(path), np.asarray(Image.open(path)))


# grey levels of the upright corners (top left, top right, bottom left, bottom right), if 10, 20, 30, 40 are stored;
# from the table of the EXIF standard: in orientation 6 the stored first row is the right side, first column the top
CORNERS = {
    1: (10, 20, 30, 40),
    2: (20, 10, 40, 30),
    3: (40, 30, 20, 10),
    4: (30, 40, 10, 20),
    5: (10, 30, 20, 40),
    6: (30, 10, 40, 20),
    7: (40, 20, 30, 10),
    8: (20, 40, 10, 30),
    9: (10, 20, 30, 40),  # no such orientation
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_exif_orientation_is_applied_once(tmp_path, orientation, kind):
    stored = np.zeros((16, 24, 3), dtype=np.uint8)
    stored[[0, 0, -1, -1], [0, -1, 0, -1]] = np.array([[10], [20], [30], [40]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(stored), f"a.{kind.lower()}", exif=exif, **LOSSLESS[kind])
    image = images.read_image(path).image
    assert image.size == ((16, 24) if 5 <= orientation <= 8 else (24, 16))
    upright = np.asarray(image)[..., 0]
    assert tuple(upright[[0, 0, -1, -1], [0, -1, 0, -1]]) == CORNERS[orientation]
    assert ImageOps.exif_transpose(image).tobytes() == image.tobytes()  # no orientation is left to apply again


def test_damaged_exif_data_is_named_and_the_pixels_are_read(tmp_path):
    read = images.read_image(saved(tmp_path, PICTURE, exif=b"Exif\0\0rubbish, rubbish"))
    assert np.array_equal(np.asarray(read.image), PIXELS)
    assert read.note == "its EXIF data cannot be read: taken as upright"


@pytest.mark.parametrize(
    ("image", "color"),
    [
        (Image.new("RGBA", (16, 16), (255, 0, 100, 128)), (255, 127, 177)),  # 100 * 128/255 + 255 * 127/255 = 177.2
        (Image.new("RGBA", (16, 16), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (16, 16), (100, 64)), (216, 216, 216)),  # 100 * 64/255 + 255 * 191/255 = 216.1
        (Image.new("RGBA", (16, 16), (9, 8, 7, 254)), (10, 9, 8)),
    ],
)
def test_transparency_is_laid_over_white(tmp_path, image, color):
    read = images.read_image(saved(tmp_path, image))
    assert colors(read.image) == {color}
    assert read.note == "transparency laid over white"


def palette(mode: str) -> Image.Image:
    """Left half colour 0, right half colour 1."""
    image = Image.new(mode, (16, 16))
    image.putpalette([200, 100, 0, 10, 20, 30])
    image.paste(1, (8, 0, 16, 16))
    return image


def test_transparency_of_a_palette_is_laid_over_white(tmp_path, recwarn):
    read = images.read_image(saved(tmp_path, palette("P"), transparency=bytes([128, 255])))
    assert read.image.getpixel((0, 0)) == (227, 177, 127)  # c * 128/255 + 255 * 127/255
    assert read.image.getpixel((15, 15)) == (10, 20, 30)
    assert read.note == "transparency laid over white"
    assert not recwarn.list


def test_a_transparent_color_of_a_palette_or_of_a_picture_is_white(tmp_path):
    read = images.read_image(saved(tmp_path, palette("P"), transparency=0))
    assert (read.image.getpixel((0, 0)), read.image.getpixel((15, 15))) == ((255, 255, 255), (10, 20, 30))
    read = images.read_image(saved(tmp_path, Image.new("RGB", (16, 16), (1, 2, 3)), transparency=(1, 2, 3)))
    assert colors(read.image) == {(255, 255, 255)}


def test_a_palette_with_alpha_is_laid_over_white():
    notes: list[str] = []
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 128)).convert("PA")  # no supported format stores this mode
    assert colors(images._lay_over_white(image, notes)) == {(127, 127, 127)}
    assert notes == ["transparency laid over white"]


def test_an_opaque_alpha_channel_is_worth_no_note(tmp_path):
    read = images.read_image(saved(tmp_path, PICTURE.convert("RGBA")))
    assert np.array_equal(np.asarray(read.image), PIXELS)
    assert read.note is None


@pytest.mark.parametrize(
    ("image", "name", "color"),
    [
        (Image.new("L", (16, 16), 77), "a.png", (77, 77, 77)),
        (Image.new("1", (16, 16), 1), "a.png", (255, 255, 255)),
        (palette("P").crop((0, 0, 8, 8)).resize((16, 16)), "a.bmp", (200, 100, 0)),
        (Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "a.tif", (0, 255, 255)),
        (Image.new("CMYK", (16, 16), (0, 0, 0, 155)), "a.tif", (100, 100, 100)),
    ],
)
def test_other_modes_become_rgb(tmp_path, image, name, color):
    read = images.read_image(saved(tmp_path, image, name))
    assert (read.image.mode, colors(read.image), read.note) == ("RGB", {color}, None)


def xyz(*numbers: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(number * 65536) for number in numbers))


def linear_profile(space: bytes) -> bytes:
    """An ICC profile (version 2) with sRGB's primaries and gamma 1."""
    gamma = b"curv\0\0\0\0" + struct.pack(">IHH", 1, 0x0100, 0)
    white = xyz(0.9642, 1.0, 0.8249)
    grey = {b"wtpt": white, b"kTRC": gamma}
    primaries = {b"rXYZ": xyz(0.4361, 0.2225, 0.0139), b"gXYZ": xyz(0.3851, 0.7169, 0.0971)}
    primaries |= {b"bXYZ": xyz(0.1431, 0.0606, 0.7141), b"rTRC": gamma, b"gTRC": gamma, b"bTRC": gamma}
    tags = grey if space == b"GRAY" else {b"wtpt": white, **primaries}
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(content))
        data += content
    head = b"\2\x10\0\0mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28) + white[8:]
    return struct.pack(">II", 128 + len(table + data), 0) + head.ljust(120, b"\0") + table + data


def encoded(level: int) -> float:
    """A linear level as sRGB encodes it; both 0 to 255."""
    return 255 * (1.055 * (level / 255) ** (1 / 2.4) - 0.055)


def test_a_colour_profile_is_applied(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (16, 16), (55, 128, 200)), icc_profile=linear_profile(b"RGB "))
    read = images.read_image(path)
    assert np.allclose(read.image.getpixel((3, 3)), [encoded(55), encoded(128), encoded(200)], atol=1)  # 128, 188, 228
    assert read.note is None


def test_a_grey_profile_is_applied_and_transparency_comes_after(tmp_path):
    path = saved(tmp_path, Image.new("LA", (16, 16), (55, 128)), icc_profile=linear_profile(b"GRAY"))
    over_white = encoded(55) * 128 / 255 + 127
    assert np.allclose(images.read_image(path).image.getpixel((3, 3)), [over_white] * 3, atol=1)  # 191


def test_srgb_pixels_are_not_touched_by_their_own_profile(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    read = images.read_image(saved(tmp_path, PICTURE, icc_profile=profile))
    assert np.array_equal(np.asarray(read.image), PIXELS)
    assert (read.image.info, read.note) == ({}, None)
    nearly_white = Image.new("RGB", (16, 16), (254, 254, 254))  # the profile gives 255: rounding, not another colour
    assert colors(images.read_image(saved(tmp_path, nearly_white, icc_profile=linear_profile(b"RGB "))).image) == {
        (254,) * 3
    }


@pytest.mark.parametrize("profile", [b"rubbish" * 30, linear_profile(b"GRAY")], ids=["damaged", "of another mode"])
def test_a_profile_that_cannot_be_used_is_named(tmp_path, profile):
    read = images.read_image(saved(tmp_path, PICTURE, "a.webp", lossless=True, icc_profile=profile))
    assert np.array_equal(np.asarray(read.image), PIXELS)
    assert read.note == "its colour profile cannot be used: taken as sRGB"


def test_several_notes_are_one_line(tmp_path):
    image = Image.new("RGBA", (16, 16))
    note = images.read_image(saved(tmp_path, image, "a.webp", icc_profile=b"rubbish" * 30)).note
    assert note == "its colour profile cannot be used: taken as sRGB; transparency laid over white"


def test_a_photo_with_previews_behind_it_is_the_photo(tmp_path):
    other = Image.new("RGB", (40, 24))
    path = saved(tmp_path, PICTURE, "a.jpg", format="MPO", save_all=True, append_images=[other])
    read = images.read_image(path)
    assert np.abs(np.asarray(read.image).mean() - PIXELS.mean()) < 5
    assert read.note == "the first of the 2 pictures in this JPEG"


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_several_frames_are_refused(tmp_path, name):
    path = saved(tmp_path, PICTURE, name, save_all=True, append_images=[Image.new("RGB", (40, 24))])
    assert refused(path) == "2 frames or pages; save the one you want as a separate file"


DEEP = "more than 8 bits per channel (mode {}): save it with 8 bits per channel"


@pytest.mark.parametrize(
    ("mode", "name", "message"),
    [
        ("I;16", "a.png", DEEP),
        ("I;16", "a.tif", DEEP),
        ("I", "a.tif", DEEP),
        ("F", "a.tif", DEEP),
        ("LAB", "a.tif", "colour mode {}: save it as RGB with 8 bits per channel"),
    ],
)
def test_other_modes_are_refused(tmp_path, mode, name, message):
    assert refused(saved(tmp_path, Image.new(mode, (16, 16)), name)) == message.format(mode)


OTHER = "not a PNG, JPEG, WEBP, BMP or TIFF image, or damaged at its start"


def test_other_formats_are_refused(tmp_path):
    assert refused(saved(tmp_path, PICTURE, "a.gif")) == OTHER
    for name, content in {"a.png": b"", "b.png": b"a cat", "c.png": b"\x89PNG\r\n\x1a\n"}.items():
        (tmp_path / name).write_bytes(content)
        assert refused(tmp_path / name) == OTHER


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tif"])
def test_truncated_files_are_refused(tmp_path, name):
    path = saved(tmp_path, PICTURE, name)
    data = path.read_bytes()
    for part in (0.95, 0.7, 0.4):
        path.write_bytes(data[: int(len(data) * part)])
        message = refused(path)
        assert message.startswith("damaged or cut short: ") or message == OTHER
    assert pixels(saved(tmp_path, PICTURE, name)).shape == (24, 40, 3)


def test_flipped_bytes_in_the_pixels_are_refused(tmp_path):
    path = saved(tmp_path, PICTURE)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    assert refused(path).startswith("damaged or cut short: ")


@pytest.mark.parametrize("size", [(10_000, 9_000), (30_000, 30_000)], ids=["Pillow warns", "Pillow refuses"])
def test_decompression_bombs_are_refused(tmp_path, size):
    header = b"IHDR" + struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))
    with path.open("ab") as file:
        file.write(struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    assert refused(path) == f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"


def test_sides_and_shapes(tmp_path):
    read = images.read_image(saved(tmp_path, Image.new("RGB", (320, 16))))
    assert read.image.size == (320, 16)
    assert refused(saved(tmp_path, Image.new("RGB", (15, 40)))) == "15 x 40 pixels; each side needs at least 16"
    message = "16 x 321 pixels; the longer side may be at most 20 times the shorter"
    assert refused(saved(tmp_path, Image.new("RGB", (16, 321)))) == message


def test_a_missing_file_names_its_neighbour(tmp_path):
    saved(tmp_path, PICTURE, "cat.png")
    assert refused(tmp_path / "cta.png") == "no such file. Did you mean 'cat.png'?"
    assert refused(tmp_path / "zzzzz") == "no such file."
    assert refused(tmp_path / "none" / "cat.png") == f"no such file, and no folder {tmp_path / 'none'}"


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path) == "a folder, not a file"
    assert refused(tmp_path / "pipe") == "a pipe, not a regular file"
    assert refused("/dev/zero") == "a device, not a regular file"
    assert refused(tmp_path / ("a" * 300)) == "File name too long"
    assert refused(saved(tmp_path, PICTURE, "a.png") / "b.png") == "Not a directory"
    assert refused(f"{tmp_path}/a\0b.png") == "embedded null byte"


@pytest.mark.parametrize(
    "url", ["http://example.com/a.png", "https://a.b/c d.jpg?x=1", "S3://x/a.png", "file:///a.png"]
)
def test_urls_are_refused(url):
    assert refused(url) == "only local files can be read, not URLs: download it first"
    assert refused(Path(url)) == "only local files can be read, not URLs: download it first"


def test_the_home_folder_and_relative_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, PICTURE, "~b (1), [x]=#猫.png")
    assert images.read_image("~/~b (1), [x]=#猫.png").path == path
    assert images.read_image(path.name).path == path
    assert refused("~/a.png").startswith("no such file.")


def test_neither_torch_nor_diffusers_is_imported():
    heavy = "{'torch', 'diffusers', 'transformers'}"
    code = f"import sys, hydrarun.outputs.media.images as _; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
