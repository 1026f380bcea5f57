"""Anybody's distilled dataset, as evaluation needs it.

Other methods publish folders of class folders, normalised tensors, parquet files and hub datasets. Whatever states an
order of classes is held to the order of the real images; what only names its classes is read by their names; what only
numbers them, or has neither, is taken to be in that order, and a remark says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddgen.checkpoint import read_json
from ddgen.data import ImageDataset, check_class_order
from ddgen.data.classes import did_you_mean
from ddgen.data.decode import Encoded
from ddgen.data.folders import images_below, subfolders
from ddgen.data.parquet import split_shards
from ddgen.distill.challenge import ENTRIES, denormalise, read_images
from ddgen.distill.dataset import DistilledDataset, folder_names
from ddgen.distill.foreign_files import decode_all, hub_table, parquet_table, read_table
from ddgen.errors import UserError

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
NUMBERED = re.compile(r"^(?:class)?[ _-]*0*(\d+)(?:[ _.-]+(.+))?$", re.IGNORECASE)
LABELS_NAME, IMAGES_NAME = "labels.pt", "images"


@dataclass(frozen=True, eq=False)
class ForeignDataset:
    """Images that ddgen did not choose, class by class.

    Attributes:
        pixels: uint8 (n, 3, h, w).
        labels: int64 (n,), never falling.
        soft_labels: Probabilities, float16 (n, k); None where the source has none.
        class_names: The real images' classes, whose positions the labels are.
        remarks: How the order of classes was taken, and what was done to the images: sentences for the report.
    """

    pixels: Tensor
    labels: Tensor
    soft_labels: Tensor | None
    class_names: tuple[str, ...]
    remarks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ipc(self) -> int:
        """Images per class: the largest, should classes differ."""
        return int(self.labels.bincount().max())

    @property
    def factor(self) -> int:
        """Patches along a side of an image: nobody says, so each is taken as a whole."""
        return 1


def is_distilled_dataset(source: str) -> bool:
    """Whether a path is a folder that sample.py wrote."""
    return (Path(source) / "manifest.json").is_file()


def check_source(source: str) -> None:
    """Refuses, before anything is loaded, what is no dataset.

    Raises:
        UserError: Says what may be given.
    """
    path = Path(source)
    if not path.exists():
        if not HUB_ID.match(source):
            raise UserError(f"--distilled_dir {source}: no such file or folder, and not a hub id (owner/name)")
    elif (path / "config.yaml").is_file() and (path / "generator").is_dir():
        raise UserError(
            f"--distilled_dir {path}: a run folder, so there is no manifest.json; give --run_dir, or {path}/distilled/*"
        )
    elif path.is_file() and path.suffix not in (".pt", ".parquet"):
        raise UserError(f"--distilled_dir {path}: neither .pt nor .parquet; give one of these, or a folder")


def read_dataset(source: str, real: ImageDataset) -> DistilledDataset | ForeignDataset:
    """Reads ours, class folders, a challenge ``.pt``, DD-Ranking's folder, parquet files or a dataset of the hub.

    Args:
        source: Path or hub id.
        real: Real images, whose order of classes decides.

    Raises:
        UserError: Nothing that can be read, or another order of classes.
    """
    check_source(source)
    path = Path(source)
    if is_distilled_dataset(source):
        return DistilledDataset.load(path)
    if not path.exists():
        return _sorted(*read_table(hub_table(source), source, real), real)
    if path.is_file():
        if path.suffix == ".pt":
            return _challenge(path, real)
        return _sorted(*read_table(parquet_table(path, [path]), source, real), real)
    return _folder(path, real)


def _folder(path: Path, real: ImageDataset) -> ForeignDataset:
    _check_stated_order(path, real)
    if (path / f"{real.name}.pt").is_file():
        return _challenge(path / f"{real.name}.pt", real)
    try:
        shards = split_shards(path, ("train",)) or sorted(path.glob("*.parquet"))
    except UserError as error:  # that reader was asked for --data_dir
        raise UserError(str(error).replace("--data_dir", "--distilled_dir", 1)) from None
    if shards:
        return _sorted(*read_table(parquet_table(path, shards), str(path), real), real)
    labels_path = path / LABELS_NAME
    if labels_path.is_file() and (path / IMAGES_NAME).is_dir():
        found = _class_folders(path / IMAGES_NAME, real)
        return _with_labels(found, labels_path)
    return _class_folders(path / "train" if (path / "train").is_dir() else path, real)


def _check_stated_order(path: Path, real: ImageDataset) -> None:
    """Holds a folder's class_names.json, or that of the folder whose images it holds, to the real order."""
    for folder in (path, path.parent) if path.name in ("train", IMAGES_NAME) else (path,):
        if (folder / "class_names.json").is_file():
            stated = read_json(folder / "class_names.json")
            check_class_order(
                real.class_names, stated, expected_name=f"the real images of {real.name}",
                found_name=f"--distilled_dir {path}",
            )  # fmt: skip
            return


def _challenge(path: Path, real: ImageDataset) -> ForeignDataset:
    """Reads normalised images, class by class, and undoes the normalisation."""
    entry = ENTRIES.get(real.name)
    if entry is None:
        known = " and ".join(ENTRIES)
        raise UserError(f"--distilled_dir {path}: normalised images are read of {known}, not of {real.name}")
    images = read_images(path)
    k = len(real.class_names)
    if len(images) % k:
        raise UserError(f"--distilled_dir {path}: {len(images)} images do not divide into {k} classes")
    pixels, clipped = denormalise(images, entry)
    remarks = [f"The file names no classes: labels are positions, in the order of the classes of {real.name}."]
    if clipped:
        remarks.append(f"{clipped:.1%} of the values lay outside the range of a picture and were clipped.")
    labels = torch.arange(k).repeat_interleave(len(images) // k)
    return ForeignDataset(pixels, labels, None, real.class_names, tuple(remarks))


def _class_folders(path: Path, real: ImageDataset) -> ForeignDataset:
    """Reads <path>/<class>/*."""
    files = {folder.name: images_below(folder) for folder in subfolders(path)}
    files = {name: images for name, images in files.items() if images}
    if not files:
        raise UserError(
            f"--distilled_dir {path}: no manifest.json, .pt of {real.name}, parquet file or class folder with images"
        )
    positions, remark = order_of_folders(tuple(files), real, path)
    by_label = sorted(files, key=lambda name: positions[name])
    items: list[tuple[str, Encoded]] = [(str(image), image) for name in by_label for image in files[name]]
    labels = torch.tensor([positions[name] for name in by_label for _ in files[name]])
    pixels, resized = decode_all(items, real.image_size)
    return ForeignDataset(pixels, labels, None, real.class_names, (remark, *resized))


def order_of_folders(names: tuple[str, ...], real: ImageDataset, path: Path) -> tuple[dict[str, int], str]:
    """Finds the class of each folder.

    Args:
        names: Names of the class folders.
        real: Real images, whose order of classes decides.
        path: Where they are, for messages.

    Returns:
        Name -> position in the real order, and how that was found.

    Raises:
        UserError: Classes that are missing or unknown, or numbers and names that contradict each other.
    """
    classes = real.class_names
    if set(names) == set(classes):
        return {name: classes.index(name) for name in names}, "Labels are the names of the class folders."
    written = folder_names(classes)
    if set(names) == set(written):
        return {name: written.index(name) for name in names}, "Labels are the numbered names of the class folders."
    matches = {name: NUMBERED.match(name) for name in names}
    numbers = {name: int(match[1]) for name, match in matches.items() if match}
    if sorted(numbers.values()) != list(range(len(classes))) or len(numbers) != len(names):
        raise _unknown_folders(names, real, path)
    for name, match in matches.items():
        _check_number(name, numbers[name], match[2] if match else None, real, path)
    remark = f"The class folders hold numbers: they are taken as positions in the order of the classes of {real.name}."
    return numbers, remark


def _check_number(name: str, number: int, stated: str | None, real: ImageDataset, path: Path) -> None:
    """Refuses a folder such as 003_dog where class 3 is another."""
    if stated is None or _plain(stated) == _plain(real.class_names[number])[: len(_plain(stated))]:
        return
    raise UserError(
        f"--distilled_dir {path}: folder {name} is class {number}, which is {real.class_names[number]!r} in the real "
        f"images of {real.name}; another order of classes, or another dataset"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def _unknown_folders(names: tuple[str, ...], real: ImageDataset, path: Path) -> UserError:
    unknown = [name for name in names if name not in real.class_names]
    if unknown:
        return UserError(
            f"--distilled_dir {path}: class folder {unknown[0]} is not among the {len(real.class_names)} classes of "
            f"{real.name}{did_you_mean(unknown[0], real.class_names)}"
        )
    missing = [name for name in real.class_names if name not in names]
    return UserError(
        f"--distilled_dir {path}: {len(missing)} of {len(real.class_names)} classes have no folder with images, first "
        f"{missing[0]}; add them, or take fewer with --classes"
    )


def _with_labels(dataset: ForeignDataset, path: Path) -> ForeignDataset:
    """Adds DD-Ranking's label tensor: logits (n, k), or class numbers (n,) that must be the folders'."""
    tensor = torch.load(path, map_location="cpu", weights_only=True)
    n, k = len(dataset.labels), len(dataset.class_names)
    if isinstance(tensor, Tensor) and tensor.shape == (n,) and not tensor.is_floating_point():
        if not torch.equal(tensor.long(), dataset.labels):
            raise UserError(f"--distilled_dir {path}: labels are not those of the folders; another order of classes")
        return dataset
    if not isinstance(tensor, Tensor) or tensor.shape != (n, k):
        raise UserError(f"--distilled_dir {path}: expected a tensor of logits ({n}, {k}), one row per image")
    soft = torch.softmax(tensor.double(), dim=1).half()
    return ForeignDataset(dataset.pixels, dataset.labels, soft, dataset.class_names, dataset.remarks)


def _sorted(
    pixels: Tensor, labels: Tensor, soft_labels: Tensor | None, remarks: tuple[str, ...], real: ImageDataset
) -> ForeignDataset:
    order = labels.argsort(stable=True)
    soft = None if soft_labels is None else soft_labels[order]
    return ForeignDataset(pixels[order], labels[order], soft, real.class_names, remarks)
