"""What a selection rule did to realism, diversity, coverage of the real class and balance: figures and a picture."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass
class SelectionReport:
    """Takes in class after class and keeps only what it will tell.

    Args:
        rule: Name of the selection rule.
        class_names: In label order.
    """

    rule: Selection
    class_names: Sequence[str]
    _classes: list[dict[str, dict[str, float | None]]] = field(default_factory=list)
    _losses: dict[str, list[Tensor]] = field(default_factory=dict)
    _clouds: list[tuple[str, dict[str, np.ndarray]]] = field(default_factory=list)
    _counts: list[int] = field(default_factory=list)
    _num_candidates: int = 0

    def add(self, candidates: Candidates, kept: Tensor) -> None:
        """Takes in one class.

        Args:
            candidates: All that could be kept, with features; real images are compared where there are scores of them.
            kept: Positions of those that were, int64 (ipc,).
        """
        by_number = candidates.numbers.argsort()
        at_random = by_number[select_random(len(candidates), len(kept), candidates.seed, candidates.class_index)]
        sets = {
            "kept": candidates.scores.rows(kept),
            "random": candidates.scores.rows(at_random),
            "candidates": candidates.scores,
        }
        real = candidates.real
        if real is not None:
            sets["real"] = real
        self._classes.append({name: _figures(name, found, real, candidates) for name, found in sets.items()})
        for name, found in sets.items():
            self._losses.setdefault(name, []).append(found.loss)
        if real is not None and len(self._clouds) < DRAWN_CLASSES and real.features is not None and len(real) > 2:
            self._clouds.append((self.class_names[candidates.class_index], _cloud(sets)))
        self._counts.append(len(kept))
        self._num_candidates += len(candidates)

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures, means over classes, for provenance and card."""
        worst = min(range(len(self._classes)), key=lambda i: self._classes[i]["kept"]["class_named"] or 0.0)
        return {
            "rule": self.rule,
            "candidates": self._num_candidates,
            "mean_realism_loss_pool": self._mean("candidates", "loss"),
            "mean_realism_loss_kept": self._mean("kept", "loss"),
            "class_named_pool": self._mean("candidates", "class_named"),
            "class_named_kept": self._mean("kept", "class_named"),
            "class_named_least": self._classes[worst]["kept"]["class_named"],
            "class_named_least_class": self.class_names[worst],
            "images_per_class": [min(self._counts), max(self._counts)],
            "compared_classes": sum("real" in figures for figures in self._classes),
            "table": {
                _SHOWN[name]: {figure: self._mean(name, figure) for figure in _FIGURES}
                for name in _SHOWN
                if name in self._losses
            },
        }

    def lines(self) -> list[str]:
        """Returns the figures as a table for people."""
        found = self.to_dict()
        low, high = found["images_per_class"]
        lines = [f"selection {self.rule:<16}   mean loss  class named  distance  coverage"]
        for name, row in found["table"].items():
            lines.append(
                f"  {name:<24}{_number(row['loss'], '12.3f')}{_number(row['class_named'], '13.1%')}"
                f"{_number(row['distance'], '10.2f')}{_number(row['coverage'], '10.1%')}"
            )
        lines.append(
            f"  {low if low == high else f'{low} to {high}'} of each class; fewest named rightly:"
            f" {found['class_named_least']:.1%} of {found['class_named_least_class']}"
        )
        return lines

    def draw(self) -> bytes:
        """Draws selection.png: losses of all, and where kept, other and real images of a few classes lie."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        panels = 1 + len(self._clouds)
        figure = Figure(figsize=(1.2 + 3.6 * panels, 3.9), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        self._draw_losses(axes[0])
        for panel, (name, cloud) in zip(axes[1:], self._clouds, strict=True):
            _draw_cloud(panel, name, cloud)
        handles = [
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        ]
        figure.suptitle(f"Selection rule {self.rule}: what it kept", fontsize=11, x=0.01, ha="left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_extra_artists=handles, metadata={"Software": None})
        return buffer.getvalue()

    def _draw_losses(self, axes: Any) -> None:
        losses = {
            name: torch.cat(self._losses[name]).double().clamp(min=LEAST_LOSS).numpy()
            for name in _COLOURS
            if name in self._losses
        }
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
        values = [figures[name][figure] for figures in self._classes if name in figures]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None


def _figures(
    name: str, scores: RealismScores, real: RealismScores | None, candidates: Candidates
) -> dict[str, float | None]:
    covered = None
    if name != "real" and real is not None and real.features is not None and scores.features is not None:
        covered = coverage(real.features, scores.features) if len(real) > 1 else None
    return {
        "loss": float(scores.loss.double().mean()),
        "class_named": float((scores.predicted == candidates.class_index).double().mean()),
        "distance": None if scores.features is None else mean_distance(scores.features),
        "coverage": covered,
    }


def _cloud(sets: dict[str, RealismScores]) -> dict[str, np.ndarray]:
    """Projects features on the two principal components of the real ones."""
    found = {name: sets[name].features for name in _COLOURS}
    real = found["real"]
    assert real is not None
    centre = real.mean(dim=0)
    _, _, directions = torch.linalg.svd((real - centre).double(), full_matrices=False)
    signs = torch.sign(directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)))  # svd leaves them open
    axes = (directions * signs)[:2].T
    return {
        name: ((features - centre).double() @ axes).numpy() for name, features in found.items() if features is not None
    }


def _draw_cloud(axes: Any, name: str, cloud: dict[str, np.ndarray]) -> None:
    for order, (kind, size) in enumerate((("real", 9), ("candidates", 9), ("kept", 26))):
        points = cloud[kind]
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
