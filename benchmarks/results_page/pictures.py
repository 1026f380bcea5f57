"""The pictures of the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ddgen.checkpoint import write_bytes
from ddgen.evaluation.curve import draw_fid_curve, read_curves
from ddgen.evaluation.figure import COLOURS, FAINT, INK
from ddgen.evaluation.rows import IMAGE_SOURCES
from ddgen.page.run import RunRecord
from results_page.scores import OURS, Column, Recipe, Scores, teachers_of
from results_page.small import count

LARGE = 250_000  # bytes above which a picture is made smaller
SMALL_WIDTH = 640  # its pixels then
CAPTION = "Points side by side have equally many images; the axes do not start at 0."
CAPTION_OF_BARS = "Bars: one standard deviation; none where one student was trained. "


@dataclass(frozen=True)
class Pictures:
    """Writes the pictures of a run into docs/ and returns the markdown that shows them.

    Attributes:
        root: Folder of the page.
        name: Of the run.
    """

    root: Path
    name: str

    def accuracy(self, run: RunRecord, scores: Scores) -> str:
        """Draws accuracy against images per class, a panel a protocol and teacher, if there is more than one ipc."""
        if max(map(len, scores.panels)) < 2:
            return ""
        figure = Figure(figsize=(4.8 * len(scores.panels), 4.4), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(scores.panels), squeeze=False)[0]
        handles: dict[str, Any] = {}
        for axes, columns in zip(panels, scores.panels, strict=True):
            handles |= _draw_panel(axes, scores, columns, teachers_of(run))
        place, width = "outside lower center", min(4, 2 * len(scores.panels))
        figure.legend(handles.values(), handles.keys(), loc=place, ncols=width, frameon=False, fontsize=8.5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        alt = f"Accuracy of {scores.student} against images per class"
        shown = self._write(f"accuracy-{scores.student}", alt, lambda path: write_bytes(path, buffer.getvalue()))
        known = any(found.get("std") is not None for row in scores.cells.values() for found in row.values())
        return f"{shown}\n\n{CAPTION_OF_BARS if known else ''}{CAPTION}"

    def curve(self, run: RunRecord) -> str:
        """Draws the FD curve, where it has more than one point."""
        metrics = (run.path or Path()) / "metrics.jsonl"
        found = read_curves(metrics).values() if metrics.is_file() else ()
        if max((len(points) for series in found for points in series.values()), default=0) < 2:
            return ""
        return self._write("fd", "FD curve", lambda path: draw_fid_curve(metrics, path))

    def samples(self, run: RunRecord) -> str:
        """Takes over the last grid of samples that training drew, of which none was chosen."""
        grids = sorted(((run.path or Path()) / "samples").glob("step-*.png"))
        if not grids:
            return ""
        alt = f"Samples of the generator after training, a class a row, no choice made{_guidance(run.config)}"
        data = grids[-1].read_bytes()
        data = _smaller(data) if len(data) > LARGE else data
        return f"{self._write('samples', alt, lambda path: write_bytes(path, data))}\n\n{alt}."

    def preview(self, run: RunRecord) -> str:
        """Takes over the preview of one set, smaller: of the most images per class up to ten."""
        found = [s for s in run.sets if s.distilled_dir is not None and (s.distilled_dir / "preview.png").is_file()]
        if not found:
            return ""
        chosen = min(found, key=lambda s: (s.manifest.get("ipc", 0) > 10, abs(s.manifest.get("ipc", 0) - 10), s.name))
        assert chosen.distilled_dir is not None
        data, note = (chosen.distilled_dir / "preview.png").read_bytes(), ""
        if len(data) > LARGE:
            data, note = _smaller(data), "\n\nMade smaller, with 256 colours."
        alt = f"Images of {chosen.name}, a class a row"
        return self._write("preview", alt, lambda path: write_bytes(path, data)) + note

    def _write(self, kind: str, alt: str, write: Callable[[Path], None]) -> str:
        kind = re.sub(r"[^\w-]+", "-", kind)  # of a network such as torchvision:densenet121
        path = Path("docs") / f"results-{self.name}-{kind}.png"
        write(self.root / path)
        return f"![{alt}]({path.as_posix()})"


def _guidance(config: Mapping[str, Any]) -> str:
    """Says what the samples that training draws are guided by: the model without a class, as the settings have it."""
    scale, interval = config.get("guidance_scale"), config.get("guidance_interval")
    if scale is None or interval is None:
        return ""
    within = f"{interval[0]:g} to {interval[1]:g}"
    return ", no guidance" if scale == 1 else f", classifier-free guidance {scale:g} in {within}"


def _smaller(png: bytes) -> bytes:
    """Shrinks a picture to at most `SMALL_WIDTH` and 256 colours, scattered, so that they do not make patches."""
    with Image.open(io.BytesIO(png)) as image:
        picture = image.convert("RGB")
    width = min(SMALL_WIDTH, picture.width)
    picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    few = picture.quantize(palette=picture.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
    few.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _draw_panel(axes: Axes, scores: Scores, columns: list[Column], teachers: Mapping[str, float]) -> dict[str, Any]:
    """Draws one panel and returns what its legend names: scores with their spread, published ones apart."""
    counts = [ipc for _, ipc in columns]
    step = 1.025 if len(counts) > 1 else 1.08
    handles: dict[str, Any] = {}
    titles = [title for title, row in scores.cells.items() if any(column in columns for column in row)]
    for place, title in enumerate(titles):
        row = scores.cells[title]
        shift = step ** (place - (len(titles) - 1) / 2)  # side by side, so that no error bar hides another
        points = [(column[1] * shift, row[column]) for column in columns if column in row]
        heights = [100 * found["mean"] for _, found in points]
        spread = [math.nan if found.get("std") is None else 100 * found["std"] for _, found in points]
        source = next((source for source in IMAGE_SOURCES if title.startswith(source)), "")
        style = "-" if title in IMAGE_SOURCES else "--"
        handles[title] = axes.errorbar(
            [x for x, _ in points], heights, spread, color=COLOURS.get(source, INK), marker="o", markersize=4,
            capsize=3, linewidth=2.2 if source == OURS else 1.4, linestyle=style, zorder=3 if source == OURS else 2,
        )  # fmt: skip
    for title, known in scores.published.items():
        at = [(column[1], known[column]) for column in columns if column in known]
        if at:
            handles[title] = axes.plot(*zip(*at, strict=True), "D", color=INK, markerfacecolor="none", markersize=6)[0]
    recipe = columns[0][0]
    if recipe.teacher is not None and recipe.teacher in teachers:
        level = 100 * teachers[recipe.teacher]
        handles["teacher"] = axes.axhline(level, color=INK, linewidth=0.9, linestyle=":")
    axes.set_xscale("log")
    lengths = {column[0].epochs for column in columns}
    axes.set_xticks(counts, [str(ipc) if len(lengths) == 1 else f"{ipc}\n{_length(made)}" for made, ipc in columns])
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(counts) / 1.5, max(counts) * 1.5)
    axes.margins(y=0.08)
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    axes.set_xlabel("images per class")
    axes.set_ylabel("top-1 accuracy on real test images (%)")
    epochs = f", {_length(recipe)}" if len(lengths) == 1 and recipe.epochs is not None else ""
    by = f", labels by {recipe.teacher}" if recipe.teacher else ""
    axes.set_title(f"{recipe.protocol}: {scores.student}{by}{epochs}", loc="left", fontsize=10)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def _length(recipe: Recipe) -> str:
    return "the protocol's epochs" if recipe.epochs is None else count(recipe.epochs, "epoch")
