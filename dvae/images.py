"""Image files <-> tensors: open any picture safely, crop and augment it, lay pictures out in a grid, save PNG.

A picture at rest is a uint8 tensor (3, H, W); at the borders of the models it is float32 (B, 3, H, W) in [0, 1].
This file knows nothing of models, captions or data sets.
"""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dvae.errors import DataError
from dvae.files import replacing

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # an allow-list: most holes of decoders are in formats nobody needs
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
MOST_PIXELS = 64_000_000

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


def open_image(
    source: bytes | Path, background: tuple[int, int, int] = (255, 255, 255), most_pixels: int = MOST_PIXELS
) -> Tensor:
    """The picture in a file (or in its bytes), upright, as uint8 (3, H, W).

    Transparency is composited on `background`; 16-bit grey is scaled to 8 bits; of an animation the first frame is
    taken; unreadable EXIF is ignored. The number of pixels is compared with `most_pixels` before anything is decoded.

    Raises:
        DataError: the bytes are not one whole picture of an allowed format. `what` is a short reason, after the
            path where one was given.
    """
    if isinstance(source, bytes):
        return _open(source, background, most_pixels)
    try:
        if not Path(source).is_file():  # a FIFO would wait for ever
            raise _bad("not a file" if Path(source).exists() else "no such file")
        return _open(Path(source).read_bytes(), background, most_pixels)
    except DataError as error:
        raise DataError(f"{source}: {error.what}", error.hint) from error


def _open(content: bytes, background: tuple[int, int, int], most_pixels: int) -> Tensor:
    if not content:
        raise _bad("empty file")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > most_pixels:
                raise _bad(f"too many pixels: {image.width} x {image.height}")
            image.load()
            return _tensor(_rgb(_upright(image), background))
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise _bad("not an image") from error
    except Image.DecompressionBombError as error:
        raise _bad(f"too many pixels: more than {most_pixels:,}") from error
    except Exception as error:  # of damaged files decoders raise anything: SyntaxError, RuntimeError, struct.error ...
        reason = "truncated" if "truncated" in str(error).lower() else f"cannot be decoded ({error})"
        raise _bad(reason) from error


def _bad(reason: str) -> DataError:
    return DataError(reason, f"give a whole picture in one of the formats {', '.join(FORMATS)}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # a camera's broken notes do not spoil its picture
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        grey = np.asarray(image, dtype=np.int64).clip(0, 65535)
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, (*background, 255)), picture).convert("RGB")
    return image.convert("RGB")


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
    scaled = int(rng.integers(min(side, size * 9 // 8), min(side, size * 12 // 8), endpoint=True))
    scaled = max(scaled, size)
    # area averaging repeats pixels when it enlarges; bilinear does not
    resampling = Image.Resampling.BOX if scaled <= side else Image.Resampling.BILINEAR
    image = _resize(image, int(top), int(left), side, scaled, resampling)
    top, left = rng.integers(scaled - size + 1, size=2)
    image = image[:, top : top + size, left : left + size]
    return image.flip(2) if rng.random() < 0.5 else image


def _resize(image: Tensor, top: int, left: int, side: int, size: int, resampling: Image.Resampling) -> Tensor:
    """The square of `side` pixels at (top, left), resampled to `size` pixels."""
    picture = Image.fromarray(rearrange(image, "c h w -> h w c").contiguous().numpy())
    return _tensor(picture.resize((size, size), resampling, box=(left, top, left + side, top + side)))


def _tensor(picture: Image.Image) -> Tensor:
    return rearrange(torch.from_numpy(np.array(picture)), "h w c -> c h w").contiguous()


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
