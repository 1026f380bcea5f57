"""What to keep and how to label it: students of every selection rule and kind of label, real and generated pools.

    python benchmarks/study.py --run_dir runs/cifar10
    accelerate launch --cpu --num_processes 2 benchmarks/study.py --run_dir runs/cifar10   # the same, shared by two

Every repeat has pools of its own, so the spread is of candidates and students together. Three studies:

- selection: every rule on every pool at every ipc, labels online by the observer (protocol `rded`);
- labels: every kind of label for what --label_rule keeps;
- guidance: every one of --guidance_scales, of generated pools, for what `random` keeps.

Pools: `crops` are RDED's, the best of five crops of each of 300 real images a class; `whole` are 300 whole real images,
and `reconstructed` the same ones as the autoencoder gives them back; `generated` are 300 candidates of the run's
generator with classifier-free guidance, `unguided` without, `autoguided` with --guide, and `steered` with --modes. Into
--output_dir go results-*.jsonl, and a table and a plot of every study, of the pools, rules, labels and ipcs asked for.
The same command goes on where it was stopped; more repeats join those that there are.
"""

from __future__ import annotations

import io
import itertools
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from accelerate import Accelerator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from ddgen.autoencoder.training import reconstruct
from ddgen.checkpoint import remove_dir, write_bytes
from ddgen.commands.generators import candidate_source
from ddgen.commands.runs import find_run, load_on_all, observer_dir, read_run_config, start_accelerator
from ddgen.config import SampleConfig, Selection
from ddgen.data import ImageDataset
from ddgen.diffusion.generator import Generator, load_generator
from ddgen.distill.rded import plan_crops, rank_class
from ddgen.distill.select import Candidates, select, select_random
from ddgen.distill.selection_report import report_class
from ddgen.errors import UserError
from ddgen.evaluation.batches import TrainingImages
from ddgen.evaluation.cells import bytes_of, digest
from ddgen.evaluation.protocols import RDED
from ddgen.evaluation.students import IMAGENET_LOOK, Job, train_student
from ddgen.evaluation.teacher_epoch import student_network
from ddgen.launch import close_connection, start_asked_for_processes
from ddgen.observer.epochs import epoch_dir, list_epochs
from ddgen.observer.observer import Observer
from ddgen.observer.realism import RealismScores, real_class_scores, realism_scores
from ddgen.seeds import derive
from ddgen.together import claim

Pool = Literal["crops", "whole", "reconstructed", "generated", "unguided", "autoguided", "steered"]
RULES: tuple[Selection, ...] = get_args(Selection)
WHOLE: tuple[Pool, ...] = ("whole", "reconstructed")
GENERATED: tuple[Pool, ...] = ("generated", "unguided", "autoguided", "steered")
COLOURS: dict[Pool, str] = {  # real images round and grey to brown, generated ones square
    "crops": "#4d4d4d", "whole": "#a6761d", "reconstructed": "#e6ab02", "generated": "#1b9e77", "unguided": "#66a61e",
    "autoguided": "#d95f02", "steered": "#7570b3",
}  # fmt: skip
ONLINE = "online"
ONE_SOFT_LABEL = "one soft label"
CLASS_NUMBER = "class number"
KINDS = (ONLINE, ONE_SOFT_LABEL, CLASS_NUMBER)
SAMPLED_TOGETHER = 100
FIGURES = ("loss", "class_named", "distance", "coverage")


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    run_dir: str | None = None
    """A finished training run. Default: the newest under runs/."""
    observer: str | None = None
    """Folder of an observer. Default: the run's."""
    output_dir: str | None = None
    """Where results go. Default: <run_dir>/study."""
    studies: tuple[Literal["selection", "labels", "guidance"], ...] = ("selection", "labels")
    """Which studies."""
    pools: tuple[Pool, ...] = ("crops", "whole", "generated")
    """Which pools."""
    rules: tuple[Selection, ...] = RULES
    """Which rules; of `whole` and `reconstructed` only random and realism are judged."""
    label_rule: Selection = "realism"
    """What keeps the images of the study of labels."""
    labels: tuple[str, ...] = ()
    """Kinds of label, for instance online "one soft label, epoch 3" "class number". Default: all that there are."""
    ipcs: tuple[int, ...] = (1, 10, 50)
    """Images per class."""
    epochs: tuple[int, ...] = ()
    """Epochs of the students, one number for each of --ipcs. Default: the protocol's."""
    repeats: int = 3
    """Pools and students of every row."""
    pool_size: int = 300
    """Candidates of each class."""
    guide: str = "auto"
    """What guides the pool `autoguided`, as sample.py takes it."""
    modes: int = 10
    """Modes of `steered`."""
    guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
    """Of the study of guidance; the others take the run's."""
    seed: int = 0
    """Seed of pools and students."""


@dataclass(frozen=True)
class Row:
    """One student to train.

    Attributes:
        pool: Where its images are from.
        rule: What kept them.
        labels: Kind of label.
        ipc: Images per class.
        repeat: Which of the pools and students.
        guidance: Guidance scale of its pool; None is the run's.
    """

    pool: Pool
    rule: Selection
    labels: str
    ipc: int
    repeat: int
    guidance: float | None = None


Done = dict[Row, dict[str, Any]]


class Study:
    """The run, its data, and everything that rows share.

    Args:
        settings: What to measure.
        accelerator: Device and processes.
        precision: See `ddgen.precision`.
    """

    def __init__(self, settings: Settings, accelerator: Accelerator, precision: str) -> None:
        if settings.epochs and len(settings.epochs) != len(settings.ipcs):
            raise UserError(
                f"--epochs: {len(settings.epochs)} numbers for {len(settings.ipcs)} --ipcs; give one for each"
            )
        if settings.pool_size < max(settings.ipcs):
            raise UserError(f"--pool_size {settings.pool_size}: --ipcs ask for {max(settings.ipcs)} of a class")
        self.settings, self.accelerator, self.precision = settings, accelerator, precision
        self.run_dir, _ = find_run(settings.run_dir)
        config = read_run_config(self.run_dir)
        self.train = load_on_all(accelerator, config.data, "train")
        self.test = load_on_all(accelerator, config.data, "test")
        self.flip = config.data.may_flip
        self.observer_dir = Path(settings.observer or observer_dir(self.run_dir))
        self.root = Path(settings.output_dir or self.run_dir / "study")
        self.observer = self.load_observer(None)
        self.student = student_network(self.train.image_size)
        self.scored = lru_cache(maxsize=4)(self._score)

    def load_observer(self, epoch: int | None) -> Observer:
        """Returns the observer as it is, or as it was after an epoch."""
        folder = self.observer_dir if epoch is None else epoch_dir(self.observer_dir, epoch)
        return Observer.load(folder, self.train.class_names).to(self.accelerator.device)

    def epochs(self, ipc: int) -> int:
        """Returns how long students train."""
        if self.settings.epochs and ipc in self.settings.ipcs:
            return self.settings.epochs[self.settings.ipcs.index(ipc)]
        return RDED.epochs(ipc, dataset=self.test.name, network=self.student)

    def identity(self) -> dict[str, Any]:
        """Returns what results must share to stand in one table, as JSON."""
        asked = {name: getattr(self.settings, name) for name in ("pool_size", "guide", "modes", "seed")}
        return {
            **asked,
            "observer": self.observer.fingerprint,
            "train": self.train.fingerprint,
            "student": self.student,
        }

    def rows(self) -> list[Row]:
        """Returns all students to train: every first repeat before the second, what is quick before what is slow."""
        settings, rows = self.settings, []
        for repeat, ipc, pool in itertools.product(range(settings.repeats), settings.ipcs, settings.pools):
            rules = [rule for rule in settings.rules if pool not in WHOLE or rule in ("random", "realism")]
            if "selection" in settings.studies:
                rows += [Row(pool, rule, ONLINE, ipc, repeat) for rule in rules]
            if "labels" in settings.studies and pool not in WHOLE:
                rows += [Row(pool, settings.label_rule, labels, ipc, repeat) for labels in self.kinds_of_labels()]
            if "guidance" in settings.studies and pool in GENERATED:
                rows += [Row(pool, "random", ONLINE, ipc, repeat, scale) for scale in settings.guidance_scales]
        return list(dict.fromkeys(rows))

    def kinds_of_labels(self) -> list[str]:
        """Returns the kinds of label: online and one for good, by the observer and as it was; and none."""
        epochs = list_epochs(self.observer_dir)
        kinds = [f"{kind}, epoch {epoch}" for kind in (ONLINE, ONE_SOFT_LABEL) for epoch in epochs]
        kinds = sorted([*KINDS, *kinds], key=label_order)
        for kind in self.settings.labels:
            if kind not in kinds:
                raise UserError(f"--labels {kind!r}: this observer gives {', '.join(map(repr, kinds))}")
        return [kind for kind in kinds if kind in (self.settings.labels or kinds)]

    def measure(self, row: Row, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Selects, labels, trains and scores; where another rule kept the same, takes what its student reached."""
        pixels, classes = self.scored(row.pool, row.repeat, row.guidance)
        kept, figures = [], []
        for candidates, images in zip(classes, pixels, strict=True):
            chosen = select(row.rule, candidates, row.ipc)
            kept.append(images[chosen])
            report = report_class(candidates, chosen)
            figures.append([report.figure("kept", name) for name in FIGURES])
        images = TrainingImages(torch.cat(kept), torch.arange(len(classes)).repeat_interleave(row.ipc))
        facts = [str(self.epochs(row.ipc)), row.labels, str(row.repeat)]
        key = digest(*bytes_of(images.pixels), *(fact.encode() for fact in facts))
        found = known.get(key)
        if found is None:
            result = train_student(self._job(row, images))
            found = {"epochs": result.epochs, "accuracy": result.accuracy_last, "seconds": result.seconds}
        means = {  # of one image a class there is no distance
            name: statistics.fmean(values)
            for name, column in zip(FIGURES, zip(*figures, strict=True), strict=True)
            if (values := [value for value in column if value is not None])
        }
        return {"images": key, **{name: found[name] for name in ("epochs", "accuracy", "seconds")}, **means}

    def _job(self, row: Row, images: TrainingImages) -> Job:
        kind, _, epoch = row.labels.partition(", epoch ")
        teacher = self.load_observer(int(epoch)) if epoch else self.observer
        protocol = RDED
        if kind == ONE_SOFT_LABEL:
            found = realism_scores(
                teacher, images.pixels, images.labels, batch_size=256, device=self.accelerator.device,
                precision=self.precision,
            )  # fmt: skip
            images = replace(images, soft_labels=found.logits.softmax(1))
            protocol = replace(RDED, name=ONE_SOFT_LABEL, labels="stored")
        elif kind == CLASS_NUMBER:
            protocol = replace(RDED, name=CLASS_NUMBER, labels="hard")
        return Job(
            self.student, protocol, images, self.train.num_classes, row.ipc, self.test, [teacher],
            self.accelerator.device, self.precision, seed=derive(self.settings.seed, "repeat", row.repeat),
            epochs=self.epochs(row.ipc), look=replace(IMAGENET_LOOK, flip=self.flip), scorings=1,
        )  # fmt: skip

    def _score(self, pool: Pool, repeat: int, guidance: float | None) -> tuple[list[Tensor], list[Candidates]]:
        """Returns the images and the scored candidates of every class."""
        seed = derive(self.settings.seed, "pool", repeat)
        device, precision = self.accelerator.device, self.precision
        real = [
            real_class_scores(self.observer, self.train, label, seed, device=device, precision=precision)
            for label in range(self.train.num_classes)
        ]
        if pool == "crops":
            return self._crops(real, seed)
        if pool in WHOLE:
            pixels = _whole(self.train, self.settings.pool_size, seed)
            if pool == "reconstructed":
                pixels = self._reconstructed(pixels)
        else:
            paths = [self._path(pool, repeat, guidance, label) for label in range(self.train.num_classes)]
            pixels = [load_file(path)["pixels"] for path in paths]
        scores: list[RealismScores] = [
            realism_scores(
                self.observer, images, torch.full((len(images),), label), batch_size=250, device=device,
                precision=precision,
            )
            for label, images in enumerate(pixels)
        ]  # fmt: skip
        found = [Candidates(s, torch.arange(len(s)), label, seed, real[label]) for label, s in enumerate(scores)]
        return pixels, found

    def _crops(self, real: list[RealismScores], seed: int) -> tuple[list[Tensor], list[Candidates]]:
        pixels, found = [], []
        for label, members in enumerate(self.train.indices_by_class()):
            plan = plan_crops(
                len(members), class_name=self.train.class_names[label], label=label, ipc=max(self.settings.ipcs),
                factor=1, mipc=self.settings.pool_size, num_crop=5, seed=seed,
            )  # fmt: skip
            ranked = rank_class(
                self.observer, self.train, members, label, plan, factor=1, rule="realism", real=real[label], seed=seed,
                device=self.accelerator.device, precision=self.precision,
            )  # fmt: skip
            pixels.append(ranked.patches)
            found.append(ranked.candidates)
        return pixels, found

    def _reconstructed(self, pixels: list[Tensor]) -> list[Tensor]:
        autoencoder = load_generator(self.run_dir / "generator", self.accelerator.device, self.precision).autoencoder
        return [reconstruct(autoencoder, images) for images in pixels]

    def _path(self, pool: Pool, repeat: int, guidance: float | None, label: int) -> Path:
        return self.root / "pools" / pool_name(self.settings, pool, repeat, guidance) / f"{label:05d}.safetensors"

    def draw_pools(self) -> None:
        """Samples the generated pools that are not there yet, each process some classes."""
        pools = {(row.pool, row.repeat, row.guidance): None for row in self.rows() if row.pool in GENERATED}
        for pool, repeat, guidance in pools:
            classes = range(self.train.num_classes)
            missing = [label for label in classes if not self._path(pool, repeat, guidance, label).is_file()]
            self.accelerator.wait_for_everyone()
            if missing:
                self._draw(pool, repeat, guidance, missing)
        self.accelerator.wait_for_everyone()

    def _draw(self, pool: Pool, repeat: int, guidance: float | None, classes: list[int]) -> None:
        settings = self.settings
        config = SampleConfig(
            run_dir=str(self.run_dir), seed=derive(settings.seed, "pool", repeat), guide="none",
            guidance_scale=guidance, torch_compile=False,  # pools are small: compiling takes longer
        )  # fmt: skip
        if pool == "unguided":
            config = replace(config, guidance_scale=1.0)
        if pool == "autoguided" and guidance != 1:  # the guide does nothing at 1, and is refused there
            config = replace(config, guide=settings.guide)
        if pool == "steered":
            config = replace(config, modes=settings.modes)
        source = candidate_source(config, self.run_dir, self.accelerator, self.precision)
        if config.guide != "none" and (not isinstance(source, Generator) or source.guide is None):
            raise UserError(
                f"--guide {settings.guide}: {self.run_dir} has no guide, or samples with guidance scale 1; name another"
                " guide, or leave autoguided out of --pools"
            )
        mine = classes[self.accelerator.process_index :: self.accelerator.num_processes]
        for label in tqdm(mine, desc=f"{pool} {repeat}", unit="class"):
            parts = [
                source.sample(torch.full_like(indices, label), indices, config.seed)
                for indices in torch.arange(settings.pool_size).split(SAMPLED_TOGETHER)
            ]
            write_bytes(self._path(pool, repeat, guidance, label), save({"pixels": torch.cat(parts)}))


def pool_name(settings: Settings, pool: Pool, repeat: int, guidance: float | None = None) -> str:
    """Returns the name of a generated pool's folder, which tells all settings that its images depend on."""
    of = {"autoguided": f"-{digest(settings.guide.encode())[:8]}", "steered": f"{settings.modes}"}.get(pool, "")
    scale = "" if guidance is None else f"-scale{guidance:g}"
    return f"{pool}{of}{scale}-{settings.pool_size}-seed{settings.seed}-{repeat}"


def _whole(train: ImageDataset, count: int, seed: int) -> list[Tensor]:
    members = train.indices_by_class()
    fewest = min(map(len, members))
    if fewest < count:
        raise UserError(
            f"--pool_size {count}: a class has {fewest} real images; give no more, or leave out --pools whole"
        )
    return [train.pixels[m[select_random(len(m), count, seed, label)]] for label, m in enumerate(members)]


def main(argv: list[str] | None = None) -> int:
    """Measures what has not been yet, and writes tables and pictures."""
    settings = tyro.cli(Settings, args=argv, use_underscores=True)
    try:
        if argv is None:  # as a command
            start_asked_for_processes()
        accelerator, precision = start_accelerator(None)
        code = run(Study(settings, accelerator, precision))
        close_connection()
        return code
    except UserError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2


def run(study: Study) -> int:
    """Trains every student that has not been trained yet; processes share them."""
    accelerator, identity = study.accelerator, study.identity()
    study.root.mkdir(parents=True, exist_ok=True)
    study.draw_pools()
    done = read_results(study.root, identity, study.epochs)
    rows = [row for row in study.rows() if row not in done]
    claims = study.root / "claims"
    if accelerator.is_main_process:
        if claims.is_dir():
            remove_dir(claims)
        claims.mkdir()
    accelerator.wait_for_everyone()
    path = study.root / f"results-{accelerator.process_index}.jsonl"
    order = in_turn(rows, accelerator.process_index, accelerator.num_processes)
    for number in tqdm(order, desc="students", unit="student", dynamic_ncols=True):
        row = rows[number]
        if not claim(claims / str(number)):
            continue
        known = {found["images"]: found for found in read_results(study.root, identity, study.epochs).values()}
        line = {"identity": identity, **asdict(row), **study.measure(row, known)}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_report(study, read_results(study.root, identity, study.epochs))
    return 0


def in_turn(rows: list[Row], process: int, processes: int) -> list[int]:
    """Returns the numbers of the rows in the order in which a process looks at them.

    Each of several processes starts with other pools, so that few pools are scored by more than one.
    """
    if processes == 1:
        return list(range(len(rows)))
    pools = list(dict.fromkeys((row.pool, row.repeat, row.guidance) for row in rows))
    first = process * len(pools) // processes
    rank = {pool: (number - first) % len(pools) for number, pool in enumerate(pools)}
    of = [rank[row.pool, row.repeat, row.guidance] for row in rows]
    return sorted(range(len(rows)), key=of.__getitem__)


def read_results(root: Path, identity: dict[str, Any], epochs: Callable[[int], int]) -> Done:
    """Returns what is measured, of this identity, by students of as many epochs as `epochs` says of their ipc."""
    done: Done = {}
    for path in sorted(root.glob("results-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except ValueError:  # cut off where a process was killed: measured again
                continue
            if values.pop("identity") == json.loads(json.dumps(identity)):
                row = Row(**{field.name: values.pop(field.name) for field in fields(Row) if field.name in values})
                if values["epochs"] == epochs(row.ipc):
                    done[row] = values
    return done


def write_report(study: Study, done: Done) -> None:
    """Writes tables and pictures of what was asked for, of all its repeats that were measured, now or earlier."""
    asked = {replace(row, repeat=0) for row in study.rows()}
    done = {row: found for row, found in done.items() if replace(row, repeat=0) in asked}
    as_the_run = {row: found for row, found in done.items() if row.guidance is None}
    studies: dict[str, tuple[str, Done]] = {
        "selection": ("rule", {row: found for row, found in as_the_run.items() if row.labels == ONLINE}),
        "labels": ("labels", {r: f for r, f in as_the_run.items() if r.rule == study.settings.label_rule}),
        "guidance": ("guidance", {row: found for row, found in done.items() if row.guidance is not None}),
    }
    lengths = ", ".join(f"{study.epochs(ipc)} at ipc {ipc}" for ipc in study.settings.ipcs)
    for name, (field, found) in studies.items():
        if name in study.settings.studies and found:
            title = f"{study.train.name}, {study.student}, epochs {lengths}, {_repeats(found)}"
            text = f"{title}; percent of the real test images\n\n{table(found, field)}"
            if field == "rule":
                text += f"\n{figures_table(found, sorted(study.settings.ipcs)[len(study.settings.ipcs) // 2])}"
            write_bytes(study.root / f"{name}.md", text.encode())
            write_bytes(study.root / f"{name}.png", draw(found, field, title))
            print(text)


def _repeats(done: Done) -> str:
    counts = set(Counter(replace(row, repeat=0) for row in done).values())
    if counts == {1}:
        return "one pool and student each"
    return f"{' to '.join(map(str, sorted({min(counts), max(counts)})))} pools and students each"


def columns(done: Done) -> list[tuple[int, Pool]]:
    """Returns (ipc, pool) of everything there is, in order."""
    pools = get_args(Pool)
    return sorted({(row.ipc, row.pool) for row in done}, key=lambda c: (c[0], pools.index(c[1])))


def kinds(done: Done, field: str) -> list[Any]:
    """Returns the values of a field, in the order in which they are offered."""
    order: dict[str, Callable[[Any], Any]] = {"rule": RULES.index, "guidance": float, "labels": label_order}
    return sorted({getattr(row, field) for row in done}, key=order[field])


def label_order(labels: str) -> tuple[int, float]:
    """Returns what kinds of label are sorted by: the kind, then the observer's epochs (as it is, it has the most)."""
    kind, _, epoch = labels.partition(", epoch ")
    return KINDS.index(kind), float(epoch or "inf")


def accuracies(done: Done, field: str, value: Any, ipc: int, pool: str) -> list[float]:
    """Returns the percentages of all repeats of one cell."""
    return [
        100 * found["accuracy"]
        for row, found in done.items()
        if getattr(row, field) == value and (row.ipc, row.pool) == (ipc, pool)
    ]


def table(done: Done, field: str) -> str:
    """Returns mean ± standard deviation, the best mean of every column in bold."""
    heads = columns(done)
    cells = {kind: [accuracies(done, field, kind, *head) for head in heads] for kind in kinds(done, field)}
    best = [max(statistics.fmean(row[i]) for row in cells.values() if row[i]) for i in range(len(heads))]
    names = [field, *(f"{pool}, ipc {ipc}" for ipc, pool in heads)]
    lines = ["| " + " | ".join(names) + " |", "| --- |" + " --: |" * len(heads)]
    for kind, row in cells.items():
        texts = [_cell(found, best[i]) for i, found in enumerate(row)]
        lines.append("| " + " | ".join([str(kind), *texts]) + " |")
    return "\n".join(lines) + "\n"


def _cell(found: list[float], best: float) -> str:
    if not found:
        return ""
    mean = statistics.fmean(found)
    text = f"**{mean:.1f}**" if mean == best else f"{mean:.1f}"
    return f"{text} ± {statistics.stdev(found):.1f}" if len(found) > 1 else text


def figures_table(done: Done, ipc: int) -> str:
    """Returns what the rules did at one ipc, means over repeats.

    The mean realism loss, the part that the observer names rightly, the mean distance between two images' features, and
    the part of the real class that is near a kept image.
    """
    pools = [pool for at, pool in columns(done) if at == ipc]
    names = ["rule", *(f"{pool}: {figure}" for pool in pools for figure in FIGURES)]
    lines = ["| " + " | ".join(names) + " |", "| --- |" + " --: |" * (len(names) - 1)]
    for rule in kinds(done, "rule"):
        cells = []
        for pool, figure in itertools.product(pools, FIGURES):
            values = [
                found[figure]
                for row, found in done.items()
                if (row.rule, row.pool, row.ipc) == (rule, pool, ipc) and figure in found
            ]
            cells.append(f"{statistics.fmean(values):.2f}" if values else "")
        lines.append("| " + " | ".join([rule, *cells]) + " |")
    return "\n".join(lines) + "\n"


def draw(done: Done, field: str, title: str) -> bytes:
    """Draws a panel for every ipc: every student as a small point, means as large ones, a colour for each pool."""
    heads, names = columns(done), kinds(done, field)
    ipcs = list(dict.fromkeys(ipc for ipc, _ in heads))
    pools = [pool for pool in get_args(Pool) if any(pool == found for _, found in heads)]
    figure = Figure(figsize=(2.4 + 3.4 * len(ipcs), 1.9 + 0.42 * len(names)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(ipcs), sharey=True, squeeze=False)[0]
    lines: dict[str, Line2D] = {}
    for panel, ipc in zip(panels, ipcs, strict=True):
        for number, pool in enumerate(pools):
            colour, marker = COLOURS[pool], "s" if pool in GENERATED else "o"
            for y, name in enumerate(names):
                found = accuracies(done, field, name, ipc, pool)
                height = y + 0.7 * ((number + 0.5) / len(pools) - 0.5)
                if found:
                    panel.plot(found, [height] * len(found), ".", color=colour, alpha=0.5, markersize=4)
                    style = {"linestyle": "", "marker": marker, "color": colour, "markersize": 6}
                    (lines[pool],) = panel.plot([statistics.fmean(found)], [height], **style)
        for y in range(1, len(names)):
            panel.axhline(y - 0.5, color="#dddddd", linewidth=0.8)
        panel.set(title=f"{ipc} image{'s' if ipc > 1 else ''} per class", xlabel="accuracy, %")
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set(ylabel=field, ylim=(len(names) - 0.5, -0.5))
    shown = [pool for pool in pools if pool in lines]
    figure.legend([lines[pool] for pool in shown], shown, loc="outside lower center", ncols=len(shown), frameon=False)
    figure.suptitle(title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
