"""CIFAR's own pickled batches, as torchvision downloads them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ddgen.data.source import Item, Source, files_identity
from ddgen.errors import UserError


@dataclass(frozen=True)
class _Layout:
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    meta: str
    names: str


LAYOUTS = {
    "cifar10": _Layout(
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test=("test_batch",),
        labels="labels",
        meta="batches.meta",
        names="label_names",
    ),
    "cifar100": _Layout(
        folder="cifar-100-python",
        train=("train",),
        test=("test",),
        labels="fine_labels",
        meta="meta",
        names="fine_label_names",
    ),
}


def is_cifar(name: str, folder: Path) -> bool:
    """Whether a folder holds the pickled batches of `name`."""
    layout = LAYOUTS.get(name)
    return layout is not None and (folder / layout.train[0]).is_file()


def read_cifar(name: str, folder: Path, split: str) -> Source:
    """Reads the pickled batches; the order of classes is the one of the meta file.

    Raises:
        UserError: A file is missing, is no pickle of arrays, or has not the shape of CIFAR.
    """
    layout = LAYOUTS[name]
    files = layout.train if split == "train" else layout.test
    missing = [file for file in (layout.meta, *files) if not (folder / file).is_file()]
    if missing:
        raise UserError(f"--data_dir {folder}: {', '.join(missing)} missing; expected the complete {layout.folder}")
    names = tuple(str(item) for item in _field(folder / layout.meta, layout.names))
    pixels = np.concatenate([_pixels(folder / file) for file in files])
    labels = np.concatenate([np.asarray(_field(folder / file, layout.labels), dtype=np.int64) for file in files])
    if len(pixels) != len(labels) or (len(labels) and not 0 <= labels.min() <= labels.max() < len(names)):
        raise UserError(f"--data_dir {folder}: images and {layout.labels} do not fit each other; download it again")

    def read(rows: np.ndarray) -> Iterator[Item]:
        for row in rows:
            yield Item(f"{folder}:{row}", pixels[row])

    identity = files_identity(folder, [folder / file for file in (layout.meta, *files)])
    return Source(class_names=names, labels=labels, read=read, identity=identity, where=folder)


def _pixels(path: Path) -> np.ndarray:
    data = _field(path, "data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise UserError(f"--data_dir {path}: data is not uint8 (n, 3072); download it again")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (n, h, w, c)


def _field(path: Path, key: str) -> Any:
    try:
        with open(path, "rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
        return content[key]
    except OSError as error:
        raise UserError(f"--data_dir {path}: {error.strerror}") from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"--data_dir {path}: not a CIFAR batch ({type(error).__name__}: {error})") from None


class _ArraysOnly(pickle.Unpickler):
    """Unpickles containers and numpy arrays and nothing that could run code."""

    def __init__(self, file: IO[bytes], *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        """Returns the few numpy constructors a batch needs."""
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.ndarray.__reduce__(np.empty(0))[0]
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return _dtype
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def _dtype(code: str, align: int = 0, copy: int = 0) -> np.dtype:
    # CIFAR's files pass 0 and 1 for the two flags, which numpy has deprecated.
    return np.dtype(code, align=bool(align), copy=bool(copy))


def _encode(text: str, encoding: str) -> bytes:
    # How Python 3 writes bytes into a pickle that Python 2 can read.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding} have no place in it")
    return text.encode("latin1")
