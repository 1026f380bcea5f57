"""``label``: a distilled dataset in, stored labels of its augmented views beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ddgen.commands.evaluate import default_student, which_dataset
from ddgen.commands.runs import data_of_run, dataset_name, observer_dir, start_accelerator
from ddgen.commands.teachers import check_teachers, load_teachers
from ddgen.config import LabelConfig
from ddgen.distill.dataset import DistilledDataset, update_views
from ddgen.distill.relabel import describe_teachers
from ddgen.distill.view_labels import bytes_needed, make_views
from ddgen.distill.views import VIEWS_PATH, StoredViews
from ddgen.errors import UserError
from ddgen.evaluation.batches import view_augmenter
from ddgen.evaluation.protocols import STORED
from ddgen.evaluation.students import IMAGENET_LOOK
from ddgen.observer.observer import Observer
from ddgen.units import readable_bytes


def label(config: LabelConfig) -> int:
    """Stores what observers say of augmented views, or shrinks what is stored."""
    run_dir, distilled_dir = which_dataset(config.run_dir, config.ipc, config.distilled_dir)
    stored = (distilled_dir / VIEWS_PATH).exists()
    if stored and not (config.overwrite or config.shrink or config.dry_run):
        raise UserError(
            f"--distilled_dir {distilled_dir}: has stored views; --overwrite replaces, --shrink shrinks them"
        )
    distilled = DistilledDataset.load(distilled_dir)
    if config.shrink:
        views = _shrunk(config, StoredViews.load(distilled_dir))
    else:
        accelerator, precision = start_accelerator(config.mixed_precision)
        if accelerator.num_processes > 1:
            raise UserError(f"ddgen label runs in one process, not {accelerator.num_processes}")
        made = _made(config, run_dir, distilled, accelerator, precision)
        if made is None:
            return 0
        views = made
    if config.dry_run:
        print(f"dry run: {readable_bytes(views.num_bytes)} of views -> {distilled_dir / VIEWS_PATH}")
        return 0
    update_views(distilled_dir, VIEWS_PATH, None)  # killed in the next line, the dataset is whole without them
    views.save(distilled_dir)
    update_views(distilled_dir, VIEWS_PATH, _facts(views, distilled))
    sizes = f"{readable_bytes(views.num_bytes)} beside {readable_bytes(distilled.image_bytes)} of images"
    print(f"stored views: {distilled_dir / VIEWS_PATH} ({sizes})")
    print("next:         python evaluate.py --protocols stored rded")
    return 0


def _shrunk(config: LabelConfig, views: StoredViews) -> StoredViews:
    if config.keep_every == 1 and config.top_k is None:
        raise UserError("--shrink: nothing to do; give --keep_every, --top_k or both")
    views = views.keep_every(config.keep_every)
    return views if config.top_k is None else views.keep_top(config.top_k)


def _made(
    config: LabelConfig, run_dir: Path | None, distilled: DistilledDataset, accelerator: Accelerator, precision: str
) -> StoredViews | None:
    """Draws and labels views; None where that is only to be said."""
    data = data_of_run(config.data, run_dir)
    if run_dir is None and data.random_flip is None:
        dataset_name(data)  # says whether views may be mirrored
    num_classes = len(distilled.class_names)
    if config.top_k is not None and config.top_k >= num_classes:
        raise UserError(f"--top_k {config.top_k}: there are {num_classes} classes; give fewer, or leave it out")
    sources = config.observer or ((observer_dir(run_dir),) if run_dir is not None else ())
    if not sources:
        raise UserError("--observer: not set; name the observer that labels a dataset outside any run")
    if config.dry_run:
        teachers = [Observer.load(source, distilled.class_names) for source in sources]
    else:
        teachers = load_teachers(
            sources, distilled.class_names, config.teacher_epoch,
            ipc=distilled.ipc, data=data, accelerator=accelerator, precision=precision,
        )  # fmt: skip
        check_teachers(teachers, data, accelerator, precision)
    case = {"dataset": str(distilled.provenance.get("dataset")), "network": default_student(teachers)}
    epochs = range(0, config.views or STORED.epochs(distilled.ipc, **case), config.keep_every)
    needed = bytes_needed(len(distilled), num_classes, len(epochs), config.top_k)
    print(
        f"{len(epochs)} epochs of {len(distilled):,} views, {readable_bytes(needed)}, by {describe_teachers(teachers)}"
    )
    if config.dry_run:
        return None
    return make_views(
        distilled.pixels,
        view_augmenter(STORED, replace(IMAGENET_LOOK, flip=data.may_flip), distilled.factor),
        teachers,
        augmentation=STORED.augmentation(distilled.factor, data.may_flip),
        epochs=epochs,
        batch_size=STORED.batch_size(distilled.ipc, num_classes, **case),
        temperature=config.soft_label_temperature or STORED.temperature,
        seed=config.seed,
        device=accelerator.device,
        precision=precision,
        top_k=config.top_k,
        label_batch_size=config.label_batch_size,
    )


def _facts(views: StoredViews, distilled: DistilledDataset) -> dict[str, Any]:
    """What the manifest and the card say of the views."""
    header = views.header
    return {
        "observers": list(header.observers),
        "epochs": len(header.epochs),
        "views": len(header.epochs) * header.num_images,
        "logits stored of a view": header.top_k or header.num_classes,
        "temperature": header.temperature,
        "augmentation": header.augmentation,
        "batch size": header.batch_size,
        "seed": header.seed,
        "bytes": views.num_bytes,
        "bytes of the images": distilled.image_bytes,
    }
