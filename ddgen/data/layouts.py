"""From the name of a dataset and where it lies to a Source, whatever the layout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddgen.data import cifar, folders, parquet
from ddgen.data.archive import Download, download, is_archive, unpack
from ddgen.data.dataset import stratified
from ddgen.data.source import Item, Source, digest
from ddgen.errors import UserError

_TEST_FIRST = ("test", "validation", "valid", "val")
_VALID_FIRST = ("val", "valid", "validation", "test")  # where the test images were published without labels
_HELDOUT_FRACTION = 0.2
_OWN_DATA = ("imagefolder", "parquet")


@dataclass(frozen=True)
class Named:
    """What is known of a dataset by its name.

    Attributes:
        image_size: Side to which its images are brought by default.
        num_classes: How many classes it has; None for your own data.
        test_names: What its test split is called, the preferred name first.
        inside: Folders and archives in which it may lie inside --data_dir.
        expected: What to put into --data_dir, for a message.
        licence: What is known of its licence.
        source: Where to download it.
    """

    image_size: int
    num_classes: int | None
    test_names: tuple[str, ...]
    inside: tuple[str, ...]
    expected: str
    licence: str
    source: Download | None = None


_S3 = "https://s3.amazonaws.com/fast-ai-imageclas"
_IMAGENET_TERMS = "ImageNet terms of access: non-commercial research and education"
_CLASS_FOLDERS = "train/<class>/* with test/<class>/*"
_SHARDS = "train-*.parquet with test-*.parquet"


def _cifar(name: str, num_classes: int, archive: str, md5: str) -> Named:
    folder = cifar.LAYOUTS[name].folder
    return Named(
        image_size=32,
        num_classes=num_classes,
        test_names=_TEST_FIRST,
        inside=(folder, archive),
        expected=f"{folder}/, {archive}, {_CLASS_FOLDERS}, or {_SHARDS}",
        licence="not stated by its authors",
        source=Download(f"https://www.cs.toronto.edu/~kriz/{archive}", md5),
    )


def _imagenette(stem: str, md5: str | None) -> Named:
    variants = (f"{stem}2-320", f"{stem}2", f"{stem}2-160")
    return Named(
        image_size=256,
        num_classes=10,
        test_names=_VALID_FIRST,
        inside=(*variants, *(f"{variant}.tgz" for variant in variants)),
        expected=f"{stem}2-320/, {stem}2-320.tgz, train/<class>/* with val/<class>/*, or {_SHARDS}",
        licence=_IMAGENET_TERMS,
        source=Download(f"{_S3}/{stem}2-320.tgz", md5),
    )


NAMED = {
    "digits": Named(32, 10, (), (), "nothing", "CC BY 4.0 (UCI, Optical Recognition of Handwritten Digits)"),
    "cifar10": _cifar("cifar10", 10, "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    "cifar100": _cifar("cifar100", 100, "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    "tinyimagenet": Named(
        image_size=64,
        num_classes=200,
        test_names=_VALID_FIRST,
        inside=("tiny-imagenet-200", "tiny-imagenet-200.zip"),
        expected="tiny-imagenet-200/, tiny-imagenet-200.zip, train/<class>/* with val/<class>/*, or train-*.parquet "
        "with valid-*.parquet",
        licence=_IMAGENET_TERMS,
        source=Download("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),
    ),
    "imagenette": _imagenette("imagenette", "3df6f0d01a2c9592104656642f5e78a3"),
    "imagewoof": _imagenette("imagewoof", None),
    "imagenet1k": Named(
        image_size=256,
        num_classes=1000,
        test_names=_VALID_FIRST,
        inside=("imagenet", "imagenet1k", "ILSVRC2012"),
        expected="train/<wnid>/* with val/<wnid>/*, or train-*.parquet with validation-*.parquet",
        licence=_IMAGENET_TERMS,
    ),
    "imagefolder": Named(
        64, None, _TEST_FIRST, (), "train/<class>/<image>, and test/<class>/<image> if there is one", "unknown"
    ),
    "parquet": Named(64, None, _TEST_FIRST, (), f"{_SHARDS} if there is one, columns image and label", "unknown"),
}


def find_source(name: str, data_dir: str | None, split: str, cache_dir: Path, *, progress: bool) -> Source:
    """Finds a dataset's split on disk, unpacking or downloading it where needed.

    Args:
        name: A key of `NAMED`.
        data_dir: Folder or archive that holds the data; None looks into the cache and then downloads.
        split: ``train`` or ``test``.
        cache_dir: Where archives are unpacked.
        progress: Whether to say on stderr that a part of the training images is held out for testing.

    Raises:
        UserError: Nothing fitting is there.
    """
    if name == "digits":
        return _heldout(_digits(), split, progress=False)
    known = NAMED[name]
    root = _root(name, data_dir, cache_dir)
    found = _search(name, root, split, cache_dir, progress) if root.exists() else None
    if found is None and data_dir is None and known.source is not None:
        download(name, known.source, root)
        found = _search(name, root, split, cache_dir, progress)
    if found is None:
        setting = f"--data_dir {data_dir}" if data_dir is not None else f"--dataset {name}: nothing in {root}"
        raise UserError(f"{setting}: no {name} found; expected {known.expected}")
    if known.num_classes not in (None, len(found.class_names)):
        raise UserError(
            f"--data_dir {data_dir or root}: {len(found.class_names)} classes, {name} has {known.num_classes}; "
            "is it another dataset? --dataset imagefolder and --dataset parquet read any"
        )
    if len(found.class_names) < 2:
        raise UserError(f"--data_dir {data_dir}: {len(found.class_names)} class; a classifier needs at least 2")
    return found


def _root(name: str, data_dir: str | None, cache_dir: Path) -> Path:
    if data_dir is None and name in _OWN_DATA:
        raise UserError(f"--dataset {name}: give --data_dir; expected {NAMED[name].expected}")
    if data_dir is None:
        return cache_dir / "downloads" / name
    root = Path(data_dir).expanduser()
    if not root.exists():
        raise UserError(f"--data_dir {data_dir}: does not exist; expected {NAMED[name].expected}")
    if root.is_file() and not is_archive(root):
        raise UserError(f"--data_dir {data_dir}: neither a folder nor a zip or tar; expected {NAMED[name].expected}")
    return root


def _search(name: str, root: Path, split: str, cache_dir: Path, progress: bool) -> Source | None:
    if root.is_file():
        return _search(name, unpack(root, cache_dir), split, cache_dir, progress)
    for base in _bases(name, root):
        found = _read(name, base, split, progress)
        if found is not None:
            return found
    for inside in NAMED[name].inside:
        if is_archive(root / inside):
            return _search(name, unpack(root / inside, cache_dir), split, cache_dir, progress)
    return None


def _bases(name: str, root: Path) -> Iterator[Path]:
    """Yields the folders in which the data may lie: the one given, known names inside it, its only subfolder."""
    yield root
    for inside in NAMED[name].inside:
        if (root / inside).is_dir():
            yield root / inside
    inner = folders.subfolders(root)
    if len(inner) == 1 and inner[0].name not in ("train", *NAMED[name].inside):
        yield inner[0]


def _read(name: str, base: Path, split: str, progress: bool) -> Source | None:
    if cifar.is_cifar(name, base):
        return cifar.read_cifar(name, base, split)
    if name != "imagefolder":
        found = _read_parquet(name, base, split, progress)
        if found is not None or name == "parquet":
            return found
    return _read_folders(name, base, split, progress)


def _read_parquet(name: str, base: Path, split: str, progress: bool) -> Source | None:
    shards = parquet.split_shards(base, ("train",))
    if not shards:
        return None
    test_shards = parquet.split_shards(base, NAMED[name].test_names)
    if split == "train" and test_shards:
        return parquet.read_parquet(base, shards, None)
    train = parquet.read_parquet(base, shards, None)
    if test_shards:
        return parquet.read_parquet(base, test_shards, train.class_names)
    return _without_test(name, base, train, split, progress)


def _read_folders(name: str, base: Path, split: str, progress: bool) -> Source | None:
    folder = base if name == "imagefolder" and _has_no_splits(base) else base / "train"
    class_names = folders.class_folder_names(folder)
    if not class_names or not any(folders.images_below(folder / label) for label in class_names):
        return None
    test_dir = next((base / test for test in NAMED[name].test_names if (base / test).is_dir()), None)
    if split == "test" and test_dir is not None and folder != base:
        if folders.is_annotated(test_dir) and "images" not in class_names:
            return folders.read_annotated(test_dir, class_names)
        return _nonempty(folders.read_class_folders(test_dir, class_names, complete=False))
    train = folders.read_class_folders(folder, class_names, complete=True)
    if split == "train" and test_dir is not None and folder != base:
        return train
    return _without_test(name, base, train, split, progress)


def _has_no_splits(base: Path) -> bool:
    """Whether a folder's subfolders are classes (<dir>/<class>/<image>) rather than splits."""
    names = folders.class_folder_names(base)
    return len(names) > 1 and not {"train", *_TEST_FIRST}.intersection(names)


def _nonempty(test: Source) -> Source:
    if not len(test.labels):
        raise UserError(f"--data_dir {test.where}: no class folders with images; expected <class>/<image> in it")
    return test


def _without_test(name: str, base: Path, train: Source, split: str, progress: bool) -> Source:
    if name in _OWN_DATA:
        return _heldout(train, split, progress=progress)
    if split == "train":
        return train
    raise UserError(f"--data_dir {base}: no test images; expected {NAMED[name].expected}")


def _heldout(source: Source, split: str, *, progress: bool) -> Source:
    """Keeps a fixed fifth of every class aside as the test split."""
    aside = stratified(source.labels, source.class_names, _HELDOUT_FRACTION, 0, "test split")
    if progress:
        print(
            f"ddgen: {source.where} has no test split; a fixed fifth of each class is held out as one "
            f"({len(aside) - aside.sum()} images to train on, {aside.sum()} to test on)",
            file=sys.stderr,
        )
    return source.take(np.flatnonzero(aside if split == "test" else ~aside))


def _digits() -> Source:
    """scikit-learn's 8 x 8 digits, 0..16 spread over 0..255."""
    import sklearn
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)

    def read(rows: np.ndarray) -> Iterator[Item]:
        for row in rows:
            yield Item(f"digits:{row}", pixels[row])

    return Source(
        class_names=tuple(str(name) for name in bunch.target_names),
        labels=bunch.target.astype(np.int64),
        read=read,
        identity=digest("digits", sklearn.__version__),
        where=Path("digits"),
    )
