"""The report page: valid, self-contained, complete, and silent about what a run does not have."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_cases import CPU, images, observer
from PIL import Image

from ddgen import cli
from ddgen.checkpoint import write_json
from ddgen.distill.dataset import DistilledDataset
from ddgen.page.classes import class_parts
from ddgen.page.html import STYLE, Cell, table
from ddgen.page.neighbours import NEIGHBOURS_NAME, save_neighbours
from ddgen.page.page import write_page, write_page_of
from ddgen.page.pictures import curve, rejected_path, save_rejected
from ddgen.page.results import result_parts
from ddgen.page.run import EvaluatedSet, read_run
from ddgen.page.times import time_rows

HOSTILE = ('<script>alert("x")</script>', "a & b's </h4>", "\" onerror='x")
VOID = {"meta", "img", "br", "hr", "link", "line", "circle", "polyline", "rect"}


class Page(HTMLParser):
    """Reads a page as strictly as it can be written: every element closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> with an attribute twice: {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text.append(data)
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def row(images_of: str, protocol: str = "rded", student: str = "convnet3", **more: Any) -> dict[str, Any]:
    scores = more.pop("scores", [0.4321, 0.4567])
    mean = sum(scores) / len(scores)
    return {
        "images": images_of, "protocol": protocol, "student": student, "epochs": 300, "scores": scores,
        "best_scores": [score + 0.01 for score in scores], "image_bytes": 12345, "label_bytes": 67890,
        "seconds": 12.5, "mean": mean, "std": 0.0174 if len(scores) > 1 else None, "best_epoch_mean": mean + 0.01,
        **more,
    }  # fmt: skip


def results(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "dataset": "toys", "num_classes": 3, "num_test": 1797, "image_size": 8, "ipc": 2, "repeats": 2, "seed": 4,
        "epochs_override": None, "flip": True, "teacher": "convnet3", "teacher_accuracy": 0.935, "precision": "no",
        "device": "cpu", "score": "top-1", "rows": rows, **more,
    }  # fmt: skip


def dataset(class_names: tuple[str, ...] = HOSTILE, ipc: int = 2) -> DistilledDataset:
    k = len(class_names)
    labels = torch.arange(k).repeat_interleave(ipc)
    soft = torch.full((k * ipc, k), 0.1 / (k - 1))
    soft[torch.arange(k * ipc), labels] = 0.9
    soft[0, 0], soft[0, 1] = 0.2, 0.75  # the first image looks like another class
    return DistilledDataset(
        pixels=torch.randint(0, 256, (k * ipc, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        labels=labels,
        soft_labels=soft.half(),
        realism=-soft[torch.arange(k * ipc), labels].log(),
        seeds=torch.zeros(k * ipc, dtype=torch.int64),
        indices=torch.arange(k * ipc),
        class_names=class_names,
        provenance={
            "dataset": "toys", "command": "python sample.py --ipc 2", "seed": 0, "num_source_images": 1234,
            "candidates": {"generator": "abc123", "seed": 0}, "recipe": {"sampler": "ddim, 20 steps", "note": "<b>"},
            "selection": {"candidates": 24, "mean_realism_loss_pool": 2.345, "mean_realism_loss_kept": 0.678,
                          "class_named_pool": 0.51, "class_named_kept": 0.83},
            "seconds": {"sampling": 61.0, "ranking": 4.25},
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with everything in it, which tests read and never change."""
    run = tmp_path_factory.mktemp("page") / "run"
    dataset().save(run / "distilled" / "ipc2")
    facts = {"name": "toys", "fingerprint": "f00", "licence": "CC0 <x>", "num_images": 1234, "skipped": {"cat": 3}}
    write_json(run / "dataset.json", facts | {"class_names": list(HOSTILE)})
    (run / "config.yaml").write_text("dataset: toys\nmax_train_steps: 40\ntrain_batch_size: 16\nseed: 0\n")
    lines: list[dict[str, float]] = []
    for step, rate, distance, kernel in ((20, 160.0, 120.0, 0.05), (40, 80.0, 60.0, 0.0307)):
        lines.append({"step": step, "images_per_second": rate})
        lines.append({"step": step, "fd_convnet3_60/ema_0.05": distance, "kid_convnet3_60/ema_0.05": kernel})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "observer_metrics.jsonl").write_text('{"epoch": 1, "seconds": 1.5}\n{"epoch": 2, "seconds": 2.5}\n{"ep')
    write_json(run / "observer" / "config.json", {"network": "convnet3", "accuracy": 0.957})
    found = {"psnr": 28.17, "rfd_convnet3_43": 0.9245, "accuracy": 0.977, "accuracy_reconstructed": 0.961}
    write_json(run / "reconstruction.json", found | {"num_images": 43})
    for name in ("step-00000040", "nearest_training", "reconstructions"):
        (run / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), "red").save(run / "samples" / f"{name}.png")
    rows = [
        row(kind, protocol, student, scores=[start + 0.0421, start + 0.0867], top5=start + 0.0519)
        for start, kind in ((0.4, "distilled"), (0.2, "random real"))
        for protocol in ("rded", "hard")
        for student in ("convnet3", "resnet18")
    ]
    write_json(run / "evaluation" / "ipc2" / "results.json", results(rows, rank_correlation={"architectures": 0.1234}))
    provenance = {"distilled_dir": "x", "remarks": ["Order <i>taken</i>."], "command": "python evaluate.py --ipc 2"}
    write_json(run / "evaluation" / "ipc2" / "provenance.json", provenance | {"versions": {"torch": "9.9"}})
    pixels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    save_rejected(rejected_path(run, run / "distilled" / "ipc2"), pixels, torch.arange(3), torch.full((3,), 0.5))
    return run


def page_of(run: Path, tmp_path: Path) -> tuple[Page, str]:
    html = write_page(run, tmp_path / "report.html").read_text(encoding="utf-8")
    return Page(html), html


def test_the_page_is_valid_and_needs_nothing_else(finished: Path, tmp_path: Path) -> None:
    page, html = page_of(finished, tmp_path)
    assert html.startswith("<!DOCTYPE html>") and page.named("html") == [{"lang": "en"}]
    assert len(page.named("title")) == len(page.named("h1")) == len(page.named("main")) == 1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = [attributes["href"] for attributes in page.named("a")]
    order = ("results", "images", "generator", "recipe", "bytes", "time", "commands", "provenance")
    assert links == [f"#{name}" for name in order]
    assert {str(link)[1:] for link in links} <= set(ids)
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe", html)
    assert {name for tag, attributes in page.elements for name in attributes if name.startswith("on")} == set()
    pictures = page.named("img")
    assert all(str(picture["src"]).startswith("data:image/") and picture["alt"] for picture in pictures)
    for picture in pictures:  # each is a picture of the size that is told
        content = base64.b64decode(str(picture["src"]).partition(",")[2])
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == (int(str(picture["width"])), int(str(picture["height"])))
    assert all(cell.get("scope") in ("col", "row") for cell in page.named("th"))


def test_the_page_has_every_number(finished: Path, tmp_path: Path) -> None:
    page, _ = page_of(finished, tmp_path)
    found = json.loads((finished / "evaluation" / "ipc2" / "results.json").read_text())
    for one in found["rows"]:
        for value in [*one["scores"], *one["best_scores"], one["mean"], one["best_epoch_mean"], one["std"]]:
            assert f"{100 * value:.1f}" in page.words
    expected = [
        "1,797", "93.5", "seed 4", "12.3 kB", "67.9 kB", "67,890", "300", "12.5", "0.4519", "0.1234",  # results.json
        "1,234", "6 images", "24", "2.345", "0.678", "83.0%", "51.0%", "ddim, 20 steps", "abc123",  # the dataset
        "python sample.py --ipc 2", "python evaluate.py --ipc 2", "--config", "torch 9.9", "Order <i>taken</i>.",
        "60 at step 40", "0.0307", "28.17", "97.7%", "96.1%", "0.9245", "CC0 <x>", "95.7%", "40 steps of 16",
        "unreadable, left out 3", "Best rejected", "61%", "4.0 s", "61 s", "4.2 s",
    ]  # fmt: skip
    assert [value for value in expected if value not in page.words] == []


def test_what_rded_real_is_is_told_where_it_stands() -> None:
    with_it, without = (
        Page("".join(result_parts(EvaluatedSet("ipc2", results=results([row("distilled"), row(other)]))))).words
        for other in ("rded real", "random real")
    )
    assert "rded real: crops of real images by RDED" in with_it and "rded real:" not in without


def test_observers_stand_down_and_students_across() -> None:
    rows = [
        row(kind, student=student, observer=teacher, scores=[score])
        for kind, teacher, student, score in (
            ("distilled", "convnet3", "resnet18", 0.11), ("distilled", "convnet3", "vit", 0.12),
            ("distilled", "resnet18", "resnet18", 0.21), ("distilled", "resnet18", "vit", 0.22),
        )
    ]  # fmt: skip
    page = Page("".join(result_parts(EvaluatedSet("ipc2", results=results(rows)))))
    head, first, second = page.rows[:3]
    assert head == ["images", "resnet18", "vit"]
    assert first[0] == "distilledobserver convnet3" and second[0] == "distilledobserver resnet18"
    assert [cell[:4] for cell in (*first[1:], *second[1:])] == ["11.0", "12.0", "21.0", "22.0"]


def test_recipes_classes_and_scores_of_a_full_evaluation() -> None:
    matrix = [[7, 1, 0], [2, 6, 0], [0, 0, 8]]
    rows = [
        row("distilled", "soft", teacher="convnet3", recall=[0.111, 0.222, 0.333], confusion=matrix),
        row("distilled", "soft", teacher="resnet18", recall=[0.444, 0.555, 0.666], top5_scores=[0.91, 0.92]),
        row("distilled", "own", teacher=None),
    ]  # fmt: skip
    more = {
        "teacher": None, "teachers": {"convnet3": 0.801, "resnet18": 0.902},
        "protocols": {"own": {"title": "my own recipe"}},
        "cross_architecture": [{"protocol": "soft", "images": "distilled", "observers": ["convnet3", "resnet18"],
                                "students": ["vit"], "mean": [[0.345], [0.456]], "std": [[0.012], [None]]}],
        "dd_ranking": [{"student": "vit", "protocol": "soft", "hlr": None, "ior": 0.0765, "lrs": None, "ars": 0.3876}],
    }  # fmt: skip
    shown = EvaluatedSet("ipc2", results=results(rows, **more))
    page = Page("".join([*result_parts(shown), *class_parts(shown.results, ("x", "y", "z"))]))
    for expected in ("teacher convnet3, itself 80.1", "teacher resnet18, itself 90.2", "own: my own recipe."):
        assert expected in page.words
    assert [line for line in page.rows if line[0] == "observer"] == [["observer", "vit"]]
    assert ["convnet3", "34.5 ± 1.2"] in page.rows and ["resnet18", "45.6"] in page.rows
    assert ["vit", "soft", "0.0765", "0.3876"] in page.rows  # and no column for what was not measured
    assert ["y", "22.2", "55.5"] in page.rows
    assert ["y", "2", "6", "0"] in page.rows
    soft, own = ([line[0] for line in page.rows[start : start + size]] for start, size in ((1, 2), (4, 1)))
    assert soft == ["distilledobserver convnet3", "distilledobserver resnet18"] and own == ["distilled"]


def test_many_columns_become_a_table_per_protocol() -> None:
    rows = [row("distilled", protocol, student) for protocol in ("rded", "hard") for student in ("a", "b", "c")]
    page = Page("".join(result_parts(EvaluatedSet("ipc2", results=results(rows)))))
    assert [line for line in page.rows if line[0] == "images"][:2] == [["images", "a", "b", "c"]] * 2
    assert "protocol rded" in page.words and "protocol hard" in page.words


def test_the_best_epoch_and_a_cut_training_are_marked() -> None:
    found = results([row("distilled")], epochs_override=7, epochs_changed=["rded"])
    page = Page("".join(result_parts(EvaluatedSet("x", results=found))))
    assert "the best epoch is chosen on the test set and is no score" in page.words
    assert "Epochs were set to 7" in page.words and "not comparable with published numbers" in page.words
    own = results([row("distilled")], epochs_override=300, epochs_changed=[])
    assert "not comparable" not in Page("".join(result_parts(EvaluatedSet("x", results=own)))).words


def test_a_file_that_does_not_say_which_epochs_were_changed_counts_for_all(tmp_path: Path) -> None:
    write_json(tmp_path / "evaluation" / "x" / "results.json", results([row("distilled")], epochs_override=300))
    (shown,) = read_run(tmp_path).sets
    assert shown.results["epochs_changed"] == ["rded"]


def test_hostile_class_names_are_text(finished: Path, tmp_path: Path) -> None:
    page, html = page_of(finished, tmp_path)
    assert "alert(" in html and "<script" not in html
    for name in HOSTILE:
        assert name in page.words
        assert any(str(picture["alt"]).startswith(name) for picture in page.named("img"))
    assert Page(table("<x>", [Cell("a")], [[Cell("b")]])).named("div")[0]["aria-label"] == "<x>"


def test_an_image_that_looks_like_another_class_is_marked_without_colour(finished: Path, tmp_path: Path) -> None:
    page, _ = page_of(finished, tmp_path)
    alts = [str(picture["alt"]) for picture in page.named("img") if "which the observer takes for" in str(picture)]
    assert alts == [
        f"{HOSTILE[0]}, kept image 1 of 2 shown, probability 20%, which the observer takes for {HOSTILE[1]}"
    ]
    assert page.words.count("≠") == 1


@pytest.mark.parametrize(
    "missing",
    [["config.yaml"], ["dataset.json"], ["metrics.jsonl"], ["distilled"], ["evaluation"], ["samples"],
     ["observer_metrics.jsonl"], ["observer"], ["reconstruction.json"], ["baselines"],
     ["evaluation/ipc2/provenance.json"], ["distilled", "evaluation", "metrics.jsonl", "dataset.json"]],
    ids=",".join,
)  # fmt: skip
def test_what_is_missing_is_left_out(finished: Path, tmp_path: Path, missing: list[str]) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for name in missing:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page, html = page_of(run, tmp_path)
    assert not re.search(r"\b(None|nan|null)\b", page.words)
    headings = [attributes["id"] for attributes in page.named("section")]
    assert [f"#{name}" for name in headings] == [attributes["href"] for attributes in page.named("a")]
    assert ("results" in headings) == ("evaluation" not in missing)
    assert ("generator" in headings) == ("metrics.jsonl" not in missing)
    assert "http" not in html


def test_a_damaged_distilled_dataset_is_said_not_shown(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "distilled" / "ipc2" / "class_names.json").write_text("[]")
    page, _ = page_of(run, tmp_path)
    assert "The images are not shown" in page.words and "sha256 differs" in page.words
    assert "44.2" in page.words


def test_of_many_classes_some_are_shown(tmp_path: Path) -> None:
    dataset(tuple(f"name-{label:03d}" for label in range(24)), ipc=11).save(tmp_path / "run" / "distilled" / "ipc11")
    page, html = page_of(tmp_path / "run", tmp_path)
    assert "12 of 24 classes, evenly chosen" in page.words
    shown = {str(picture["alt"])[:8] for picture in page.named("img")}
    assert len(shown) == 12 and {"name-000", "name-023"} <= shown
    assert len(page.named("img")) == 120
    assert len(html) < 300_000


def test_sets_are_compared_and_smaller_ones_come_first(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    write_json(run / "evaluation" / "ipc10" / "results.json", results([row("distilled", scores=[0.7712])], ipc=10))
    page, _ = page_of(run, tmp_path)
    lines = [line for line in page.rows if line[0] in ("set", "ipc2", "ipc10")]
    assert [line[:2] for line in lines[:3]] == [["set", "per class"], ["ipc2", "2"], ["ipc10", "10"]]
    assert lines[2][2].startswith("77.1")


def test_the_curve_falls_where_the_distance_falls() -> None:
    page = Page(curve("fd_convnet3_60", {"ema_0.05": [(0.0, 150.0), (100.0, 75.0)]}, "Lowest: 75."))
    points = [tuple(map(float, point.split(","))) for point in str(page.named("polyline")[0]["points"]).split()]
    (left, top), (right, middle) = points
    axis = [float(str(line["y1"])) for line in page.named("line")]  # 0, 50, 100, 150
    assert len(axis) == 4 and (left, right) == (52.0, 408.0)
    assert top == min(axis) and middle == pytest.approx((min(axis) + max(axis)) / 2)
    assert "from 150 at step 0 to 75 at step 100" in str(page.named("svg")[0]["aria-label"])


def test_a_curve_over_several_magnitudes_is_logarithmic() -> None:
    page = Page(curve("fd_x_60", {"a": [(0.0, 1000.0), (5.0, 100.0), (10.0, 10.0)]}, ""))
    points = str(page.named("polyline")[0]["points"]).split()
    high, middle, low = (float(point.split(",")[1]) for point in points)
    assert middle == pytest.approx((high + low) / 2, abs=0.1)


def test_stages_are_timed_as_far_as_they_were(finished: Path) -> None:
    rows = {stage: time for stage, time, _ in time_rows(read_run(finished))}
    assert rows == {
        "observer": "4.0 s",  # 1.5 + 2.5; the line being written is not read
        "diffusion model": "6.0 s",  # 20 x 16 images at 160 a second, and as many at 80
        "ipc2: sampling": "61 s",
        "ipc2: ranking": "4.2 s",
        "ipc2: students": "2 min",  # 8 rows of 12.5 s
    }


def test_the_nearest_real_image_of_the_class_is_found(tmp_path: Path) -> None:
    train, kept = images(40, 1), dataset(("a", "b"))
    planted = train.pixels.clone()
    of_class = (train.labels == 1).nonzero().flatten()
    planted[of_class[7]] = kept.pixels[2]  # the first kept image of class b is a copy
    train = type(train)(planted, train.labels, train.class_names, "noise", "train", "x")
    save_neighbours(kept, train, observer(), tmp_path / NEIGHBOURS_NAME, device=CPU)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / NEIGHBOURS_NAME)
    assert stored["labels"].tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(stored["real"][2], kept.pixels[2], rtol=0, atol=0)
    assert stored["cosine"][2].item() == pytest.approx(1, abs=1e-5) and stored["cosine"][0] < 0.9999

    run = tmp_path / "run"
    kept.save(run / "distilled" / "ipc2")
    write_json(run / "evaluation" / "ipc2" / "results.json", results([row("distilled")]))
    shutil.copy(tmp_path / NEIGHBOURS_NAME, run / "evaluation" / "ipc2")
    page, _ = page_of(run, tmp_path)
    assert "Nearest real images" in page.words and "real, 1.00" in page.words


def test_an_evaluation_outside_a_run_has_a_page_of_its_own(finished: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "out" / "results.json", results([row("distilled", scores=[0.6543])]))
    assert write_page_of(None, tmp_path / "out") == tmp_path / "out" / "report.html"
    assert "65.4" in Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).words
    run = shutil.copytree(finished, tmp_path / "run")
    assert write_page_of(run, run / "evaluation" / "ipc2") == run / "report.html"


def test_the_command_says_where_the_page_is(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    assert cli.main(["report", "--run_dir", str(run)]) == 0
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    assert (run / "report.html").is_file()
    assert cli.main(["report", "--run_dir", str(tmp_path)]) == 2
    assert "nothing of a run in it" in capsys.readouterr().err
    (run / "dataset.json").write_text("{")
    assert cli.main(["report", "--run_dir", str(run)]) == 2
    assert "dataset.json is damaged" in capsys.readouterr().err


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_text_stands_out_from_the_page(theme: int) -> None:
    block = re.findall(r":root \{(.*?)\}", STYLE, flags=re.DOTALL)[theme]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6})", block))
    colours = {name: value if len(value) == 7 else "#" + "".join(c * 2 for c in value[1:]) for name, value in colours.items()}  # fmt: skip  # noqa: E501
    paper = luminance(colours["paper"])
    for name in ("ink", "soft", "accent", "wrong"):
        dark, light = sorted((paper, luminance(colours[name])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{name} on paper"
