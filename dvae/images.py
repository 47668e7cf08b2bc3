"""Image files <-> tensors: open any picture safely, crop and augment it, lay pictures out in a grid, save PNG.

A picture at rest is a uint8 tensor (3, H, W); at the borders of the models it is float32 (B, 3, H, W) in [0, 1].
This file knows nothing of models, captions or data sets.
"""

import io
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dvae.errors import DataError, UserError
from dvae.files import replacing

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # an allow-list: most holes of decoders are in formats nobody needs
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
MOST_PIXELS = 64_000_000
WHITE = (255, 255, 255)

# What Pillow warns of becomes a note or a DataError; catching its warnings one by one is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

_LONGEST_REASON = 100  # letters of what a decoder says
_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND", b"GIF8": b"\0;"}  # the marks around a file
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class About(NamedTuple):
    """What a picture is, as `examine` saw it.

    `width` and `height` are those of the upright picture, in pixels; `mode` (Pillow's) and `format` are as stored.
    `notes` name every decision that was taken in silence when it was opened, in a fixed wording.
    """

    width: int
    height: int
    mode: str
    format: str
    notes: tuple[str, ...]


def open_image(
    source: bytes | Path, background: tuple[int, int, int] = WHITE, most_pixels: int = MOST_PIXELS
) -> Tensor:
    """The picture in a file (or in its bytes), upright, as uint8 (3, H, W).

    Transparency is composited on `background`; 16 bits are scaled to 8; of an animation the first frame is taken;
    colour profiles and unreadable EXIF are ignored. The number of pixels is compared with `most_pixels` before
    anything is decoded; decoding takes at most about 20 bytes a pixel.

    Raises:
        DataError: the bytes are not one whole picture of an allowed format. `what` is a short reason of one line, after
            the path where one was given.
    """
    if isinstance(source, bytes):
        return _tensor(_open(source, background, most_pixels)[0])
    try:
        if not Path(source).is_file():  # a FIFO would wait for ever
            raise _bad("not a file" if Path(source).exists() else "no such file")
        return _tensor(_open(Path(source).read_bytes(), background, most_pixels)[0])
    except DataError as error:
        raise DataError(f"{source}: {error.what}", error.hint) from error


def examine(content: bytes) -> About:
    """What `open_image` sees in the bytes of a picture; everything is decoded, so this is as sure and as slow.

    Raises:
        DataError: as `open_image`.
    """
    return _open(content, WHITE, MOST_PIXELS)[1]


def _open(content: bytes, background: tuple[int, int, int], most_pixels: int) -> tuple[Image.Image, About]:
    """The picture as upright RGB, and what it was."""
    if not content:
        raise _bad("empty file")
    notes: list[str] = []
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > most_pixels:
                raise _bad(f"too many pixels: {image.width} x {image.height}")
            if image.tile and image.tile[0].codec_name == "bmp_rle":  # decoded in Python: seconds a picture
                raise _bad("a run-length coded BMP is not read")
            mode = image.mode
            if image.format == "PNG":
                _to_8_bits(image, notes)
            image.load()
            picture = _rgb(_upright(image, notes), background, notes)
            if _animated(image):
                notes.append("first of several frames")
            return picture, About(picture.width, picture.height, mode, str(image.format), tuple(notes))
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _bad(f"too many pixels: more than {most_pixels:,}") from error
    except Exception as error:  # of damaged files decoders raise anything: SyntaxError, RuntimeError, struct.error ...
        if _is_cut(content) or "truncated" in str(error).lower():
            raise _bad("truncated") from error
        if isinstance(error, UnidentifiedImageError):
            raise _bad("not an image") from error
        words = " ".join(str(error).split()) or type(error).__name__
        raise _bad(f"cannot be decoded ({words[:_LONGEST_REASON]})") from error


def _bad(reason: str) -> DataError:
    return DataError(reason, f"give a whole picture in one of the formats {', '.join(FORMATS)}")


def _is_cut(content: bytes) -> bool:
    """Whether a file lacks the mark, or the promised length, with which its format ends."""
    if content[8:12] == b"WEBP":
        return len(content) < 8 + int.from_bytes(content[4:8], "little")
    for start, end in _ENDS.items():
        if content.startswith(start):
            return end not in content[-64:]  # some programs write a little more behind it
    return False


def _to_8_bits(image: Image.Image, notes: list[str]) -> None:
    """Pillow scales the pixels of a PNG to 8 bits, but leaves its transparent colour as the file has it."""
    stored = image.tile[0].args if image.tile else ""
    colour = image.info.get("transparency")
    if ";16" in stored:
        notes.append("16-bit scaled to 8")
    if colour is None:
        return
    if stored in ("L;2", "L;4"):
        image.info["transparency"] = colour * (85 if stored == "L;2" else 17)
    elif stored == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in colour)


def _animated(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # there is a second frame, but a damaged one
        return True


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        exif = image.getexif()
        orientation = exif.get(_ORIENTATION, 1)
        readable = orientation in range(9) and (len(exif) > 0 or not image.info.get("exif"))  # 0: not known
    except Exception:  # a camera's broken notes do not spoil its picture
        readable = False
    if not readable:
        notes.append("unreadable EXIF ignored")
    elif orientation in _UPRIGHT:
        notes.append(f"turned upright (EXIF {int(orientation)})")
        return image.transpose(_UPRIGHT[orientation])
    return image


def _rgb(image: Image.Image, background: tuple[int, int, int], notes: list[str]) -> Image.Image:
    profile = image.info.get("icc_profile", b"sRGB") or b""  # None: there is one, and it is damaged
    if b"sRGB" not in profile.replace(b"\0", b""):  # its name may be written in UTF-16
        notes.append("colour profile ignored")
    if image.mode == "CMYK":
        notes.append("CMYK converted")
    if image.mode == "I;16":  # grey; Pillow's own conversion would clip at 255
        grey, clear = np.asarray(image).astype(np.uint32), image.info.get("transparency")
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        if picture.getchannel("A").getextrema()[0] < 255:
            notes.append(f"transparency composited on {'white' if background == WHITE else background}")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*background, 255)), picture)
        return picture.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def square(image: Tensor, size: int) -> Tensor:
    """The central square of uint8 (3, H, W), resampled to uint8 (3, size, size) by Lanczos; no randomness."""
    height, width = image.shape[1:]
    side = min(height, width)
    return _resize(image, (height - side) // 2, (width - side) // 2, side, size, Image.Resampling.LANCZOS)


def augment(image: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """Listing 1 of the paper (stage 1) at any target size: uint8 (3, H, W) -> uint8 (3, size, size).

    A random square along the long side is resampled by area to t x t, with t uniform in 9/8 to 12/8 of `size` as far
    as the picture has the pixels; of it a random `size` x `size` crop is taken, and flipped in half of the cases.
    The paper had no pictures smaller than `size`; here they are enlarged to exactly `size`.
    """
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    image = _random_crop(image, int(top), int(left), (size * 9 // 8, size * 12 // 8), size, rng)
    return image.flip(2) if rng.random() < 0.5 else image


def crop_near_centre(image: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """Listing 2 of the paper (stage 2) at any target size: uint8 (3, H, W) -> uint8 (3, size, size).

    A square from 3/8 to 5/8 of the way along the long side's slack is resampled by area to t x t, with t uniform in
    `size` to 9/8 of it as far as the picture has the pixels; of it a random `size` x `size` crop is taken. Never
    flipped: pictures may contain text. Pictures smaller than `size` are enlarged to exactly `size`.
    """
    slack = np.array(image.shape[1:]) - min(image.shape[1:])
    top, left = rng.integers(slack * 3 // 8, slack - slack * 3 // 8, endpoint=True)
    return _random_crop(image, int(top), int(left), (size, size * 9 // 8), size, rng)


def _random_crop(
    image: Tensor, top: int, left: int, scales: tuple[int, int], size: int, rng: np.random.Generator
) -> Tensor:
    """Of the largest square at (top, left), resampled to a random one of `scales` pixels a side: a random crop."""
    side = min(image.shape[1:])
    scaled = max(int(rng.integers(min(side, scales[0]), min(side, scales[1]), endpoint=True)), size)
    # area averaging repeats pixels when it enlarges; bilinear does not
    resampling = Image.Resampling.BOX if scaled <= side else Image.Resampling.BILINEAR
    image = _resize(image, top, left, side, scaled, resampling)
    top, left = rng.integers(scaled - size + 1, size=2)
    return image[:, top : top + size, left : left + size]


def _resize(image: Tensor, top: int, left: int, side: int, size: int, resampling: Image.Resampling) -> Tensor:
    """The square of `side` pixels at (top, left), resampled to `size` pixels."""
    picture = Image.fromarray(rearrange(image, "c h w -> h w c").contiguous().numpy())
    return _tensor(picture.resize((size, size), resampling, box=(left, top, left + side, top + side)))


def _tensor(picture: Image.Image) -> Tensor:
    return rearrange(torch.from_numpy(np.array(picture)), "h w c -> c h w").contiguous()


def check_batch(images: Tensor, side: int) -> None:
    """Raises UserError if these are not pictures for a model: floats `(B, 3, side, side)`."""
    if images.ndim != 4 or images.shape[1:] != (3, side, side):
        raise UserError(
            f"images of shape {tuple(images.shape)} do not fit this model",
            f"it reads (batch, 3, {side}, {side}); dvae.images.square crops and scales a picture",
        )
    if not images.is_floating_point():
        raise UserError(f"images of {images.dtype} are no floats in [0, 1]", "divide bytes: images.float() / 255")


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [0, 1] of any shape to the nearest of 0..255; what lies outside is clamped. uint8 stays as it is."""
    if images.dtype == torch.uint8:
        return images
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def grid(images: Tensor, columns: int, pad: int = 2) -> Tensor:
    """(B, 3, H, W), float in [0, 1] or uint8, as one uint8 picture (3, H', W'), row by row, `pad` white pixels around.

    H' = rows (H + pad) + pad with rows = ceil(B / columns), and W' likewise; places left over are white.
    """
    images = to_uint8(images)
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % columns), value=255)
    images = F.pad(images, (pad, 0, pad, 0), value=255)
    picture = rearrange(images, "(rows columns) c h w -> c (rows h) (columns w)", columns=columns)
    return F.pad(picture, (0, pad, 0, pad), value=255)


def save(image: Tensor, path: str | Path) -> None:
    """Write (3, H, W), float in [0, 1] or uint8, as a PNG; a file of this name is replaced whole or not at all."""
    pixels = rearrange(to_uint8(image), "c h w -> h w c").cpu().contiguous().numpy()
    with replacing(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")
