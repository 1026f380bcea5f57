"""One encoded image -> square RGB pixels."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

Encoded = bytes | Path | np.ndarray
"""A file's bytes, its path, or decoded uint8 pixels (h, w) or (h, w, 3)."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DIRECT = {"CMYK", "YCbCr", "HSV", "RGBX"}


class BadImageError(Exception):
    """An image that cannot be read; the message is the cause."""


def decode_image(data: Encoded, image_size: int) -> np.ndarray:
    """Decodes one image, upright, as RGB, its centre square resized to `image_size`.

    Grey is replicated, 16-bit grey is scaled by 1/257, transparency is laid over white, CMYK is converted, EXIF
    orientation is applied. An image that already has the right size is not resampled.

    Args:
        data: The image.
        image_size: Side of the result in pixels.

    Returns:
        uint8 (3, image_size, image_size).

    Raises:
        BadImageError: The image cannot be read; says why.
    """
    if isinstance(data, np.ndarray):
        return _square(_to_rgb(Image.fromarray(data)), image_size)
    try:
        content = data.read_bytes() if isinstance(data, Path) else data
        if not content:
            raise BadImageError("empty file")
        with Image.open(io.BytesIO(content)) as image:
            # A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, still at least twice the size asked for.
            if image.mode in ("RGB", "L"):
                image.draft(None, (2 * image_size, 2 * image_size))
            image.load()
            return _square(_upright(_to_rgb(image), _orientation(image)), image_size)
    except (BadImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImageError("not an image") from None
    except Image.DecompressionBombError:
        raise BadImageError("more pixels than Pillow takes for safe (a decompression bomb)") from None
    except Exception as error:  # Pillow's readers raise almost anything on broken bytes: SyntaxError, struct.error, ...
        text = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise BadImageError(text or type(error).__name__) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep(image)
    if image.mode in _DIRECT:
        return image.convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """16-bit grey to RGB: 0..65535 becomes 0..255, where Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise BadImageError(f"pixels of type {values.dtype} have no fixed range; convert to 8 or 16 bit")
    grey = (values.astype(np.uint32) + 128) // 257
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, OSError, struct.error, UserWarning):
        return 1  # EXIF that cannot be read names no orientation; viewers show such an image as it is stored


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _square(image: Image.Image, size: int) -> np.ndarray:
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
