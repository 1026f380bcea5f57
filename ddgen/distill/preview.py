"""The picture of a distilled dataset: one class per row, its name at the left, realism under every image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from ddgen.grids import enlargement, to_pil

MAX_ROWS = 20
MAX_COLUMNS = 10
CELL_SIDE = 96
LARGEST_SIDE = 128
NAME_WIDTH = 220
MARGIN = 24
GAP = 8
CAPTION_HEIGHT = 20
INK, GREY, RED, PAPER = (32, 32, 36), (110, 110, 118), (190, 40, 40), (255, 255, 255)


def draw_preview(
    pixels: torch.Tensor,
    labels: torch.Tensor,
    realism: torch.Tensor,
    recognised: torch.Tensor,
    class_names: Sequence[str],
    title: str,
) -> Image.Image:
    """Draws the first images of every class, or of evenly chosen classes when there are many.

    Args:
        pixels: uint8 (n, 3, h, w).
        labels: int64 (n,).
        realism: Realism loss -log p(class), float32 (n,).
        recognised: Whether the observer finds its class the most probable, bool (n,).
        class_names: Names of the k classes.
        title: First line of the picture.
    """
    rows = _evenly(len(class_names), MAX_ROWS)
    members = [(labels == row).nonzero().flatten()[:MAX_COLUMNS] for row in rows]
    columns = max(len(member) for member in members)
    subtitle = _subtitle(len(rows), len(class_names), columns, int(labels.bincount().max()))
    thumbnails = [[thumbnail(pixels[i]) for i in member] for member in members]
    width, height = next(image.size for row in thumbnails for image in row)

    names = [_fit(class_names[row], _font(17), NAME_WIDTH) for row in rows]
    left = MARGIN + max(int(_font(17).getlength(name)) for name in names) + 2 * GAP
    top = MARGIN + 56
    pitch_x, pitch_y = width + GAP, height + CAPTION_HEIGHT + GAP
    right = max(left + columns * pitch_x - GAP, MARGIN + _widest(title, subtitle)) + MARGIN
    picture = Image.new("RGB", (right, top + len(rows) * pitch_y - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN - 4), title, INK, _font(22))
    draw.text((MARGIN, MARGIN + 26), subtitle, GREY, _font(14))
    for r, (name, member) in enumerate(zip(names, members, strict=True)):
        y = top + r * pitch_y
        draw.text((left - 2 * GAP, y + height // 2), name, INK, _font(17), anchor="rm")
        for c, i in enumerate(member.tolist()):
            x = left + c * pitch_x
            picture.paste(thumbnails[r][c], (x, y))
            probability = float(torch.exp(-realism[i].double()))
            centre = (x + width // 2, y + height + CAPTION_HEIGHT // 2 + 1)
            draw.text(centre, percent(probability), GREY if recognised[i] else RED, _font(13), anchor="mm")
    return picture


def draw_candidates(rows: Sequence[tuple[str, Sequence[Image.Image]]], title: str) -> Image.Image:
    """Draws images of some classes while they are being made.

    Args:
        rows: Name of each class, and its images, all of one size.
        title: First line of the picture.
    """
    names = [_fit(name, _font(17), NAME_WIDTH) for name, _ in rows]
    width, height = rows[0][1][0].size
    left = MARGIN + max(int(_font(17).getlength(name)) for name in names) + 2 * GAP
    columns = max(len(images) for _, images in rows)
    right = max(left + columns * (width + GAP), MARGIN + int(_font(17).getlength(title))) + MARGIN
    top = MARGIN + 32
    picture = Image.new("RGB", (right, top + len(rows) * (height + GAP) + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN - 4), title, INK, _font(17))
    for r, (name, (_, images)) in enumerate(zip(names, rows, strict=True)):
        y = top + r * (height + GAP)
        draw.text((left - 2 * GAP, y + height // 2), name, INK, _font(17), anchor="rm")
        for c, image in enumerate(images):
            picture.paste(image, (left + c * (width + GAP), y))
    return picture


def percent(probability: float) -> str:
    """Writes a probability in whole percent, without rounding a doubt away: 0.998 is not 100%."""
    if 0 < probability < 0.01:
        return "<1%"
    return f"{probability:.1%}" if 0.99 < probability < 0.9995 else f"{probability:.0%}"


def thumbnail(pixels: torch.Tensor) -> Image.Image:
    """Turns one image uint8 (3, h, w) into a picture that is neither tiny nor large."""
    image = to_pil(pixels, enlargement(min(pixels.shape[-2:]), CELL_SIDE))
    if max(image.size) <= LARGEST_SIDE:
        return image
    ratio = LARGEST_SIDE / max(image.size)
    return image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.LANCZOS)


def _evenly(count: int, most: int) -> list[int]:
    """Returns at most `most` of the numbers 0 .. count - 1, evenly spread and with both ends."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _subtitle(rows: int, num_classes: int, columns: int, ipc: int) -> str:
    parts = []
    if rows < num_classes:
        parts.append(f"{rows} of {num_classes} classes, evenly chosen")
    if columns < ipc:
        parts.append(f"the first {columns} of {ipc} images of each")
    parts.append("below each image: the probability the observer gives to its class (red: it favours another)")
    text = "; ".join(parts)
    return text[0].upper() + text[1:]


def _widest(title: str, subtitle: str) -> int:
    return int(max(_font(22).getlength(title), _font(14).getlength(subtitle)))


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Shortens text to a width in pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
