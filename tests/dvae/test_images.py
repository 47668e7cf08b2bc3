import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from dvae import images, seeds
from dvae.errors import DataError

FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF"]
BACKGROUND = (10, 200, 30)


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


def test_grey_and_black_and_white():
    grey = noise(6, 9, 1)
    assert np.array_equal(pixels(encoded(grey)), np.stack([grey] * 3, -1))
    two = Image.fromarray(grey).convert("1")
    expected = np.where(np.asarray(two), 255, 0).astype(np.uint8)
    assert np.array_equal(pixels(encoded(two)), np.stack([expected] * 3, -1))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_rgba_is_composited(form):
    picture = noise(8, 8, 4)
    found = pixels(encoded(picture, form, lossless=True, exact=True), background=BACKGROUND)
    assert np.abs(found - composited(picture[..., :3].astype(float), picture[..., 3])).max() <= 1


def test_grey_with_alpha_is_composited():
    grey, alpha = noise(8, 8, 1), noise(8, 8, 1, seed=1)
    picture = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    found = pixels(encoded(picture), background=BACKGROUND)
    assert np.abs(found - composited(np.stack([grey] * 3, -1).astype(float), alpha)).max() <= 1


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_palette_with_and_without_transparency(form):
    indices = noise(8, 8, 1) % 4
    palette = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 8, 7)], np.uint8)
    picture = Image.fromarray(indices, "L")
    picture.putpalette(palette.tobytes())
    assert np.array_equal(pixels(encoded(picture, form)), palette[indices])
    seen = palette.copy()
    seen[2] = BACKGROUND
    assert np.array_equal(pixels(encoded(picture, form, transparency=2), background=BACKGROUND), seen[indices])


def test_palette_with_half_transparent_entries():
    picture = Image.fromarray(noise(8, 8, 1) % 2, "L")
    picture.putpalette(bytes([255, 0, 0, 0, 0, 255]))
    found = pixels(encoded(picture, transparency=bytes([255, 128])), background=BACKGROUND)
    indices = np.asarray(picture)
    colours = np.array([(255, 0, 0), (0, 0, 255)], float)[indices]
    assert np.abs(found - composited(colours, np.array([255, 128])[indices])).max() <= 1


def test_a_transparent_colour_of_rgb_and_grey():
    grey = noise(8, 8, 1) % 3
    found = pixels(encoded(grey, transparency=1), background=BACKGROUND)
    assert np.array_equal(found, np.where((grey == 1)[..., None], BACKGROUND, np.stack([grey] * 3, -1)))
    colours = noise(8, 8, 3) % 2
    found = pixels(encoded(colours, transparency=(1, 0, 1)), background=BACKGROUND)
    assert np.array_equal(found, np.where((colours == (1, 0, 1)).all(-1, keepdims=True), BACKGROUND, colours))


def test_16_bit_grey_is_scaled_not_clipped():
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # the 8-bit values, exactly
    assert np.array_equal(pixels(encoded(grey))[..., 0], np.arange(256).reshape(16, 16))
    ramp = np.random.default_rng(0).integers(0, 65536, (16, 16)).astype(np.uint16)
    assert np.abs(pixels(encoded(ramp))[..., 1] - ramp / 257).max() <= 0.5


def test_cmyk():
    flat = np.full((16, 16, 4), (0, 255, 255, 0), np.uint8)  # magenta and yellow: red
    found = pixels(encoded(Image.fromarray(flat, "CMYK"), "JPEG", quality=95)).astype(int)
    assert np.abs(found - (255, 0, 0)).max() <= 6


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]]
    moving = encoded(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
    assert (pixels(moving) == (255, 0, 0)).all()


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
def test_exif_orientations_show_the_same_picture(orientation, form):
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


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_impossible_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = noise(5, 4)
    assert np.array_equal(pixels(encoded(picture, exif=exif)), picture)


@pytest.mark.parametrize("exif", [b"", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + b"\x12" * 40])
def test_broken_exif_is_ignored(exif):
    picture = noise(16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(
            pixels(encoded(picture, "JPEG", exif=b"Exif\0\0" + exif)), pixels(encoded(picture, "JPEG"))
        )


# ------------------------------------------------------------------------------------------------------ refusing


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width, height):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width, height", [(8_001, 8_000), (13_000, 13_000), (30_000, 30_000), (2**31 - 1, 1)])
def test_a_bomb_is_refused_before_it_is_decoded(width, height, monkeypatch):
    def decode(self):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with pytest.raises(DataError, match="too many pixels"):
        images.open_image(bomb(width, height))


def test_the_limit_of_pixels_is_exact():
    assert images.open_image(encoded(noise(10, 10)), most_pixels=100).shape == (3, 10, 10)
    with pytest.raises(DataError, match="^too many pixels: 10 x 10$"):
        images.open_image(encoded(noise(10, 10)), most_pixels=99)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_file_is_refused_or_whole(form, progressive):
    content = encoded(noise(24, 20), form, progressive=progressive, interlace=progressive)
    whole = pixels(content)
    refused = []
    for length in range(len(content)):
        try:
            assert np.array_equal(pixels(content[:length]), whole), f"poisoned at {length} of {len(content)}"
        except DataError as error:
            refused.append(length)
            assert error.what and error.hint
    assert len(refused) > 0.9 * len(content)
    assert refused == list(range(len(refused)))  # only end marks may be missing


def test_reasons(tmp_path):
    half = encoded(noise(40, 40))
    for content, reason in [
        (b"", "empty file"),
        (b"a text that is named .png", "not an image"),
        (half[: len(half) // 2], "truncated"),
        (encoded(noise(9, 9), "TIFF"), "not an image"),  # not on the list
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMATS)
def test_mutated_files_give_a_picture_or_a_reason(form):
    content = encoded(noise(24, 20), form)
    rng = np.random.default_rng(1)
    ends = {"picture": 0, "reason": 0}
    for _ in range(200):
        mutated = bytearray(content)
        for _ in range(rng.integers(1, 6)):
            mutated[rng.integers(min(len(mutated), 400))] = rng.integers(256)  # headers are where decoders stumble
        try:
            image = images.open_image(bytes(mutated), most_pixels=100_000)
            assert image.dtype == torch.uint8 and image.shape[0] == 3
            ends["picture"] += 1
        except DataError as error:
            assert "\n" not in error.what
            ends["reason"] += 1
    assert ends["reason"] > 10


def test_truncated_files_are_never_allowed_globally():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


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
