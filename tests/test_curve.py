"""The picture of the FID curve, and the best point on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddgen.evaluation.curve import _panels, best_point, describe, draw_fid_curve, read_curves


def write_metrics(path: Path, tail: str = "") -> None:
    records = [{"step": step, "loss": 1.0 / step} for step in range(50, 3050, 50)]
    for step in (1000, 2000, 3000):
        values = {f"fd_convnet3_500/ema_{std}": 4e4 / step**1.2 * (1 + std) for std in (0.05, 0.1)}
        records.append({"step": step, **values, "kid_convnet3_500/ema_0.05": 3.0 / step, "epoch": 1})
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail, encoding="utf-8")


def test_curves_are_read_by_metric_and_average(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", tail='{"step": 2000, "fd_convnet3_500/ema_0.1": 1.5}\n{"step": 40')
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert list(curves) == ["fd_convnet3_500", "kid_convnet3_500"]
    assert list(curves["fd_convnet3_500"]) == ["ema_0.05", "ema_0.1"]
    assert curves["kid_convnet3_500"]["ema_0.05"] == [(1000, 0.003), (2000, 0.0015), (3000, 0.001)]
    assert [step for step, _ in curves["fd_convnet3_500"]["ema_0.1"]] == [1000, 2000, 3000]
    assert curves["fd_convnet3_500"]["ema_0.1"][1] == (2000, 1.5)  # a resumed run's line wins


def test_curve_is_drawn(tmp_path: Path) -> None:
    metrics, png = tmp_path / "metrics.jsonl", tmp_path / "fid_curve.png"
    metrics.write_text('{"step": 50, "loss": 1.0}\n', encoding="utf-8")
    draw_fid_curve(metrics, png)
    assert not png.exists()
    write_metrics(metrics)
    draw_fid_curve(metrics, png)
    with Image.open(png) as picture:
        shown = np.asarray(picture.convert("RGB"))
    assert shown.shape[1] > 2 * shown.shape[0]  # two panels
    for colour in ((0x1F, 0x6F, 0x8B), (0xD1, 0x60, 0x3D)):
        assert (np.abs(shown.astype(int) - colour).sum(axis=2) < 12).sum() > 200
    assert [item.name for item in tmp_path.glob("*fid_curve*")] == ["fid_curve.png"]


def test_related_measures_share_a_panel(tmp_path: Path) -> None:
    """Eight measures are six panels in two rows, whatever the number of averages."""
    kinds = ("fd", "kid", "precision", "recall", "density", "coverage", "memorised", "consistency")
    lines = [
        {"step": step, "best/step": 1} | {f"{kind}_convnet3_50/ema_{std}": 0.5 for kind in kinds for std in (0.05, 0.1)}
        for step in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    curves = read_curves(tmp_path / "metrics.jsonl")
    names = [name.split("_")[0] for name in curves]
    assert names == ["fd", "kid", "precision", "recall", "density", "coverage", "consistency", "memorised"]
    assert [len(panel) for panel in _panels(curves)] == [1, 1, 2, 2, 1, 1]
    draw_fid_curve(tmp_path / "metrics.jsonl", tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as picture:
        assert picture.width / picture.height == pytest.approx(3 * 5.2 / (2 * 3.6), rel=0.01)


def test_best_point_is_of_the_distance_measured_last(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 50, "loss": 1.0}\n', encoding="utf-8")
    assert best_point(metrics) is None
    write_metrics(metrics, tail='{"step": 3000, "fd_convnet3_500/ema_0.1": 1e3}\n')
    assert best_point(metrics) == ("fd_convnet3_500", 3000, "ema_0.05", pytest.approx(4e4 / 3000**1.2 * 1.05))
    write_metrics(metrics, tail='{"step": 4000, "fid_500/ema_0.1": 70.0}\n{"step": 5000, "fid_500/ema_0.1": 80.0}\n')
    assert best_point(metrics) == ("fid_500", 4000, "ema_0.1", 70.0)


def test_metrics_are_spelt_out() -> None:
    assert describe("fid_1000") == "FID, 1,000 images"
    assert describe("fd_convnet3_500") == "Fréchet distance in convnet3 features, 500 images"
    assert describe("kid_mobilenet-v3-small_1000") == "kernel distance in mobilenet-v3-small features, 1,000 images"
    pair = describe("precision_convnet3_500", "recall_convnet3_500")
    assert pair == "precision and recall in convnet3 features, 500 images"
    assert describe("consistency_resnet18_500") == "images seen as their class by resnet18, 500 images"
    assert describe("memorised_dinov2-base_500") == "near copies of training images in dinov2-base features, 500 images"
