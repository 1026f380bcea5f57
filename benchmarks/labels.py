"""What labels cost and what they are worth: accuracy of students against the bytes of the labels, for one run's images.

    python benchmarks/labels.py --run_dir runs/cifar10 --ipc 10

Students differ by their labels alone; images, recipe (rded) and seeds are the same: class numbers; stored views, all
epochs or every m-th, all logits or the k largest; and the observer itself, which labels online and costs its weights.
Views are labelled once, and shrunk for the other rows.

Into --output_dir (default <run_dir>/labels/<dataset>) go results.jsonl, one line a kind of label; labels.md, the table;
and labels.png. The same command goes on where it was stopped, and with more kinds adds them.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ddgen.checkpoint import write_bytes
from ddgen.commands.evaluate import default_student, which_dataset
from ddgen.commands.runs import data_of_run, load_on_all, observer_dir, start_accelerator
from ddgen.commands.teachers import load_teachers
from ddgen.config import DataConfig
from ddgen.data import ImageDataset
from ddgen.distill.dataset import DistilledDataset
from ddgen.distill.view_labels import make_views
from ddgen.distill.views import StoredViews
from ddgen.errors import UserError
from ddgen.evaluation.batches import Look, TrainingImages, view_augmenter
from ddgen.evaluation.cells import digest
from ddgen.evaluation.protocols import RDED, STORED, Protocol
from ddgen.evaluation.students import IMAGENET_LOOK, Job, train_student
from ddgen.observer.observer import Observer
from ddgen.seeds import derive
from ddgen.units import readable_bytes


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    run_dir: str | None = None
    """A run with a distilled dataset. Default: the newest under runs/."""
    ipc: int | None = None
    """Which of its distilled datasets. Default: the newest."""
    distilled_dir: str | None = None
    """A distilled dataset anywhere."""
    observer: str | None = None
    """Default: the run's."""
    teacher_epoch: int | Literal["auto"] | None = None
    """As sample.py's."""
    student: str | None = None
    """Network. Default: the observer's, if ddgen builds such students."""
    epochs: int | None = None
    """Of students and of the views labelled. Default: the protocol's, 300."""
    repeats: int = 3
    """Students per kind of label."""
    keep_every: tuple[int, ...] = (1, 3, 10, 30, 100)
    """Store every m-th epoch of views, all logits."""
    top_k: tuple[int, ...] = (1, 3)
    """Store the k largest logits, of every m-th epoch too."""
    output_dir: str | None = None
    """Where results go."""
    seed: int = 0
    """Seed of views and students."""


@dataclass(frozen=True)
class Labels:
    """One kind of label.

    Attributes:
        name: Of its row.
        family: What its points on the plot are joined by.
        num_bytes: What the labels take.
        protocol: The recipe that uses them.
        stored: Makes the views, where these are the labels.
    """

    name: str
    family: str
    num_bytes: int
    protocol: Protocol
    stored: Callable[[], StoredViews] | None = None


@dataclass(frozen=True)
class Point:
    """What students of one kind of label reached.

    Attributes:
        name: See `Labels`.
        family: See `Labels`.
        num_bytes: See `Labels`.
        scores: Top-1 fraction of each student after its last epoch.
    """

    name: str
    family: str
    num_bytes: int
    scores: tuple[float, ...]


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and draws."""
    settings = tyro.cli(Settings, args=argv)
    try:
        return measure(settings)
    except UserError as error:
        print(f"labels: {error}", file=sys.stderr)
        return 2


def measure(settings: Settings) -> int:
    """Loads the run, measures what is not in results.jsonl yet, and writes the table and the plot."""
    run_dir, distilled_dir = which_dataset(settings.run_dir, settings.ipc, settings.distilled_dir)
    if run_dir is None and None in (settings.output_dir, settings.observer):
        raise UserError("--output_dir, --observer: a dataset outside any run needs both")
    accelerator, precision = start_accelerator(None)
    distilled = DistilledDataset.load(distilled_dir)
    data = data_of_run(DataConfig(), run_dir)
    test = load_on_all(accelerator, data, "test")
    (observer,) = load_teachers(
        [settings.observer or observer_dir(run_dir or Path())], distilled.class_names, settings.teacher_epoch,
        ipc=distilled.ipc, data=data, accelerator=accelerator, precision=precision,
    )  # fmt: skip
    student = settings.student or default_student([observer])
    epochs = settings.epochs or STORED.epochs(distilled.ipc, dataset=test.name, network=student)
    look = replace(IMAGENET_LOOK, flip=data.may_flip)
    output_dir = Path(settings.output_dir or (run_dir or Path()) / "labels" / distilled_dir.name)
    views = make_views(
        distilled.pixels, view_augmenter(STORED, look, distilled.factor), [observer],
        augmentation=STORED.augmentation(distilled.factor, data.may_flip), epochs=range(epochs),
        batch_size=STORED.batch_size(distilled.ipc, test.num_classes, dataset=test.name, network=student),
        temperature=STORED.temperature, seed=settings.seed, device=accelerator.device, precision=precision,
    )  # fmt: skip
    # Of what the views are made, not of their logits, whose last bits depend on the number of threads.
    made_of = digest(json.dumps(asdict(views.header), sort_keys=True).encode())
    identity = {"views": made_of, "student": student, "epochs": epochs, "repeats": settings.repeats}
    points = []
    for point in accuracy_against_bytes(
        kinds_of_labels(views, observer, settings.keep_every, settings.top_k), distilled, test, observer,
        student=student, epochs=epochs, repeats=settings.repeats, seed=settings.seed, look=look,
        device=accelerator.device, precision=precision, done=_Done(output_dir / "results.jsonl", identity),
    ):  # fmt: skip
        points.append(point)
        print(_line(point, distilled.image_bytes))
    title = f"{test.name}, ipc {distilled.ipc}, {student}, {epochs} epochs, {settings.repeats} students each"
    write_bytes(output_dir / "labels.md", _table(points, distilled.image_bytes, title).encode())
    write_bytes(output_dir / "labels.png", _plot(points, distilled.image_bytes, title))
    print(f"table and plot: {output_dir}")
    return 0


def kinds_of_labels(
    views: StoredViews, observer: Observer, keep_every: Sequence[int], top_k: Sequence[int]
) -> list[Labels]:
    """Returns the kinds of labels, whose students differ by nothing else."""
    class_numbers = replace(RDED, name="class numbers", labels="hard")
    weights = sum(value.nbytes for value in observer.state_dict().values())
    kinds = [Labels("class numbers", "class numbers", views.header.num_images, class_numbers)]
    for k in (None, *(k for k in top_k if k < views.header.num_classes)):
        for every in keep_every:
            if every > len(views.header.epochs):
                continue

            def make(every: int = every, k: int | None = k) -> StoredViews:
                kept = views.keep_every(every)
                return kept if k is None else kept.keep_top(k)

            family = "stored views, all logits" if k is None else f"stored views, top {k}"
            count = -(-len(views.header.epochs) // every)
            name = f"{family}, {count} {'epoch' if count == 1 else 'epochs'}"
            kinds.append(Labels(name, family, make().num_bytes, STORED, make))
    return [*kinds, Labels("observer, online", "observer, online", weights, RDED)]


def accuracy_against_bytes(
    kinds: Sequence[Labels],
    distilled: DistilledDataset,
    test: ImageDataset,
    observer: Observer,
    *,
    student: str,
    epochs: int,
    repeats: int,
    seed: int,
    look: Look,
    device: torch.device,
    precision: str,
    done: _Done,
) -> Iterator[Point]:
    """Yields what the students of every kind of label reach on the real test images; what is done is not done again."""
    for labels in kinds:
        if labels.name not in done.points:
            views = labels.stored() if labels.stored is not None else None
            job = Job(
                network=student, protocol=labels.protocol,
                images=TrainingImages(distilled.pixels, distilled.labels, factor=distilled.factor, views=views),
                num_classes=test.num_classes, ipc=distilled.ipc, test=test, teachers=(observer,), device=device,
                precision=precision, seed=seed, epochs=epochs, look=look, scorings=1,
            )  # fmt: skip
            jobs = (replace(job, seed=derive(seed, "repeat", repeat)) for repeat in range(repeats))
            scores = [train_student(each).accuracy_last for each in jobs]
            done.add(Point(labels.name, labels.family, labels.num_bytes, tuple(scores)))
        yield done.points[labels.name]


class _Done:
    """What results.jsonl holds of the same measurement.

    Args:
        path: The file.
        identity: What must be the same, as JSON.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.points: dict[str, Point] = {}
        for line in path.read_text().splitlines() if path.is_file() else []:
            values = json.loads(line)
            if values.pop("identity") == identity:
                self.points[values["name"]] = Point(**{**values, "scores": tuple(values["scores"])})

    def add(self, point: Point) -> None:
        """Writes a line."""
        self.points[point.name] = point
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"identity": self.identity, **asdict(point)}) + "\n")


def _line(point: Point, image_bytes: int) -> str:
    spread = f" ± {100 * statistics.stdev(point.scores):.1f}" if len(point.scores) > 1 else ""
    accuracy = f"{100 * statistics.fmean(point.scores):.1f}{spread}"
    return f"| {point.name} | {readable_bytes(point.num_bytes)} | {point.num_bytes / image_bytes:.2g} | {accuracy} |"


def _table(points: list[Point], image_bytes: int, title: str) -> str:
    head = [f"{title}; images {readable_bytes(image_bytes)}", "", "| labels | bytes | of the images' | accuracy |"]
    return "\n".join([*head, "|---|--:|--:|--:|", *(_line(point, image_bytes) for point in points)]) + "\n"


def _plot(points: list[Point], image_bytes: int, title: str) -> bytes:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for family in dict.fromkeys(point.family for point in points):
        mine = sorted((p for p in points if p.family == family), key=lambda point: point.num_bytes)
        means = [100 * statistics.fmean(point.scores) for point in mine]
        spreads = [100 * statistics.stdev(p.scores) if len(p.scores) > 1 else 0.0 for p in mine]
        axes.errorbar([p.num_bytes for p in mine], means, spreads, marker="o", capsize=3, label=family)
    axes.axvline(image_bytes, color="#a3a7ae", linestyle="--", label="bytes of the images")
    axes.set(xscale="log", xlabel="bytes of the labels", ylabel="accuracy on real test images, %", title=title)
    axes.title.set_fontsize(9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
