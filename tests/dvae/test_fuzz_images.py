"""Damaged pictures of every kind: each becomes a picture or a short reason, nothing else, within bounded memory.

    pytest tests/dvae/test_fuzz_images.py                              # 2,500 mutations
    DALLE_FUZZ=10000 pytest -s tests/dvae/test_fuzz_images.py          # says what decoders raised, too

Mutation number n is the same in every run and can be made again alone: `mutated(n)`.
"""

import io
import os
import time
import zlib
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from dvae import images, seeds
from dvae.errors import DataError

COUNT = int(os.environ.get("DALLE_FUZZ", "2500"))
MOST_PIXELS = 4_000_000  # of which none may be decoded in more than 20 bytes each
STATUS = Path("/proc/self/status")


def encoded(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


@cache
def seed_files():
    """One small file of each encoding: {name: bytes}. Half of each picture is smooth, half is noise."""
    shape = (40, 48)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 4), dtype=np.uint8)
    pixels[:, :24] = np.linspace(0, 255, 24, dtype=np.uint8)[None, :, None]
    rgba = Image.fromarray(pixels)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    frames = [rgb.rotate(90 * turn, resample=Image.Resampling.NEAREST) for turn in range(3)]
    moving = {"save_all": True, "append_images": frames[1:]}
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "a camera", 72.0
    wide = np.linspace(0, 65535, 40 * 48).reshape(shape).astype(np.uint16)
    profile = b"a colour profile" * 20
    texts = PngInfo()
    texts.add_text("Title", "plain")
    texts.add_text("Comment", "compressed " * 20, zip=True)
    texts.add_itxt("Author", "both", lang="en", tkey="Author", zip=True)
    return {
        "png-grey": encoded(grey, "PNG", transparency=7),
        "png-rgb": encoded(rgb, "PNG", icc_profile=profile, exif=exif, pnginfo=texts, dpi=(72, 72)),
        "png-rgba": encoded(rgba, "PNG"),
        "png-palette": encoded(rgb.quantize(60), "PNG", transparency=bytes(range(60))),
        "png-16": encoded(Image.fromarray(wide), "PNG"),
        "png-bits": encoded(grey.convert("1"), "PNG"),
        "png-moving": encoded(rgb, "PNG", **moving),
        "jpeg": encoded(rgb, "JPEG", quality=80, icc_profile=profile, dpi=(72, 72), comment=b"end \xff\xd9 mark"),
        "jpeg-progressive": encoded(rgb, "JPEG", quality=80, progressive=True),
        "jpeg-cmyk": encoded(rgb.convert("CMYK"), "JPEG", quality=80),
        "jpeg-exif": encoded(rgb, "JPEG", quality=80, exif=exif),
        "jpeg-several": encoded(rgb, "MPO", quality=60, **moving),
        "webp": encoded(rgb, "WEBP", quality=80, exif=exif),
        "webp-lossless": encoded(rgba, "WEBP", lossless=True),
        "webp-moving": encoded(rgb, "WEBP", quality=60, **moving),
        "bmp": encoded(rgb, "BMP"),
        "bmp-palette": encoded(rgb.quantize(60), "BMP"),
        "gif": encoded(rgb.quantize(60), "GIF", interlace=1, transparency=7),
        "gif-moving": encoded(rgb, "GIF", interlace=0, **moving),
    }


def mutated(n):
    """(name of the seed file, its bytes after one to three mutations), a function of n alone."""
    rng = seeds.rng("fuzz", n)
    names = list(seed_files())
    name = names[n % len(names)]
    content = bytearray(seed_files()[name])
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = int(rng.integers(len(content)))
        if rng.random() < 0.5:  # in the headers, behind the magic number
            at = min(7 + int(len(content) ** rng.random()), len(content) - 1)
        kind = rng.choice(["bits", "bits", "number", "number", "run", "piece", "cut", "splice"])
        if kind == "bits":
            for place in rng.integers(at, min(at + 32, len(content)), size=rng.choice([1, 1, 2, 8])):
                content[place] ^= 1 << rng.integers(8)
        elif kind == "number":  # with extreme values
            extreme = [bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\xff\xff\0\0", b"\0\1\0\0"]
            width = int(rng.choice([1, 2, 4]))
            content[at : at + width] = extreme[rng.integers(len(extreme))][:width]
        elif kind == "run":
            length = int(rng.integers(1, 40))
            content[at : at + length] = rng.bytes(length) if rng.random() < 0.5 else bytes([rng.integers(256)]) * length
        elif kind == "piece":  # is left out or repeated
            piece = content[at : at + int(rng.integers(1, 200))]
            content[at : at + len(piece)] = piece * int(rng.choice([0, 2, 5]))
        elif kind == "cut":  # and perhaps something else follows
            content[at:] = rng.bytes(int(rng.integers(64))) if rng.random() < 0.5 else b""
        else:  # the rest is that of another file
            other = seed_files()[names[rng.integers(len(names))]]
            content[at:] = other[rng.integers(len(other)) :]
        if not content:
            break
    if name.startswith("png") and rng.random() < 0.5:
        mend_sums(content)
    return name, bytes(content)


def mend_sums(content):
    """Make the check sums of a PNG's chunks right again, so that what they hold is read."""
    at = 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        if end + 4 > len(content):
            break
        content[end : end + 4] = zlib.crc32(content[at + 4 : end]).to_bytes(4, "big")
        at = end + 4


def memory(what):
    """Bytes of this process, `VmRSS` now or `VmHWM` at most."""
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(what))


@pytest.mark.filterwarnings("ignore")  # as it is outside of pytest
@pytest.mark.parametrize("name", seed_files())
def test_D1_a_cut_file_is_truncated_or_whole(name):
    content = seed_files()[name]
    whole = images.open_image(content)
    reasons = Counter()
    for length in np.linspace(0, len(content) - 1, 60).astype(int):
        try:
            image = images.open_image(content[:length])
            assert torch.equal(image, whole), f"poisoned at {length} of {len(content)}"
            reasons["whole"] += 1
            assert images.examine(content[:length]).format
        except DataError as error:
            reasons[error.what] += 1
            if length >= 12:
                assert error.what == "truncated", f"at {length} of {len(content)}"
    assert reasons["empty file"] == 1
    # what may be missing of a whole picture: other frames, or some bytes behind the pixels
    assert reasons["whole"] <= (45 if name.endswith(("moving", "several")) else 4), reasons
    assert reasons["truncated"] >= 10
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.filterwarnings("ignore")
def test_D4_mutated_files_give_a_picture_or_a_reason(monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", MOST_PIXELS)
    images.open_image(seed_files()["webp"])  # the decoders are there
    if STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
        base = memory("VmRSS")
    opened, refused, raised = Counter(), Counter(), Counter()
    slowest = 0.0, -1
    for n in range(COUNT):
        name, content = mutated(n)
        start = time.process_time()
        try:
            image = images.open_image(content, most_pixels=MOST_PIXELS)
        except DataError as error:
            refused[name] += 1
            raised[type(error.__cause__).__name__] += 1
            assert error.what and error.what.isprintable() and len(error.what) <= 130, (n, error.what)
            if n % 5 == 0:
                with pytest.raises(DataError) as again:
                    images.examine(content)
                assert again.value.what == error.what, n
        else:
            opened[name] += 1
            assert image.dtype == torch.uint8 and image.shape[0] == 3 and image[0].numel() > 0, n
            if n % 5 == 0:
                about = images.examine(content)
                assert (about.height, about.width) == image.shape[1:], n
        slowest = max(slowest, (time.process_time() - start, n))
    assert sum(opened.values()) + sum(refused.values()) == COUNT
    assert len(raised) > 4 and all(refused[name] > 10 for name in seed_files()), "the mutations are too tame"
    assert sum(opened.values()) > COUNT / 10, "the mutations are too wild"
    if STATUS.exists():
        grown = memory("VmHWM") - base
        assert grown < 300e6
        print(f"peak: {grown / 1e6:.0f} MB above {base / 1e6:.0f} MB")
    print(f"opened: {dict(opened)}\nrefused: {dict(refused)}\nraised: {dict(raised)}")
    print(f"slowest: {slowest[0]:.3f} s of CPU time, number {slowest[1]}")


@pytest.mark.parametrize(
    "error, reason",
    [
        (ValueError("two\n  lines"), "cannot be decoded (two lines)"),
        (RecursionError(), "cannot be decoded (RecursionError)"),
        (KeyError("x" * 1000), f"cannot be decoded ('{'x' * 99})"),
        (OSError("Truncated File Read"), "truncated"),
    ],
)
def test_D4_a_reason_is_one_short_line(error, reason, monkeypatch):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(images.Image, "open", broken)
    with pytest.raises(DataError) as caught:
        images.open_image(b"any")
    assert caught.value.what == reason and caught.value.__cause__ is error


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_D4_what_is_not_the_picture_s_fault_is_not_swallowed(error, monkeypatch):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(images.Image, "open", broken)
    with pytest.raises(error):
        images.open_image(b"any")
