"""What an evaluation is asked for, and whether it can be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddgen.data import ImageDataset
from ddgen.data.classes import check_class_order
from ddgen.distill.dataset import DistilledDataset
from ddgen.distill.foreign_dataset import ForeignDataset
from ddgen.distill.views import StoredViews
from ddgen.errors import UserError
from ddgen.evaluation.baselines import BY_OBSERVER
from ddgen.evaluation.protocols import Protocol
from ddgen.evaluation.ranking import RankingPlan, check_plan
from ddgen.evaluation.students import check_views
from ddgen.observer.networks import build_network
from ddgen.observer.observer import Observer


@dataclass(frozen=True)
class Request:
    """What to judge, and how.

    Attributes:
        rounds: The dataset to judge; several where a generator ran several rounds: repeat r takes the r-th.
        train: Real training images.
        test: Real test images.
        observers: Teachers of soft recipes: one after another, or together where the recipe takes an ensemble.
        students: Names of networks; None takes each recipe's own, otherwise `default_student`.
        protocols: Names or YAML files of recipes.
        baselines: Names, as in `EvaluateConfig.baselines`.
        repeats: Students per row.
        epochs: Instead of the recipes' own.
        seed: Of students and random draws.
        device: Where students train.
        precision: "no", "bf16" or "fp16".
        output_dir: Receives results.json, accuracy.png and cells/.
        ranker: Chooses the real images of baselines, as sample.py's first observer chooses candidates; None takes the
            first of `observers`, which is another one where teachers were stopped early.
        random_generated: Generated images that nobody selected: pixels uint8 (n, 3, s, s), labels (n,).
        views: Stored views of each round, for recipes that train on those; they judge the distilled images only.
        with_full: Add students on all real images.
        ranking: Candidates to order by every set and by all real images, under the first protocol; None for none.
        default_student: Where neither `students` nor the recipe says.
        flip: Mirror training images, as the recipes do; false where a mirror image is another class.
        progress: Show a bar per row.
    """

    rounds: Sequence[DistilledDataset | ForeignDataset]
    train: ImageDataset
    test: ImageDataset
    observers: Sequence[Observer]
    students: Sequence[str] | None
    protocols: Sequence[str]
    baselines: Sequence[str]
    repeats: int
    epochs: int | None
    seed: int
    device: torch.device
    precision: str
    output_dir: Path
    ranker: Observer | None = None
    random_generated: tuple[Tensor, Tensor] | None = None
    views: Sequence[StoredViews] = ()
    with_full: bool = False
    ranking: RankingPlan | None = None
    default_student: str = "convnet3"
    flip: bool = True
    progress: bool = True

    @property
    def class_names(self) -> tuple[str, ...]:
        """Classes of the dataset to judge, in label order."""
        return self.rounds[0].class_names


def students_by_recipe(request: Request, recipes: Sequence[Protocol]) -> list[tuple[str, Protocol]]:
    """Returns which students train by which recipes."""
    if request.students is None:
        return [(recipe.student or request.default_student, recipe) for recipe in recipes]
    return [(student, recipe) for student in request.students for recipe in recipes]


def check_request(request: Request, recipes: Sequence[Protocol], pairs: Sequence[tuple[str, Protocol]]) -> None:
    """Refuses what cannot be evaluated, before any training.

    Args:
        request: What to judge, and how.
        recipes: Its protocols.
        pairs: Which students train by which of them: `students_by_recipe`.

    Raises:
        UserError: Artefacts whose classes or sizes do not match, settings that cannot be honoured.
    """
    names = request.class_names
    found = [(dataset.class_names, "a further round") for dataset in request.rounds[1:]]
    found += [(observer.class_names, "the observer") for observer in request.observers]
    for images, title in ((request.train, "training images"), (request.test, "test images")):
        found.append((images.class_names, f"the {title} of {images.name}"))
    for class_names, title in found:
        check_class_order(names, class_names, expected_name="the distilled dataset", found_name=title)
    if not recipes:
        raise UserError("--protocols: empty; name rded, hard or both")
    if not pairs:
        raise UserError("--students: empty; name a network, for instance convnet3")
    for name in ("repeats", "epochs"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    _check_teachers(request, recipes)
    _check_sizes(request)
    for student, recipe in pairs:
        build_network(student, len(names), request.test.image_size, norm=recipe.norm, setting="--students")
    if request.ranking is not None:
        check_plan(request.ranking, recipes[0], len(names), request.test.image_size)
    for dataset in request.rounds:
        _check_counts(dataset, recipes)
    _check_stored(request, recipes)


def _check_teachers(request: Request, recipes: Sequence[Protocol]) -> None:
    if request.observers:
        return
    for recipe in recipes:
        if recipe.labels == "soft":
            raise UserError(f"--protocols {recipe.name}: soft labels need a teacher; give --observer")
        with_real = request.baselines or request.with_full or (request.ranking and recipe is recipes[0])
        if recipe.labels == "stored" and with_real:
            raise UserError(f"--protocols {recipe.name}: the baselines have no soft labels stored; give --observer")
    for name in request.baselines:
        if name in BY_OBSERVER:
            raise UserError(f"--baselines {name}: an observer chooses its images; give --observer")


def _check_sizes(request: Request) -> None:
    distilled = request.rounds[0]
    size = distilled.pixels.shape[-1]
    for images in (request.train, request.test):
        if images.image_size != size:
            raise UserError(
                f"--image_size {images.image_size}: the distilled images have {size} px, the {images.split} images of "
                f"{images.name} {images.image_size}; set --image_size {size}"
            )
    for dataset in request.rounds[1:]:
        if dataset.pixels.shape[-1] != size:
            raise UserError(f"--rounds: images of {dataset.pixels.shape[-1]} px and of {size} px; give one size")
    generated = request.random_generated
    if generated is not None and generated[0].shape != distilled.pixels.shape:
        raise UserError(
            f"random generated images {tuple(generated[0].shape)} and distilled images "
            f"{tuple(distilled.pixels.shape)} differ in number or size; sample both with the same settings"
        )


def _check_counts(dataset: DistilledDataset | ForeignDataset, recipes: Sequence[Protocol]) -> None:
    counts = torch.bincount(dataset.labels, minlength=len(dataset.class_names))
    if int(counts.min()) != int(counts.max()) and not all(recipe.any_number for recipe in recipes):
        strict = next(recipe.name for recipe in recipes if not recipe.any_number)
        raise UserError(
            f"--protocols {strict}: the distilled dataset has {int(counts.min())} to {int(counts.max())} images per "
            f"class; it asks for equally many, eccv2024-track2 does not"
        )


def _check_stored(request: Request, recipes: Sequence[Protocol]) -> None:
    """Refuses to judge datasets by labels that they have not, instead of making some for them."""
    for recipe in recipes:
        for number, dataset in enumerate(request.rounds):
            if recipe.labels == "stored" and dataset.soft_labels is None:
                raise UserError(f"--protocols {recipe.name}: the dataset has no soft labels; take rded or hard")
            if recipe.labels == "views":
                views = request.views[number] if request.views else None
                check_views(views, recipe, dataset.factor, request.flip)
