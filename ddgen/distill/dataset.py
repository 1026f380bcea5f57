"""The distilled dataset: kept images, hard and soft labels, and where they come from, as a folder for anyone."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load, save
from tqdm import tqdm

from ddgen import __version__
from ddgen.checkpoint import DamagedJson, atomic_dir, read_json, write_bytes, write_json
from ddgen.distill.card import CardFacts, render_card, with_results, with_views
from ddgen.distill.preview import draw_preview
from ddgen.errors import UserError
from ddgen.grids import to_pil

FORMAT, FORMAT_VERSION = "ddgen-distilled-dataset", 1
PARQUET_PATH = "data/train-00000-of-00001.parquet"
SOFT_LABELS_PATH = "soft_labels.safetensors"
PLAIN_NAME = re.compile(r"^[A-Za-z0-9_]([A-Za-z0-9._ -]{0,98}[A-Za-z0-9_-])?$")
RESERVED_NAME = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(\..*)?$", re.IGNORECASE)
VERSIONED = ("torch", "diffusers", "datasets", "numpy", "pillow", "pyarrow", "safetensors")


@dataclass(frozen=True, eq=False)
class DistilledDataset:
    """Kept images, class by class.

    Attributes:
        pixels: uint8 (n, 3, h, w).
        labels: int64 (n,), never falling.
        soft_labels: Probabilities, float16 (n, k).
        realism: Observer's loss -log p(class), float32 (n,).
        seeds: Seed of each candidate, int64 (n,).
        indices: Number of each candidate within its class, int64 (n,).
        class_names: Names of the k classes in label order.
        provenance: JSON values. The card shows `dataset`, `licence`, `command`, `num_source_images`, `recipe`
            (setting -> value) and `selection` (see `SelectionReport.to_dict`); `source` is "real" where the images
            are crops of real ones; `factor` is the number of patches along a side of an image, 1 if missing.
            Whatever else is there goes into the manifest.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    soft_labels: torch.Tensor
    realism: torch.Tensor
    seeds: torch.Tensor
    indices: torch.Tensor
    class_names: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, k = len(self.labels), len(self.class_names)
        expected = {
            "pixels": (torch.uint8, (n, 3, *self.pixels.shape[2:])),
            "labels": (torch.int64, (n,)),
            "soft_labels": (torch.float16, (n, k)),
            "realism": (torch.float32, (n,)),
            "seeds": (torch.int64, (n,)),
            "indices": (torch.int64, (n,)),
        }
        for name, (dtype, shape) in expected.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        if set(self.labels.tolist()) != set(range(k)) or (self.labels.diff() < 0).any():
            raise ValueError("labels: expected every class, class by class")
        if not (torch.isfinite(self.soft_labels).all() and torch.isfinite(self.realism).all()):
            raise ValueError("soft_labels and realism must be finite")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ipc(self) -> int:
        """Images per class: the largest, should classes differ."""
        return int(self.labels.bincount().max())

    @property
    def factor(self) -> int:
        """Patches along a side of an image."""
        return int(self.provenance.get("factor", 1))

    @cached_property
    def png_images(self) -> tuple[bytes, ...]:
        """The images as they are stored: lossless PNG files."""
        return self._encode(progress=False)

    @property
    def image_bytes(self) -> int:
        """Bytes of the images as stored."""
        return sum(map(len, self.png_images))

    @property
    def soft_label_bytes(self) -> int:
        """Bytes of the soft labels as stored, without the file's header."""
        return self.soft_labels.numel() * self.soft_labels.element_size()

    def save(
        self, path: Path, *, overwrite: bool = False, selection_png: bytes | None = None, progress: bool = False
    ) -> None:
        """Writes the folder, whole or not at all.

        Args:
            path: The folder to create.
            overwrite: Replace an existing distilled dataset, which stays whole until the new one is.
            selection_png: Picture of what the selection rule did, to go with it and into the card.
            progress: Show a bar while the images are encoded.

        Raises:
            UserError: The folder exists, or is something other than a distilled dataset.
        """
        if path.exists() and not overwrite:
            raise UserError(f"--output_dir {path}: exists already; give another, or --overwrite to replace it")
        if path.exists() and not (path / "manifest.json").is_file() and (path.is_file() or any(path.iterdir())):
            raise UserError(
                f"--output_dir {path}: not a distilled dataset, so --overwrite leaves it alone; give another"
            )
        folders = folder_names(self.class_names)
        self.__dict__.setdefault("png_images", self._encode(progress))
        with atomic_dir(path, replace=overwrite) as root:
            names = self._write_images(root, folders)
            self._write_parquet(root / PARQUET_PATH, names)
            write_bytes(root / SOFT_LABELS_PATH, save({"soft_labels": self.soft_labels.cpu().contiguous()}))
            write_json(root / "class_names.json", list(self.class_names))
            write_bytes(root / "preview.png", self._preview_png())
            if selection_png is not None:
                write_bytes(root / "selection.png", selection_png)
            facts = self._facts(root, folders)
            write_bytes(root / "README.md", render_card(facts).encode())
            self._write_manifest(root, facts)

    @classmethod
    def load(cls, path: Path) -> DistilledDataset:
        """Reads the folder after checking every file but the card, which people may edit, against the manifest.

        Raises:
            UserError: The folder is no distilled dataset, or a file is missing or was changed.
        """
        manifest = _checked_manifest(path)
        table = pq.read_table(path / PARQUET_PATH)
        images = [_decode_png(record["bytes"]) for record in table["image"].to_pylist()]
        return cls(
            pixels=torch.stack(images),
            labels=_int64(table, "label"),
            soft_labels=load((path / SOFT_LABELS_PATH).read_bytes())["soft_labels"],
            realism=torch.from_numpy(table["realism"].to_numpy().astype(np.float32)),
            seeds=_int64(table, "seed"),
            indices=_int64(table, "index"),
            class_names=tuple(read_json(path / "class_names.json")),
            provenance=manifest["provenance"],
        )

    def _encode(self, progress: bool) -> tuple[bytes, ...]:
        """Encodes the images on all cores: Pillow works outside Python's lock."""
        with ThreadPoolExecutor() as threads:
            found = threads.map(encode_png, self.pixels)
            return tuple(tqdm(found, total=len(self), unit="image", desc="Writing PNGs", disable=not progress))

    def _write_images(self, root: Path, folders: Sequence[str]) -> list[str]:
        """Writes train/<class>/<00000>.png and returns the relative paths in row order."""
        names: list[str] = []
        counts = [0] * len(folders)
        for label, png in zip(self.labels.tolist(), self.png_images, strict=True):
            name = f"train/{folders[label]}/{counts[label]:05d}.png"
            counts[label] += 1
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(png)
            names.append(name)
        return names

    def _write_parquet(self, path: Path, names: Sequence[str]) -> None:
        schema = features(self.class_names).arrow_schema
        halves = pa.array(self.soft_labels.cpu().numpy().reshape(-1))
        columns = [
            pa.array([{"bytes": png, "path": name} for png, name in zip(self.png_images, names, strict=True)]),
            pa.array(self.labels.cpu().numpy()),
            pa.FixedSizeListArray.from_arrays(halves, len(self.class_names)),
            pa.array(self.realism.cpu().numpy()),
            pa.array(self.seeds.cpu().numpy()),
            pa.array(self.indices.cpu().numpy()),
        ]
        table = pa.table([column.cast(kind) for column, kind in zip(columns, schema.types, strict=True)], schema=schema)
        path.parent.mkdir(parents=True)
        pq.write_table(table, path, row_group_size=1000)

    def _preview_png(self) -> bytes:
        made = "generated images" if self.provenance.get("source") != "real" else "images made of real ones"
        title = f"{self.provenance.get('dataset') or 'Distilled dataset'}: {self.ipc} {made} per class"
        picture = draw_preview(self.pixels, self.labels, self.realism, self._recognised(), self.class_names, title)
        return _png_bytes(picture)

    def _recognised(self) -> torch.Tensor:
        return self.soft_labels.float().argmax(1) == self.labels

    def _facts(self, root: Path, folders: Sequence[str]) -> CardFacts:
        per_class = self.labels.bincount(minlength=len(self.class_names))
        return CardFacts(
            provenance=self.provenance,
            class_names=self.class_names,
            folder_names=folders,
            images_per_class=(int(per_class.min()), int(per_class.max())),
            num_images=len(self),
            image_size=(self.pixels.shape[2], self.pixels.shape[3]),
            probability=float(torch.exp(-self.realism.double()).mean()),
            agreement=float(self._recognised().double().mean()),
            has_selection_picture=(root / "selection.png").is_file(),
            num_bytes={
                "images (PNG, lossless)": self.image_bytes,
                "soft labels (float16)": self.soft_label_bytes,
                "parquet file (images and labels again)": (root / PARQUET_PATH).stat().st_size,
            },
        )

    def _write_manifest(self, root: Path, facts: CardFacts) -> None:
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "num_images": len(self),
            "ipc": self.ipc,
            "image_size": list(facts.image_size),
            "class_names": list(self.class_names),
            "folder_names": list(facts.folder_names),
            "image_bytes": self.image_bytes,
            "soft_label_bytes": self.soft_label_bytes,
            "provenance": json.loads(json.dumps(self.provenance, allow_nan=False)),
            "versions": versions(),
            "files": _describe_files(root),
        }
        write_json(root / "manifest.json", manifest)


def update_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes evaluation results into the card of a distilled dataset, in the place of earlier ones.

    Args:
        path: The distilled dataset's folder.
        results: See `ddgen.distill.card.with_results`.

    Raises:
        UserError: The folder is no distilled dataset.
    """
    _rewrite_card(path, read_manifest(path), lambda card: with_results(card, results))


def update_views(path: Path, name: str, facts: Mapping[str, Any] | None) -> None:
    """Takes a file of stored views into the manifest and the card of a distilled dataset, or out of both.

    Args:
        path: The distilled dataset's folder.
        name: The file, relative to it.
        facts: What is said of the views, as JSON; None takes them out, whether the file is there or not.

    Raises:
        UserError: The folder is no distilled dataset.
    """
    manifest = read_manifest(path)
    manifest["files"].pop(name, None)
    manifest.pop("stored_views", None)
    if facts is not None:
        manifest["files"][name] = _describe((path / name).read_bytes())
        manifest["stored_views"] = dict(facts)
    _rewrite_card(path, manifest, lambda card: with_views(card, name, facts))


def _rewrite_card(path: Path, manifest: dict[str, Any], change: Callable[[str], str]) -> None:
    card = path / "README.md"
    text = change(card.read_text(encoding="utf-8") if card.is_file() else "")
    write_bytes(card, text.encode())
    manifest["files"]["README.md"] = _describe(text.encode())
    write_json(path / "manifest.json", manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads a distilled dataset's manifest without looking at the other files.

    Raises:
        UserError: The folder is no distilled dataset that this version can read.
    """
    manifest_path = path / "manifest.json"
    if not manifest_path.is_file():
        raise UserError(f"--distilled_dir {path}: no manifest.json there; give a folder that sample.py wrote")
    try:
        manifest = read_json(manifest_path)
    except DamagedJson as error:
        raise UserError(f"--distilled_dir: {error}, or make the dataset again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            f"--distilled_dir {path}: manifest.json is not a distilled dataset's; give a folder that sample.py wrote"
        )
    if manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version")
        raise UserError(
            f"--distilled_dir {path}: format version {found}, this ddgen reads {FORMAT_VERSION}; update ddgen"
        )
    return manifest


def folder_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Returns a folder name for each class, such that sorting folders gives the class order.

    torchvision's `ImageFolder` numbers classes in the order of their sorted folder names. Names that are already in
    that order and fit every file system stay as they are; otherwise all get their label in front: ``003_dog``.
    """
    names = list(class_names)
    plain = all(PLAIN_NAME.match(name) and not RESERVED_NAME.match(name) for name in names)
    distinct = len({name.lower() for name in names}) == len(names)
    if plain and distinct and sorted(names) == names:
        return tuple(names)
    digits = max(3, len(str(len(names) - 1)))
    return tuple(f"{label:0{digits}d}_{re.sub(r'[^A-Za-z0-9-]+', '_', name)[:60]}" for label, name in enumerate(names))


def features(class_names: Sequence[str]) -> datasets.Features:
    """Returns the columns of the parquet file."""
    return datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(class_names)),
            "soft_label": datasets.List(datasets.Value("float16"), length=len(class_names)),
            "realism": datasets.Value("float32"),
            "seed": datasets.Value("int64"),
            "index": datasets.Value("int64"),
        }
    )


def encode_png(pixels: torch.Tensor) -> bytes:
    """Encodes one image, uint8 (3, h, w), without loss."""
    return _png_bytes(to_pil(pixels))


def versions() -> dict[str, str]:
    """Returns the versions of what made the dataset."""
    return {
        "ddgen": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in VERSIONED},
    }


def _png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=9)
    return buffer.getvalue()


def _decode_png(data: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def _int64(table: pa.Table, name: str) -> torch.Tensor:
    return torch.from_numpy(table[name].to_numpy().astype(np.int64))


def _describe(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _describe_files(root: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): _describe(path.read_bytes()) for path in paths}


def _checked_manifest(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    for name, expected in manifest["files"].items():
        if name == "README.md":
            continue
        file = path / name
        if not file.is_file():
            raise UserError(f"--distilled_dir {path}: {name} is missing; make the dataset again or copy it whole")
        if _describe(file.read_bytes()) != expected:
            raise UserError(
                f"--distilled_dir {path}: {name} is not what the manifest says it was (sha256 differs); "
                "make the dataset again or copy it whole"
            )
    return manifest
