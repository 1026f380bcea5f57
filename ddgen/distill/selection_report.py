"""What a selection rule did to realism, diversity, coverage of the real class and balance: figures and a picture."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddgen.config import Selection
from ddgen.distill.select import LEAST_LOSS, Candidates, select_random, selection_needs
from ddgen.observer.realism import RealismScores
from ddgen.observer.supports import coverage, mean_distance

COMPARED_CLASSES = 10  # with the real images, where the rule itself does not look at these
DRAWN_CLASSES = 3
_FIGURES = ("loss", "class_named", "distance", "coverage")
_COLOURS = {"real": "#c9ced6", "candidates": "#63b4a3", "kept": "#c0392b"}
_SHOWN = {"kept": "kept", "random": "as many at random", "candidates": "all candidates", "real": "real images"}


def compared_classes(rule: Selection, num_classes: int) -> list[int]:
    """Returns the classes whose real images have to be scored: all for rules that need them, otherwise at most ten."""
    if selection_needs(rule).real or num_classes <= COMPARED_CLASSES:
        return list(range(num_classes))
    return [round(i * (num_classes - 1) / (COMPARED_CLASSES - 1)) for i in range(COMPARED_CLASSES)]


@dataclass(frozen=True)
class ClassReport:
    """What there is to tell of one class.

    Attributes:
        label: Which class.
        figures: float64 (4, 4), a row for each of `_SHOWN`, a column for each of `_FIGURES`; nan where unknown.
        losses: What -> realism losses, float32.
        cloud: What -> features on the real ones' two principal components, float32 (n, 2); empty without real ones.
    """

    label: int
    figures: Tensor
    losses: dict[str, Tensor]
    cloud: dict[str, Tensor]

    def to_tensors(self) -> dict[str, Tensor]:
        """Returns everything but the label, by names that `from_tensors` knows."""
        return {
            "figures": self.figures,
            **{f"losses.{name}": found for name, found in self.losses.items()},
            **{f"cloud.{name}": found for name, found in self.cloud.items()},
        }

    @classmethod
    def from_tensors(cls, label: int, tensors: Mapping[str, Tensor]) -> ClassReport:
        """Takes back what `to_tensors` gave."""
        losses, cloud = (
            {name.removeprefix(prefix): found for name, found in tensors.items() if name.startswith(prefix)}
            for prefix in ("losses.", "cloud.")
        )
        return cls(label, tensors["figures"], losses, cloud)

    def figure(self, what: str, name: str) -> float | None:
        """Returns one figure of one set of images, None where it is unknown."""
        value = float(self.figures[list(_SHOWN).index(what), _FIGURES.index(name)])
        return None if math.isnan(value) else value


def report_class(candidates: Candidates, kept: Tensor) -> ClassReport:
    """Measures what was kept of one class against as many at random, all candidates and real images.

    Args:
        candidates: All that could be kept; features, and real images, are told of where they are there.
        kept: Positions of those that were, int64 (ipc,).
    """
    by_number = candidates.numbers.argsort()
    at_random = by_number[select_random(len(candidates), len(kept), candidates.seed, candidates.class_index)]
    sets: dict[str, RealismScores] = {
        "kept": candidates.scores.rows(kept),
        "random": candidates.scores.rows(at_random),
        "candidates": candidates.scores,
    }
    real = candidates.real
    if real is not None:
        sets["real"] = real
    figures = torch.full((len(_SHOWN), len(_FIGURES)), math.nan, dtype=torch.float64)
    for row, name in enumerate(_SHOWN):
        if name in sets:
            compared = None if name == "real" else real
            figures[row] = torch.tensor(_figures(sets[name], compared, candidates.class_index), dtype=torch.float64)
    losses = {name: found.loss for name, found in sets.items()}
    return ClassReport(candidates.class_index, figures, losses, _cloud(sets))


@dataclass(frozen=True)
class SelectionReport:
    """What a rule did to all classes.

    Attributes:
        rule: Name of the selection rule.
        class_names: In label order.
        classes: One report each.
    """

    rule: Selection
    class_names: Sequence[str]
    classes: Sequence[ClassReport]

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures, means over classes, for provenance and card."""
        named = {one.label: one.figure("kept", "class_named") or 0.0 for one in self.classes}
        worst = min(named, key=lambda label: (named[label], label))
        counts = [len(one.losses["kept"]) for one in self.classes]
        return {
            "rule": self.rule,
            "candidates": sum(len(one.losses["candidates"]) for one in self.classes),
            "mean_realism_loss_pool": self._mean("candidates", "loss"),
            "mean_realism_loss_kept": self._mean("kept", "loss"),
            "class_named_pool": self._mean("candidates", "class_named"),
            "class_named_kept": self._mean("kept", "class_named"),
            "class_named_least": named[worst],
            "class_named_least_class": self.class_names[worst],
            "kept_per_class": [min(counts), max(counts)],
            "compared_classes": sum("real" in one.losses for one in self.classes),
            "table": {
                title: {figure: self._mean(name, figure) for figure in _FIGURES}
                for name, title in _SHOWN.items()
                if any(name in one.losses for one in self.classes)
            },
        }

    def lines(self) -> list[str]:
        """Returns the figures as a table for people."""
        found = self.to_dict()
        low, high = found["kept_per_class"]
        lines = [f"selection {self.rule:<16}   mean loss  class named  distance  coverage"]
        for name, row in found["table"].items():
            lines.append(
                f"  {name:<24}{_number(row['loss'], '12.3f')}{_number(row['class_named'], '13.1%')}"
                f"{_number(row['distance'], '10.2f')}{_number(row['coverage'], '10.1%')}"
            )
        lines.append(
            f"  {low if low == high else f'{low} to {high}'} kept of each class; fewest named rightly:"
            f" {found['class_named_least']:.1%} of {found['class_named_least_class']}"
        )
        return lines

    def draw(self) -> bytes:
        """Draws selection.png: losses of all, and where kept, other and real images of a few classes lie."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        clouds = _evenly([one for one in self.classes if one.cloud], DRAWN_CLASSES)
        panels = 1 + len(clouds)
        figure = Figure(figsize=(1.2 + 3.6 * panels, 3.9), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        self._draw_losses(axes[0])
        for panel, one in zip(axes[1:], clouds, strict=True):
            _draw_cloud(panel, self.class_names[one.label], one.cloud)
        handles = axes[0].get_legend_handles_labels()
        legend = figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(f"Selection rule {self.rule}: what it kept", fontsize=11, x=0.01, ha="left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_extra_artists=[legend], metadata={"Software": None})
        return buffer.getvalue()

    def _draw_losses(self, axes: Any) -> None:
        losses = {}
        for name in _COLOURS:
            found = [one.losses[name] for one in self.classes if name in one.losses]
            if found:
                losses[name] = torch.cat(found).double().clamp(min=LEAST_LOSS).numpy()
        everything = np.concatenate(list(losses.values()))
        low, high = np.log10(np.quantile(everything, [0.005, 1.0]))
        edges = np.logspace(low, max(high, low + 0.1), 31)
        for name, values in losses.items():
            axes.hist(
                np.clip(values, edges[0], edges[-1]),
                edges,
                weights=np.full(len(values), 1 / len(values)),
                histtype="step" if name == "kept" else "stepfilled",
                color=_COLOURS[name],
                alpha=1.0 if name == "kept" else 0.6,
                linewidth=1.6,
                label=_SHOWN[name],
            )
        axes.set_xscale("log")
        axes.set_xlabel("realism loss, -log p(class)")
        axes.set_ylabel("part of the images")
        axes.set_title("all classes", fontsize=10)
        _plain(axes)

    def _mean(self, name: str, figure: str) -> float | None:
        """Means over the classes that have the figure."""
        values = [value for one in self.classes if (value := one.figure(name, figure)) is not None]
        return statistics.fmean(values) if values else None


def _figures(scores: RealismScores, real: RealismScores | None, label: int) -> list[float]:
    """Returns what `_FIGURES` names of one set, nan where it is unknown."""
    distance, covered = None, None
    if scores.features is not None:
        distance = mean_distance(scores.features)
        if real is not None and real.features is not None and len(real) > 1:
            covered = coverage(real.features, scores.features)
    return [
        float(scores.loss.double().mean()),
        float((scores.predicted == label).double().mean()),
        math.nan if distance is None else distance,
        math.nan if covered is None else covered,
    ]


def _cloud(sets: Mapping[str, RealismScores]) -> dict[str, Tensor]:
    """Projects features on the two principal components of the real ones."""
    found = {name: sets[name].features for name in _COLOURS if name in sets}
    real = found.get("real")
    if real is None or len(real) < 3 or real.shape[1] < 2:
        return {}
    centre = real.mean(dim=0)
    _, _, directions = torch.linalg.svd((real - centre).double(), full_matrices=False)
    signs = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()  # svd leaves them open
    axes = (directions * signs)[:2].T
    return {name: ((found - centre).double() @ axes).float() for name, found in found.items() if found is not None}


def _evenly(classes: Sequence[ClassReport], most: int) -> list[ClassReport]:
    if len(classes) <= most:
        return list(classes)
    return [classes[round(i * (len(classes) - 1) / (most - 1))] for i in range(most)]


def _draw_cloud(axes: Any, name: str, cloud: Mapping[str, Tensor]) -> None:
    for order, (kind, size) in enumerate((("real", 9), ("candidates", 9), ("kept", 26))):
        points = cloud[kind].numpy()
        edge = {"edgecolors": "white", "linewidths": 0.6} if kind == "kept" else {"linewidths": 0}
        alpha = 1.0 if kind == "kept" else 0.75
        axes.scatter(points[:, 0], points[:, 1], s=size, color=_COLOURS[kind], alpha=alpha, zorder=order + 1, **edge)
    axes.set_title(f"{name}: observer's features", fontsize=10)
    axes.set_xlabel("first principal component", fontsize=8)
    axes.set_ylabel("second", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _number(value: float | None, form: str) -> str:
    width = int(form.split(".")[0])
    return "-".rjust(width) if value is None else format(value, form)
