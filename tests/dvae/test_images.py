import io
import math
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile

from dvae import images, seeds
from dvae.errors import DataError

FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF"]
BACKGROUND = (10, 200, 30)
ROOT = Path(__file__).resolve().parents[2]


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(picture, form="PNG", **options):
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, form, **options)
    return file.getvalue()


def pixels(source, **options):
    """As Pillow's arrays lie: (H, W, 3)."""
    return images.open_image(source, **options).permute(1, 2, 0).numpy()


def notes(source):
    return images.examine(source).notes


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, bits, colour, rows, *chunks):
    """A PNG by hand; `rows` are the raw bytes, each row behind its filter byte 0."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def composited(colours, alpha):
    """The definition of alpha blending: (H, W, 3) over BACKGROUND with (H, W) in 0..255."""
    share = alpha[..., None] / 255
    return colours * share + np.array(BACKGROUND) * (1 - share)


# ------------------------------------------------------------------------------------------------------ opening


def test_layout_and_type(tmp_path):
    picture = noise(7, 5)
    (tmp_path / "a.png").write_bytes(encoded(picture))
    for source in (encoded(picture), tmp_path / "a.png"):
        image = images.open_image(source)
        assert image.shape == (3, 7, 5) and image.dtype == torch.uint8 and image.is_contiguous()
        assert np.array_equal(image.permute(1, 2, 0).numpy(), picture)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_of_the_list(form):
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    assert np.abs(pixels(encoded(flat, form)).astype(int) - flat).max() <= 4


def test_D7_grey_and_black_and_white():
    grey = noise(6, 9, 1)
    assert np.array_equal(pixels(encoded(grey)), np.stack([grey] * 3, -1))
    two = Image.fromarray(grey).convert("1")
    expected = np.where(np.asarray(two), 255, 0).astype(np.uint8)
    assert np.array_equal(pixels(encoded(two)), np.stack([expected] * 3, -1))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_D8_rgba_is_composited(form):
    picture = noise(8, 8, 4)
    found = pixels(encoded(picture, form, lossless=True, exact=True), background=BACKGROUND)
    assert np.abs(found - composited(picture[..., :3].astype(float), picture[..., 3])).max() <= 1


def test_D7_grey_with_alpha_is_composited():
    grey, alpha = noise(8, 8, 1), noise(8, 8, 1, seed=1)
    picture = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    found = pixels(encoded(picture), background=BACKGROUND)
    assert np.abs(found - composited(np.stack([grey] * 3, -1).astype(float), alpha)).max() <= 1


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_D7_palette_with_and_without_transparency(form):
    indices = noise(8, 8, 1) % 4
    palette = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 8, 7)], np.uint8)
    picture = Image.fromarray(indices, "L")
    picture.putpalette(palette.tobytes())
    assert np.array_equal(pixels(encoded(picture, form)), palette[indices])
    seen = palette.copy()
    seen[2] = BACKGROUND
    assert np.array_equal(pixels(encoded(picture, form, transparency=2), background=BACKGROUND), seen[indices])


def test_D7_palette_with_half_transparent_entries():
    picture = Image.fromarray(noise(8, 8, 1) % 2, "L")
    picture.putpalette(bytes([255, 0, 0, 0, 0, 255]))
    found = pixels(encoded(picture, transparency=bytes([255, 128])), background=BACKGROUND)
    indices = np.asarray(picture)
    colours = np.array([(255, 0, 0), (0, 0, 255)], float)[indices]
    assert np.abs(found - composited(colours, np.array([255, 128])[indices])).max() <= 1


def test_D8_a_transparent_colour_of_rgb_and_grey():
    grey = noise(8, 8, 1) % 3
    found = pixels(encoded(grey, transparency=1), background=BACKGROUND)
    assert np.array_equal(found, np.where((grey == 1)[..., None], BACKGROUND, np.stack([grey] * 3, -1)))
    colours = noise(8, 8, 3) % 2
    found = pixels(encoded(colours, transparency=(1, 0, 1)), background=BACKGROUND)
    assert np.array_equal(found, np.where((colours == (1, 0, 1)).all(-1, keepdims=True), BACKGROUND, colours))


def test_D6_16_bit_grey_is_scaled_not_clipped():
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # the 8-bit values, exactly
    assert np.array_equal(pixels(encoded(grey))[..., 0], np.arange(256).reshape(16, 16))
    ramp = np.random.default_rng(0).integers(0, 65536, (16, 16)).astype(np.uint16)
    assert np.abs(pixels(encoded(ramp))[..., 1] - ramp / 257).max() <= 0.5


@pytest.mark.parametrize("key", [None, 0x1234])
def test_D6_16_bit_grey_with_a_transparent_level(key):
    grey = np.array([[0x1234, 0x1235, 0, 0xFFFF]], np.uint16)
    content = png(4, 1, 16, 0, b"\0" + grey.astype(">u2").tobytes(), *([chunk(b"tRNS", b"\x12\x34")] if key else []))
    assert pixels(content)[0, :, 0].tolist() == [255 if key else 18, 18, 0, 255]
    assert notes(content) == ("16-bit scaled to 8",) + (("transparency composited on white",) if key else ())


@pytest.mark.parametrize("colour, channels", [(2, 3), (6, 4), (4, 2)])
def test_D6_16_bit_colours_are_scaled_not_clipped(colour, channels):
    ramp = np.arange(0, 65536, 64)
    levels = np.stack([ramp] * channels, -1)
    if channels != 3:
        levels[:, -1] = 65535  # opaque
    content = png(len(ramp), 1, 16, colour, b"\0" + levels.astype(">u2").tobytes())
    found = pixels(content)[0].astype(int)
    assert found[0].tolist() == [0] * 3 and found[-1].tolist() == [255] * 3
    assert (np.diff(found, axis=0) >= 0).all()
    assert np.abs(found - ramp[:, None] / 257).max() <= 1  # Pillow drops the low byte
    assert notes(content) == ("16-bit scaled to 8",)


def test_D6_16_bit_colours_with_a_transparent_one():
    levels = np.array([[0x1234] * 3, [0x5678] * 3, [0x3412] * 3], ">u2")
    content = png(3, 1, 16, 2, b"\0" + levels.tobytes(), chunk(b"tRNS", b"\x12\x34" * 3))
    assert pixels(content)[0, :, 0].tolist() == [255, 0x56, 0x34]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_D7_few_bits_of_grey_with_a_transparent_level(bits):
    levels = 2**bits  # a row of all of them, of which level 1 is transparent
    packed = int("".join(f"{level:0{bits}b}" for level in range(levels)).ljust(8, "0"), 2)
    row = b"\0" + packed.to_bytes(max(1, levels * bits // 8), "big")
    content = png(levels, 1, bits, 0, row, chunk(b"tRNS", b"\0\1"))
    expected = np.repeat([[level * 255 // (levels - 1)] for level in range(levels)], 3, axis=1)
    expected[1] = BACKGROUND
    assert np.array_equal(pixels(content, background=BACKGROUND)[0], expected)


def test_D8_what_is_opaque_is_not_composited():
    picture = noise(8, 8, 4)
    picture[..., 3] = 255
    assert notes(encoded(picture)) == ()
    assert np.array_equal(pixels(encoded(picture)), picture[..., :3])
    picture[3, 4, 3] = 254
    assert notes(encoded(picture)) == ("transparency composited on white",)


INKS = np.array([(0, 0, 0, 0), (0, 255, 255, 0), (255, 0, 0, 0), (40, 90, 200, 30), (10, 20, 30, 128), (0, 0, 0, 255)])
SEEN = ((255 - INKS[:, :3]) * (255 - INKS[:, 3:]) / 255)[None]  # each ink, and black, takes its share of the light


def blocks(colours):
    return np.kron(colours[None], np.ones((16, 16, 1))).round().astype(np.uint8)


def test_D5_cmyk():
    content = encoded(Image.fromarray(blocks(INKS), "CMYK"), "JPEG", quality=100)
    assert b"Adobe" in content  # the marker that says: inks are stored inverted
    assert np.abs(pixels(content)[8:9, 8::16] - SEEN).max() <= 2
    assert images.examine(content) == (96, 16, "CMYK", "JPEG", ("CMYK converted",))


def test_D5_ycck():
    red, green, blue = INKS[:, :3].T  # YCCK: cyan, magenta and yellow go through the matrix of YCbCr
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    ycc = np.stack([y, 128 + 0.564 * (blue - y), 128 + 0.713 * (red - y)], -1).clip(0, 255)
    stored = np.concatenate([ycc, 255 - INKS[:, 3:]], -1)
    content = encoded(Image.fromarray(blocks(255 - stored), "CMYK"), "JPEG", quality=100)  # Pillow inverts
    transform = content.index(b"Adobe") + 11
    assert content[transform] == 0
    content = content[:transform] + b"\2" + content[transform + 1 :]
    assert np.abs(pixels(content)[8:9, 8::16] - SEEN).max() <= 3
    assert images.examine(content).mode == "CMYK"


FRAMES = [Image.new("RGB", (16, 16), colour) for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "MPO"])
def test_D12_an_animation_gives_its_first_frame(form):
    moving = encoded(FRAMES[0], form, save_all=True, append_images=FRAMES[1:], lossless=True)
    assert np.abs(pixels(moving).astype(int) - (255, 0, 0)).max() <= (2 if form == "MPO" else 0)
    about = images.examine(moving)
    assert about.format == form and about.notes == ("first of several frames",)
    still = "JPEG" if form == "MPO" else form
    assert images.examine(encoded(FRAMES[0], still)).notes == ()


def test_D12_a_damaged_second_frame_does_not_spoil_the_first():
    moving = encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:])
    second = moving.index(b"\x2c", moving.index(b"\x2c") + 10)
    for content in (moving[: second + 1], moving[: second + 5], moving[:second] + bytes(40)):
        assert (pixels(content) == (255, 0, 0)).all()
        assert images.examine(content).width == 16


IGNORED = ("colour profile ignored",)

# EXIF 2.32: the side of the picture on which the stored row 0 and column 0 lie; stored (i, j) shows pixel (y, x)
STORED = {
    1: lambda i, j, h, w: (i, j),  # top, left
    2: lambda i, j, h, w: (i, w - 1 - j),  # top, right
    3: lambda i, j, h, w: (h - 1 - i, w - 1 - j),  # bottom, right
    4: lambda i, j, h, w: (h - 1 - i, j),  # bottom, left
    5: lambda i, j, h, w: (j, i),  # left, top
    6: lambda i, j, h, w: (j, w - 1 - i),  # right, top
    7: lambda i, j, h, w: (h - 1 - j, w - 1 - i),  # right, bottom
    8: lambda i, j, h, w: (h - 1 - j, i),  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_D9_exif_orientations_show_the_same_picture(orientation, form):
    reference = np.kron(noise(4, 3), np.ones((16, 16, 1), np.uint8))  # whole blocks: JPEG keeps them nearly flat
    height, width = reference.shape[:2]
    rows, columns = (height, width) if orientation < 5 else (width, height)
    stored = np.empty((rows, columns, 3), np.uint8)
    for i in range(rows):
        for j in range(columns):
            stored[i, j] = reference[STORED[orientation](i, j, height, width)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if form == "JPEG" else {"lossless": True}
    found = pixels(encoded(stored, form, exif=exif, **options)).astype(int)
    assert found.shape == reference.shape
    assert np.abs(found - reference).max() <= (8 if form == "JPEG" else 0)
    about = images.examine(encoded(stored, form, exif=exif, **options))
    assert (about.height, about.width) == (height, width)
    assert about.notes == (() if orientation == 1 else (f"turned upright (EXIF {orientation})",))


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_D9_an_impossible_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = noise(5, 4)
    assert np.array_equal(pixels(encoded(picture, exif=exif)), picture)
    assert notes(encoded(picture, exif=exif)) == (() if orientation == 0 else ("unreadable EXIF ignored",))


ROTATED = (0x0112, 3, 1, struct.pack(">HH", 6, 0))
NO_DENOMINATOR = (0x011A, 5, 1, struct.pack(">I", 62))  # an x-resolution that lies behind three entries
HUGE = (0x010F, 2, 0xFFFFFFF0, struct.pack(">I", 8))
NOT_A_NUMBER = (0x0112, 5, 1, struct.pack(">I", 62))  # an orientation of 1 / 0


def exif_of(*entries):
    """A big-endian EXIF block of up to four entries, 1 / 0 behind them at byte 62."""
    table = b"".join(struct.pack(">HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + table.ljust(52, b"\0") + struct.pack(">II", 1, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "exif, turned, expected",
    [
        (exif_of(NO_DENOMINATOR), False, ()),
        (exif_of(NO_DENOMINATOR, ROTATED), True, ("turned upright (EXIF 6)",)),
        (exif_of(HUGE), False, ("unreadable EXIF ignored",)),
        (exif_of(HUGE, ROTATED), True, ("turned upright (EXIF 6)",)),
        (exif_of(NOT_A_NUMBER), False, ("unreadable EXIF ignored",)),
        (b"Exif\0\0MM\0*\xff\xff\xff\xff", False, ("unreadable EXIF ignored",)),
        (b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12" * 40, False, ("unreadable EXIF ignored",)),
        (b"Exif\0\0no EXIF at all", False, ("unreadable EXIF ignored",)),
    ],
)
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_D10_broken_exif_does_not_spoil_a_picture(form, exif, turned, expected):
    picture = noise(16, 24)
    plain = pixels(encoded(picture, form))
    content = encoded(picture, form, exif=exif)
    assert np.array_equal(pixels(content), np.rot90(plain, -1) if turned else plain)
    assert notes(content) == expected


def iccp(content):
    return lambda picture: picture[:33] + chunk(b"iCCP", content) + picture[33:]  # behind the header


@pytest.mark.parametrize(
    "form, options, change, expected",
    [
        ("PNG", {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}, None, ()),
        ("JPEG", {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}, None, ()),
        ("PNG", {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()}, None, IGNORED),
        ("JPEG", {"icc_profile": b"no profile at all"}, None, IGNORED),
        ("WEBP", {"icc_profile": b"no profile at all"}, None, IGNORED),
        ("PNG", {}, iccp(b"name\0\0" + b"no zlib stream"), IGNORED),
        ("PNG", {}, iccp(b"name\0\0" + zlib.compress(bytes(1000))[:9]), IGNORED),
        ("JPEG", {"icc_profile": bytes(200_000)}, lambda it: it.replace(b"PROFILE\0\2", b"PROFILE\0\7"), IGNORED),
    ],
)
def test_D11_colour_profiles_are_ignored_and_noted(form, options, change, expected):
    plain, content = encoded(noise(16, 16), form), encoded(noise(16, 16), form, **options)
    content = change(content) if change else content
    assert np.array_equal(pixels(content), pixels(plain))
    assert notes(content) == expected
    assert notes(plain) == ()


# ------------------------------------------------------------------------------------------------------ refusing


def bomb(width, height):
    """Some 66 bytes that claim to be a picture of this size."""
    return png(width, height, 8, 2, bytes(9))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width, height", [(8_001, 8_000), (13_000, 13_000), (30_000, 30_000), (2**31 - 1, 1)])
def test_D13_a_bomb_is_refused_before_it_is_decoded(width, height, monkeypatch):
    def decode(self):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with pytest.raises(DataError, match="too many pixels"):
        images.open_image(bomb(width, height))


def test_D13_the_limit_of_pixels_is_exact():
    assert images.open_image(encoded(noise(10, 10)), most_pixels=100).shape == (3, 10, 10)
    with pytest.raises(DataError, match="^too many pixels: 10 x 10$"):
        images.open_image(encoded(noise(10, 10)), most_pixels=99)
    with pytest.raises(DataError, match="^too many pixels: more than 9,999$"):  # so many that Pillow itself refuses
        images.open_image(bomb(60_000, 60_000), most_pixels=9_999)


def test_D2_D3_reasons(tmp_path):
    half = encoded(noise(40, 40))
    for content, reason in [
        (b"", "empty file"),
        (b"a text that is named .png", "not an image"),
        (half[: len(half) // 2], "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not an image"),
    ]:
        with pytest.raises(DataError) as caught:
            images.open_image(content)
        assert caught.value.what == reason
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(DataError) as caught:
            images.open_image(tmp_path / "a.png")
        assert caught.value.what == f"{tmp_path / 'a.png'}: {reason}"


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    for name, reason in [("none.png", "no such file"), (".", "not a file"), ("fifo.png", "not a file")]:
        with pytest.raises(DataError, match=reason):
            images.open_image(tmp_path / name)


def test_D3_what_a_file_is_called_says_nothing(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(noise(5, 5)))
    assert np.array_equal(pixels(tmp_path / "a.jpg"), noise(5, 5))


def flat(form, mode, side, **options):
    return encoded(Image.new(mode, (side, side)), form, **options)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a while")
def test_D13_D14_bombs_take_a_bounded_memory(tmp_path):
    """In a process of its own: what is above the limit costs nothing, what is below it a bounded number of bytes."""
    text = zlib.compress(bytes(100_000_000), level=1)
    itxt = chunk(b"iTXt", b"Comment\0\1\0\0\0" + text)
    webp = bytearray(encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = (12_999).to_bytes(3, "little") * 2
    gif = bytearray(flat("GIF", "L", 16))
    gif[6:10] = b"\xff" * 4
    bmp = bytearray(flat("BMP", "RGB", 16))
    bmp[18:26] = struct.pack("<II", 13_000, 13_000)
    jpeg = bytearray(flat("JPEG", "RGB", 16))
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = struct.pack(">HH", 13_000, 13_000)
    too_many, too_long = "too many pixels", "Decompressed data too large"
    contents = [
        (bomb(13_000, 13_000), too_many),
        (bomb(60_000, 60_000), too_many),
        (bytes(webp), too_many),
        (bytes(gif), too_many),
        (bytes(bmp), too_many),
        (bytes(jpeg), too_many),
        (png(1, 1, 8, 2, bytes(4), chunk(b"zTXt", b"Comment\0\0" + text)), too_long),
        (png(1, 1, 8, 2, bytes(4), itxt), too_long),
        (png(1, 1, 8, 2, bytes(4), chunk(b"iCCP", b"name\0\0" + text)), too_long),
        (png(1, 1, 8, 2, bytes(4))[:-12] + itxt + chunk(b"IEND", b""), too_long),
    ]
    side = 2_000
    for form, mode, options in [
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {"exif": exif_of(ROTATED)}),
        ("PNG", "I;16", {}),
        ("PNG", "P", {"transparency": 0}),
        ("WEBP", "RGB", {"lossless": True}),
        ("GIF", "L", {}),
        ("JPEG", "CMYK", {}),
    ]:
        contents.append((flat(form, mode, side, **options), ""))
    for number, (content, _) in enumerate(contents):
        assert len(content) < 500_000
        (tmp_path / f"{number:02d}").write_bytes(content)
    found = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == len(contents) and not found.stderr
    for line, (_, reason) in zip(lines, contents, strict=True):
        grown, _, outcome = line.partition(" ")
        if reason:
            assert reason in outcome and int(grown) < 50e6, line
        else:
            assert outcome == "opened" and int(grown) < 20 * side**2 + 10e6, line


CHILD = """
import sys
from pathlib import Path
from dvae import images
from dvae.errors import DataError

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

for path in sorted(Path(sys.argv[1]).iterdir()):
    content = path.read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    base = memory("VmRSS")
    try:
        images.open_image(content)
        outcome = "opened"
    except DataError as error:
        outcome = error.what
    print(memory("VmHWM") - base, outcome)
"""


def test_D14_a_run_length_bitmap_is_refused():
    """Its decoder is written in Python: some kilobytes would take seconds."""
    pixels = b"\1\0\0\0" * 8_000  # one pixel, end of the row
    header = struct.pack("<IiiHHIIiiII", 40, 8_000, 8_000, 1, 8, 1, len(pixels), 0, 0, 0, 0)
    content = b"BM" + struct.pack("<IHHI", 1078 + len(pixels), 0, 0, 1078) + header + bytes(1024) + pixels
    with pytest.raises(DataError) as caught:
        images.examine(content)
    assert caught.value.what == "a run-length coded BMP is not read"


@pytest.mark.parametrize("width, height", [(1, 30_000), (30_000, 1), (1, 1), (3, 2)])
def test_D15_extreme_shapes_are_cut_to_their_centre_and_enlarged(width, height):
    picture = noise(height, width)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    # Lanczos looks at three pixels on each side
    picture[max(top - 3, 0) : top + side + 3, max(left - 3, 0) : left + side + 3] = (9, 99, 199)
    image = images.open_image(encoded(picture))
    assert image.shape == (3, height, width)
    small = images.square(image, 8)
    assert small.shape == (3, 8, 8)
    assert (small == torch.tensor([9, 99, 199])[:, None, None]).all()


@pytest.mark.parametrize("width, height", [(0, 5), (5, 0), (0, 0)])
def test_D15_no_pixels(width, height):
    gif = bytearray(encoded(noise(5, 5, 1), "GIF"))
    frame = gif.index(b"\x2c\0\0\0\0")
    for place in (6, frame + 5):
        gif[place : place + 4] = struct.pack("<HH", width, height)
    bmp = bytearray(encoded(noise(5, 5), "BMP"))
    bmp[18:26] = struct.pack("<II", width, height)
    for content in (png(width, height, 8, 2, bytes(99)), bytes(gif), bytes(bmp)):
        with pytest.raises(DataError):
            images.examine(content)


def test_D16_only_the_decoders_of_the_list_are_called(monkeypatch):
    photoshop = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(14)
    fits = b"".join(line.ljust(80) for line in (b"SIMPLE  = T", b"BITPIX  = 8", b"NAXIS   = 0", b"END"))
    foreign = {
        "EPS": encoded(noise(9, 9), "EPS"),
        "PSD": photoshop,
        "ICO": encoded(noise(16, 16), "ICO"),
        "TIFF": encoded(noise(9, 9), "TIFF"),
        "FITS": fits.ljust(2880),
        "JPEG2000": encoded(noise(9, 9), "JPEG2000"),
    }
    text = [encoded(noise(9, 9), "PDF"), b"<svg xmlns='http://www.w3.org/2000/svg'/>"]  # Pillow reads neither

    def never(*_):
        raise AssertionError("a decoder that is not on the list was called")

    Image.init()
    assert set(foreign) <= set(Image.OPEN)
    for form in set(Image.OPEN) - set(images.FORMATS):
        monkeypatch.setitem(Image.OPEN, form, (never, never))
    for content in foreign.values():
        with pytest.raises(AssertionError, match="not on the list"):
            Image.open(io.BytesIO(content))
    for content in [*foreign.values(), *text]:
        with pytest.raises(DataError) as caught:
            images.open_image(content)
        assert caught.value.what == "not an image"
        with pytest.raises(DataError) as caught:
            images.examine(content)
        assert caught.value.what == "not an image"


def test_examine_says_what_is_stored_and_gives_the_same_reasons():
    assert images.examine(encoded(noise(7, 5))) == (5, 7, "RGB", "PNG", ())
    assert images.examine(encoded(noise(7, 5, 1), "BMP")) == (5, 7, "L", "BMP", ())
    exif = Image.Exif()
    exif[0x0112] = 8
    assert images.examine(encoded(noise(7, 5, 4), exif=exif)) == (
        7,
        5,
        "RGBA",
        "PNG",
        ("turned upright (EXIF 8)", "transparency composited on white"),
    )
    half = encoded(noise(40, 40))
    for content in (b"", b"a text", half[: len(half) // 2], bomb(9_000, 9_000)):
        with pytest.raises(DataError) as opened:
            images.open_image(content)
        with pytest.raises(DataError) as examined:
            images.examine(content)
        assert (examined.value.what, examined.value.hint) == (opened.value.what, opened.value.hint)


# ------------------------------------------------------------------------------------------------------ crops


@pytest.mark.parametrize("height, width", [(12, 12), (12, 20), (21, 12), (13, 12)])
def test_square_without_resampling_is_the_centre(height, width):
    image = torch.from_numpy(noise(height, width)).permute(2, 0, 1)
    top, left = (height - 12) // 2, (width - 12) // 2
    assert torch.equal(images.square(image, 12), image[:, top : top + 12, left : left + 12])


@pytest.mark.parametrize("size", [1, 8, 16, 40])
def test_square_keeps_flat_colours_and_halves(size):
    image = torch.zeros(3, 32, 64, dtype=torch.uint8)
    image[0, :, 32:] = 255
    small = images.square(image, size)
    assert small.shape == (3, size, size) and small.dtype == torch.uint8
    assert (small[1:] == 0).all()
    assert abs(small[0].float().mean() - 127.5) <= 1.5
    assert torch.equal(small, images.square(image, size))


def test_augment_at_the_smallest_scale_is_a_crop_of_the_picture():
    size = 16
    image = torch.from_numpy(noise(size, 40)).permute(2, 0, 1)  # side == size: t == size, nothing is resampled
    windows = [image[:, :, left : left + size] for left in range(25)]
    windows += [window.flip(2) for window in windows]
    seen = set()
    for n in range(400):
        crop = images.augment(image, size, seeds.rng("augment", n))
        (found,) = [k for k, window in enumerate(windows) if torch.equal(crop, window)]
        seen.add(found)
    assert seen == set(range(50))  # every place along the long side, flipped and not


@pytest.mark.parametrize("height, width", [(1, 1), (5, 3), (16, 16), (17, 30), (18, 18), (24, 99), (300, 200), (1, 99)])
def test_augment_any_shape(height, width):
    image = torch.from_numpy(noise(height, width)).permute(2, 0, 1)
    for n in range(5):
        crop = images.augment(image, 16, seeds.rng(n))
        assert crop.shape == (3, 16, 16) and crop.dtype == torch.uint8
        assert torch.equal(crop, images.augment(image, 16, seeds.rng(n)))


def test_augment_scales_as_listing_1_says():
    size, side = 64, 256
    ramp = torch.arange(side, dtype=torch.uint8).expand(3, side, side)  # grey level = column: the crop shows its scale
    spans, flips = set(), 0
    for n in range(300):
        crop = images.augment(ramp, size, seeds.rng("ramp", n))[0, 0].int()
        spans.add(round(side * (size - 1) / abs(int(crop[-1] - crop[0]))))
        flips += int(crop[-1] < crop[0])
    assert min(spans) in (71, 72, 73) and max(spans) in (95, 96, 97)  # 9/8 and 12/8 of 64
    assert len(spans) > 15
    assert 110 < flips < 190


def resized(monkeypatch):
    """What Pillow is asked for, as (box, side, resampling), each answered with a picture that shows its own columns."""
    asked = []

    def resize(picture, size, resample, box):
        asked.append((box, size, resample))
        column = np.arange(size[0]) // 256, np.arange(size[0]) % 256, np.zeros(size[0])
        return Image.fromarray(np.broadcast_to(np.stack(column, -1).astype(np.uint8), (*size, 3)))

    monkeypatch.setattr(Image.Image, "resize", resize)
    return asked


@pytest.mark.parametrize(
    "height, width, lowest, highest",
    [(256, 300, 256, 256), (270, 256, 256, 256), (300, 280, 280, 280), (300, 600, 288, 300), (500, 420, 288, 384)],
)
def test_listing_1_draws_every_size_between_its_bounds(height, width, lowest, highest, monkeypatch):
    """At the paper's 256 px: t from min(s, 288) to min(s, 384), both ends too, by area; the square is the largest one;
    the crop lies anywhere in it and is flipped in about half (1,000 tries: 4 standard errors are 0.063)."""
    asked, image = resized(monkeypatch), torch.zeros(3, height, width, dtype=torch.uint8)
    side, tries, sizes, starts, flips = min(height, width), 1000, [], [], 0
    for n in range(tries):
        crop = images.augment(image, 256, seeds.rng("listing", n))
        ((left, top, right, bottom), (t, _), resampling), *more = asked
        asked.clear()
        assert not more and crop.shape == (3, 256, 256) and crop.dtype == torch.uint8
        assert resampling == Image.Resampling.BOX and (right - left, bottom - top) == (side, side)
        assert 0 <= left <= right <= width and 0 <= top <= bottom <= height
        columns = crop[0, 0].int() * 256 + crop[1, 0].int()
        flips += int(columns[0] > columns[-1])
        first = int(min(columns[0], columns[-1]))
        assert torch.equal(columns.sort().values, torch.arange(first, first + 256))
        sizes.append(t)
        starts.append(first / (t - 256) if t > 256 else 0.5)
    assert set(sizes) == set(range(lowest, highest + 1))
    assert abs(np.mean(sizes) - (lowest + highest) / 2) <= 4 * (highest - lowest + 1) / math.sqrt(12 * tries)
    assert highest == 256 or (min(starts) == 0 and max(starts) == 1 and 0.44 < np.mean(starts) < 0.56)
    assert 0.437 < flips / tries < 0.563


def test_listing_1_takes_its_square_from_anywhere_along_the_long_side(monkeypatch):
    asked = resized(monkeypatch)
    for n in range(400):
        images.augment(torch.zeros(3, 256, 280, dtype=torch.uint8), 256, seeds.rng("square", n))
    lefts = [box[0] for box, *_ in asked]
    assert set(lefts) == set(range(25)) and {box[1] for box, *_ in asked} == {0}


@pytest.mark.parametrize("height, width", [(1, 1), (5, 3), (16, 16), (17, 30), (18, 18), (24, 99), (300, 200), (1, 99)])
def test_crop_near_centre_any_shape(height, width):
    image = torch.from_numpy(noise(height, width)).permute(2, 0, 1)
    for n in range(5):
        crop = images.crop_near_centre(image, 16, seeds.rng(n))
        assert crop.shape == (3, 16, 16) and crop.dtype == torch.uint8
        assert torch.equal(crop, images.crop_near_centre(image, 16, seeds.rng(n)))


def test_crop_near_centre_as_listing_2_says():
    size = 16
    image = torch.from_numpy(noise(size, 96)).permute(2, 0, 1)  # side == size: t == size, nothing is resampled
    windows = [image[:, :, left : left + size] for left in range(81)]  # a slack of 80: 3/8 is 30, 5/8 is 50
    seen = set()
    for n in range(300):
        crop = images.crop_near_centre(image, size, seeds.rng("near", n))
        seen.add(next(k for k, window in enumerate(windows) if torch.equal(crop, window)))  # so it is never flipped
    assert seen == set(range(30, 51))
    size, side = 64, 256
    ramp = torch.arange(side, dtype=torch.uint8).expand(3, side, side)  # grey level = column: the crop shows its scale
    spans = set()
    for n in range(200):
        crop = images.crop_near_centre(ramp, size, seeds.rng("ramp", n))[0, 0].int()
        assert crop[-1] > crop[0]
        spans.add(round(side * (size - 1) / int(crop[-1] - crop[0])))
    assert min(spans) in (63, 64, 65) and max(spans) in (71, 72, 73) and len(spans) >= 7  # 64 and 9/8 of it


def test_area_resampling_is_the_mean_of_blocks():
    image = torch.from_numpy(noise(36, 36)).permute(2, 0, 1)
    means = image.float().unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4))  # side 36 -> t = 18 = 9/8 of 16 = 12/8 of 12
    rng = np.random.default_rng(0)
    windows = [means[:, y : y + 12, x : x + 12] for y in range(7) for x in range(7)]
    hits = 0
    for _ in range(60):
        crop = images.augment(image, 12, rng).float()
        distances = [(window - picture).abs().max() for window in windows for picture in (crop, crop.flip(2))]
        hits += min(distances) <= 1  # Pillow rounds after each of its two passes
    assert hits > 0  # whenever t was 18


def test_area_resampling_counts_pixels_whole_or_not_at_all():
    """Of a picture that changes along its rows only, 44 to 18: edges of picture and result coincide, and a pixel
    belongs to the result's one that its centre falls into."""
    levels = torch.from_numpy(noise(1, 44)).permute(2, 0, 1)
    inside = (torch.arange(44) + 0.5) / (44 / 18)
    means = torch.stack([levels[..., inside.int() == k].float().mean(-1) for k in range(18)], -1)
    windows = [window for x in range(3) for window in (means[..., x : x + 16], means[..., x : x + 16].flip(2))]
    crops = [images.augment(levels.expand(3, 44, 44), 16, seeds.rng("whole", n)).float() for n in range(60)]
    near = [(window - crop).abs().max() < 0.51 for crop in crops for window in windows]
    assert sum(near) >= 4


def test_area_resampling_rounds_to_the_nearest_of_256_levels():
    """Of a picture that changes along its rows only: each level is the rounded mean of three, when t is 18 of 54."""
    levels = torch.from_numpy(noise(1, 54)).permute(2, 0, 1)
    levels[:, :, :6], levels[:, :, 6:12] = 0, 255
    means = (levels.float().unfold(2, 3, 3).mean(3) + 1e-3).round().to(torch.uint8).expand(3, 16, 18)
    windows = [means[:, :, x : x + 16] for x in range(3)]
    windows += [window.flip(2) for window in windows]
    crops = [images.augment(levels.expand(3, 54, 54), 16, seeds.rng("levels", n)) for n in range(60)]
    assert sum(any(torch.equal(crop, window) for window in windows) for crop in crops) >= 4


# ------------------------------------------------------------------------------------------------------ out again


def test_to_uint8_rounds_and_clamps():
    floats = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 127.6 / 255, 1.0, 7.0])
    assert images.to_uint8(floats).tolist() == [0, 0, 0, 1, 127, 128, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(levels.float() / 255), levels)
    assert torch.equal(images.to_uint8(levels), levels)


def test_grid_places_every_picture():
    batch = torch.from_numpy(np.stack([noise(4, 6, seed=n) for n in range(5)])).permute(0, 3, 1, 2)
    picture = images.grid(batch, columns=3, pad=2)
    assert picture.shape == (3, 2 * (4 + 2) + 2, 3 * (6 + 2) + 2)
    white = torch.ones(picture.shape[1:], dtype=torch.bool)
    for n, image in enumerate(batch):
        top, left = 2 + n // 3 * 6, 2 + n % 3 * 8
        assert torch.equal(picture[:, top : top + 4, left : left + 6], image)
        white[top : top + 4, left : left + 6] = False
    assert (picture[:, white] == 255).all()
    assert torch.equal(images.grid(batch.float() / 255, 3), picture)
    assert images.grid(batch[:4], columns=2, pad=0).shape == (3, 8, 12)


def test_save_and_open_again(tmp_path):
    image = torch.from_numpy(noise(9, 7)).permute(2, 0, 1)
    images.save(image, tmp_path / "new" / "a.png")
    assert torch.equal(images.open_image(tmp_path / "new" / "a.png"), image)
    images.save(image.float() / 255, tmp_path / "new" / "a.png")
    assert torch.equal(images.open_image(tmp_path / "new" / "a.png"), image)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
