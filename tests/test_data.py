"""Every layout, every kind of image, every kind of bad input."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import tarfile
import urllib.error
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ddgen.config import DataConfig
from ddgen.data import ImageDataset, check_class_order, load_dataset, native_image_size, split_holdout
from ddgen.data.decode import BadImageError, decode_image
from ddgen.data.load import cache_root
from ddgen.errors import UserError

SIZE = 8


def colour(label: int, test: bool = False, index: int = 0) -> tuple[int, int, int]:
    """A colour from which `check_labels` reads the true class back."""
    return label % 200, label // 200 + (100 if test else 0), index


def picture(rgb: tuple[int, int, int], size: int = SIZE) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), rgb).save(out, "PNG")
    return out.getvalue()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_folders(root: Path, splits: Sequence[str], names: Sequence[str], per_class: int = 1) -> None:
    """Class folders; the colour holds the position in `names`, which is the true class."""
    for split in splits:
        for label, name in enumerate(names):
            for index in range(per_class):
                write(root / split / name / f"{index}.png", picture(colour(label, split != "train", index)))


def write_shard(
    path: Path, labels: Sequence[Any], names: Sequence[str] | None, columns: tuple[str, str] = ("image", "label")
) -> None:
    """A shard of the hub's parquet layout, two rows a row group; `names` makes the label a ClassLabel."""
    order = list(names) if names is not None else sorted(set(map(str, labels)))
    test = not path.name.startswith("train")
    positions = [label if isinstance(label, int) else order.index(label) for label in labels]
    images = [
        {"bytes": picture(colour(position, test)), "path": f"{row}.png"} for row, position in enumerate(positions)
    ]
    table = pa.table({columns[0]: images, columns[1]: list(labels)})
    if names is not None:
        features = {columns[0]: {"_type": "Image"}, columns[1]: {"_type": "ClassLabel", "names": list(names)}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)


class NumpyTwoDtype:
    """Pickles as CIFAR's files do: numpy.dtype('u1', 0, 1), integers where numpy wants booleans."""

    def __reduce__(self) -> Any:
        return np.dtype, ("u1", 0, 1)


def write_cifar(root: Path, name: str) -> None:
    """CIFAR's pickled batches, one image a class and batch."""
    k = 10 if name == "cifar10" else 100
    files = {"train": ["data_batch_" + str(n) for n in range(1, 6)], "test": ["test_batch"]}
    folder, key, meta, names_key = root / "cifar-10-batches-py", "labels", "batches.meta", "label_names"
    if name == "cifar100":
        files = {"train": ["train"], "test": ["test"]}
        folder, key, meta, names_key = root / "cifar-100-python", "fine_labels", "meta", "fine_label_names"
    names = [f"name{k - label:03d}" for label in range(k)]  # not in sorted order: the meta file decides
    write(folder / meta, pickle.dumps({names_key: names, "dtype": NumpyTwoDtype()}, protocol=2))
    for split, batches in files.items():
        for batch in batches:
            rgb = np.array([colour(label, split == "test") for label in range(k)], dtype=np.uint8)
            data = np.repeat(rgb, 32 * 32, axis=1)  # (k, 3072), channel after channel
            write(folder / batch, pickle.dumps({"data": data, key: list(range(k))}, protocol=2))


def load(tmp_path: Path, dataset: str, data_dir: Path | None, split: str = "train", **settings: Any) -> ImageDataset:
    settings = {"image_size": SIZE, "cache_dir": str(tmp_path / "cache"), **settings}
    config = DataConfig(dataset=dataset, data_dir=None if data_dir is None else str(data_dir), **settings)  # type: ignore[arg-type]
    return load_dataset(config, split, progress=False)  # type: ignore[arg-type]


def check_labels(dataset: ImageDataset, true_names: Sequence[str], test: bool) -> None:
    """Every image's class name is the one its colour says."""
    corner = dataset.pixels[:, :, 0, 0].long()  # (n, 3)
    true = corner[:, 0] + 200 * (corner[:, 1] % 100)
    assert [dataset.class_names[label] for label in dataset.labels] == [true_names[label] for label in true]
    assert torch.equal(corner[:, 1] >= 100, torch.full((len(dataset),), test))


def check_both(tmp_path: Path, dataset: str, data_dir: Path | None, names: Sequence[str], counts: tuple[int, int],
               **settings: Any) -> None:  # fmt: skip
    """Loads both splits; checks counts, labels and that the class order is the same in both."""
    train = load(tmp_path, dataset, data_dir, **settings)
    test = load(tmp_path, dataset, data_dir, "test", **settings)
    assert train.class_names == test.class_names
    assert set(train.class_names) == set(names)
    assert (len(train), len(test)) == counts
    check_labels(train, names, False)
    check_labels(test, names, True)


def error(tmp_path: Path, dataset: str, data_dir: Path | None, split: str = "train", **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, dataset, data_dir, split, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def wnids(count: int) -> list[str]:
    return [f"n{label:08d}" for label in range(count)]


# --- layouts -------------------------------------------------------------------------------------------------


def test_digits_are_readable_and_split_once(tmp_path: Path) -> None:
    train, test = (load(tmp_path, "digits", None, split, image_size=None) for split in ("train", "test"))
    assert train.pixels.shape[1:] == (3, 32, 32)
    assert len(train) + len(test) == 1797
    assert abs(len(test) / 1797 - 0.2) < 0.01
    assert train.class_names == tuple("0123456789")
    assert (train.pixels.min(), train.pixels.max()) == (0, 255)
    assert torch.equal(train.pixels[:, 0], train.pixels[:, 2])
    per_class = test.labels.bincount()
    assert per_class.min() >= 34 and per_class.max() <= 37
    from sklearn.datasets import load_digits

    shrunk = torch.nn.functional.avg_pool2d(train.pixels[:, :1].float(), 4)[:, 0] * 16 / 255
    real = torch.from_numpy(load_digits().images).float()
    nearest = torch.cdist(shrunk.flatten(1), real.flatten(1)).argmin(1)
    assert torch.equal(torch.from_numpy(load_digits().target)[nearest], train.labels)
    assert nearest.unique().numel() >= len(train) - 1


@pytest.mark.parametrize(("name", "archive"), [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "x.tgz")])
def test_cifar_batches_folder_and_tar(tmp_path: Path, name: str, archive: str) -> None:
    k = 10 if name == "cifar10" else 100
    names = [f"name{k - label:03d}" for label in range(k)]
    write_cifar(tmp_path / "data", name)
    inner = next((tmp_path / "data").iterdir())
    counts = (5 * k if name == "cifar10" else k, k)
    for data_dir in (tmp_path / "data", inner):
        check_both(tmp_path, name, data_dir, names, counts, image_size=32)
    assert load(tmp_path, name, inner).class_names == tuple(names)  # the meta file's order, not sorted
    with tarfile.open(tmp_path / archive, "w:gz") as file:
        file.add(inner, inner.name)
    check_both(tmp_path, name, tmp_path / archive, names, counts, image_size=32)


@pytest.mark.parametrize(("name", "columns"), [("cifar10", ("img", "label")), ("cifar100", ("img", "fine_label"))])
def test_cifar_parquet_and_folders(tmp_path: Path, name: str, columns: tuple[str, str]) -> None:
    k = 10 if name == "cifar10" else 100
    names = [f"c{k - label:03d}" for label in range(k)]
    for split in ("train", "test"):
        write_shard(tmp_path / "hub" / name / f"{split}-00000-of-00001.parquet", range(k), names, columns)
    check_both(tmp_path, name, tmp_path / "hub", names, (k, k))
    assert load(tmp_path, name, tmp_path / "hub").class_names == tuple(names)
    write_folders(tmp_path / "folders", ("train", "test"), names)
    check_both(tmp_path, name, tmp_path / "folders", names, (k, k))
    assert load(tmp_path, name, tmp_path / "folders").class_names == tuple(sorted(names))


def test_tinyimagenet_official_tree_zip_folders_and_parquet(tmp_path: Path) -> None:
    names = wnids(200)
    root = tmp_path / "tiny-imagenet-200"
    lines = []
    for label, name in enumerate(names):
        write(root / "train" / name / "images" / f"{name}_0.png", picture(colour(label)))
        write(root / "train" / name / f"{name}_boxes.txt", b"0 0 1 1")
        position = 199 - label
        write(root / "val" / "images" / f"val_{position}.png", picture(colour(label, True)))
        lines.append(f"val_{position}.png\t{name}\t0\t0\t62\t57\n")
    write(root / "val" / "val_annotations.txt", "".join(sorted(lines)).encode())
    write(root / "test" / "images" / "test_0.png", picture((0, 0, 0)))  # has no labels: never read
    for data_dir in (tmp_path, root):
        check_both(tmp_path, "tinyimagenet", data_dir, names, (200, 200))

    archive = tmp_path / "zip" / "tiny-imagenet-200.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(root.rglob("*")):
            file.write(path, path.relative_to(tmp_path))
    for data_dir in (archive, archive.parent):
        check_both(tmp_path, "tinyimagenet", data_dir, names, (200, 200))

    write_folders(tmp_path / "folders", ("train", "val"), names)
    check_both(tmp_path, "tinyimagenet", tmp_path / "folders", names, (200, 200))

    write_shard(tmp_path / "hub/data/train-00000-of-00002.parquet", range(100), names)
    write_shard(tmp_path / "hub/data/train-00001-of-00002.parquet", range(100, 200), names)
    write_shard(tmp_path / "hub/data/valid-00000-of-00001.parquet", range(199, -1, -1), names)
    check_both(tmp_path, "tinyimagenet", tmp_path / "hub", names, (200, 200))

    (root / "val" / "images" / "val_7.png").unlink()
    assert "1 of 200 images are missing" in error(tmp_path, "tinyimagenet", root, "test")
    write(root / "val" / "val_annotations.txt", b"val_1.png\tn99\t0\n")
    assert "line 1 names no training class" in error(tmp_path, "tinyimagenet", root, "test")


@pytest.mark.parametrize(
    ("name", "folder"),
    [("imagenette", "imagenette2-320"), ("imagenette", "imagenette2"), ("imagenette", "imagenette2-160"),
     ("imagewoof", "imagewoof2-320"), ("imagewoof", "imagewoof2")],
)  # fmt: skip
def test_imagenette_download_layouts(tmp_path: Path, name: str, folder: str) -> None:
    names = wnids(10)
    write_folders(tmp_path / "data" / folder, ("train", "val"), names)
    for data_dir in (tmp_path / "data", tmp_path / "data" / folder):
        check_both(tmp_path, name, data_dir, names, (10, 10))
    archive = tmp_path / f"{folder}.tgz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "data" / folder, folder)
    check_both(tmp_path, name, archive, names, (10, 10))


def test_imagenet1k_folders_and_parquet_with_an_unlabelled_test_split(tmp_path: Path) -> None:
    names = wnids(1000)
    write_folders(tmp_path / "folders", ("train", "val"), names)
    check_both(tmp_path, "imagenet1k", tmp_path / "folders", names, (1000, 1000))
    human = [f"fish {label}, Piscis {label}" for label in range(1000)]
    write_shard(tmp_path / "hub/data/train-00000-of-00001.parquet", range(1000), human)
    write_shard(tmp_path / "hub/data/validation-00000-of-00001.parquet", range(1000), human)
    write_shard(tmp_path / "hub/data/test-00000-of-00001.parquet", [-1, -1], human)
    check_both(tmp_path, "imagenet1k", tmp_path / "hub", human, (1000, 1000))
    chosen = load(tmp_path, "imagenet1k", tmp_path / "hub", classes=f"{human[7]}, {human[3]}")
    assert chosen.class_names == (human[7], human[3])
    assert chosen.labels.tolist() == [1, 0]
    check_labels(chosen, human, False)


@pytest.mark.parametrize("test_name", ["test", "val", "valid", "validation"])
def test_imagefolder(tmp_path: Path, test_name: str) -> None:
    names = ["10", "9", "Zebra", "ant", "bullet_train", "test"]
    write_folders(tmp_path / "photos", ("train", test_name), names, 2)
    (tmp_path / "photos/train/.ipynb_checkpoints").mkdir()
    write(tmp_path / "photos/train/ant/notes.txt", b"not an image")
    check_both(tmp_path, "imagefolder", tmp_path / "photos", names, (12, 12))
    assert load(tmp_path, "imagefolder", tmp_path / "photos").class_names == tuple(sorted(names))


@pytest.mark.parametrize("inside", ["train", ""])
def test_imagefolder_without_test_split_holds_a_fifth_out(
    tmp_path: Path, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folders(tmp_path / "photos", (".",) if not inside else ("train",), ["a", "b", "c"], 10)
    config = DataConfig(dataset="imagefolder", data_dir=str(tmp_path / "photos"), image_size=SIZE,
                        cache_dir=str(tmp_path / "cache"))  # fmt: skip
    train, test = load_dataset(config, "train"), load_dataset(config, "test")
    assert "no test split" in capsys.readouterr().err
    assert (train.labels.bincount().tolist(), test.labels.bincount().tolist()) == ([8, 8, 8], [2, 2, 2])
    seen = [tuple(row) for dataset in (train, test) for row in dataset.pixels[:, ::2, 0, 0].tolist()]
    assert sorted(seen) == [(label, index) for label in range(3) for index in range(10)]
    subset = load(tmp_path, "imagefolder", tmp_path / "photos", "test", classes="c,a")
    expected = {tuple(row) for row in test.pixels[:, ::2, 0, 0].tolist() if row[0] != 1}
    assert {tuple(row) for row in subset.pixels[:, ::2, 0, 0].tolist()} == expected


def test_imagefolder_in_a_zip(tmp_path: Path) -> None:
    write_folders(tmp_path / "src/photos", ("train", "test"), ["a", "b"])
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        for path in sorted((tmp_path / "src").rglob("*.png")):
            file.write(path, path.relative_to(tmp_path / "src"))
        file.writestr("../../escaped.png", picture((1, 2, 3)))
        file.writestr("__MACOSX/photos/train/a/._0.png", b"junk")
    check_both(tmp_path, "imagefolder", tmp_path / "photos.zip", ["a", "b"], (2, 2))
    assert not list(tmp_path.parent.glob("escaped.png"))


def test_imagefolder_in_a_tar_with_links(tmp_path: Path) -> None:
    write_folders(tmp_path / "src/photos", ("train", "test"), ["a", "b"])
    image = min((tmp_path / "src").rglob("train/a/*.png"))
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        file.add(tmp_path / "src/photos", "/photos")
        hard = tarfile.TarInfo("photos/train/a/hard.png")
        hard.type, hard.linkname = tarfile.LNKTYPE, image.relative_to(tmp_path / "src").as_posix()
        soft = tarfile.TarInfo("photos/train/b/soft.png")
        soft.type, soft.linkname = tarfile.SYMTYPE, f"../a/{image.name}"
        for link in (hard, soft):
            file.addfile(link)
    found = load(tmp_path, "imagefolder", tmp_path / "photos.tar")
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert (found.pixels[1] == found.pixels[0]).all() and (found.pixels[0] == found.pixels[3]).all()


@pytest.mark.parametrize(
    ("name", "kind", "leads_to", "expected"),
    [
        ("../../escaped.png", tarfile.REGTYPE, "", "cannot be unpacked (../../escaped.png leads out of it)"),
        ("photos/escaped.png", tarfile.SYMTYPE, "../../../escaped.png", "photos/escaped.png is neither a file, nor"),
        ("photos/pipe", tarfile.FIFOTYPE, "", "photos/pipe is neither a file, nor"),
        ("photos/loop", tarfile.SYMTYPE, "loop", "cannot be unpacked ("),
    ],
)
def test_a_tar_that_leads_out_of_its_folder_is_refused(
    tmp_path: Path, name: str, kind: bytes, leads_to: str, expected: str
) -> None:
    write_folders(tmp_path / "photos", ("train", "test"), ["a", "b"])
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        file.add(tmp_path / "photos", "photos")
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, leads_to
        file.addfile(member, io.BytesIO())
    assert expected in error(tmp_path, "imagefolder", tmp_path / "photos.tar")
    assert not list(tmp_path.rglob("escaped.png")) and not list(tmp_path.glob("cache/unpacked/*"))


def test_parquet_of_ones_own(tmp_path: Path) -> None:
    write_shard(tmp_path / "named/train-0.parquet", [2, 0, 1], ["z", "y", "x"])
    write_shard(tmp_path / "named/valid_test-0.parquet", [0], ["z", "y", "x"])
    write_shard(tmp_path / "named/test-0.parquet", [1, 2, 0], ["z", "y", "x"])
    check_both(tmp_path, "parquet", tmp_path / "named", ["z", "y", "x"], (3, 3))
    assert load(tmp_path, "parquet", tmp_path / "named").labels.tolist() == [2, 0, 1]

    write_shard(tmp_path / "text/train.parquet", ["dog", "cat", "dog"], None)
    write_shard(tmp_path / "text/validation.parquet", ["dog", "cat"], None)
    check_both(tmp_path, "parquet", tmp_path / "text", ["cat", "dog"], (3, 2))

    write_shard(tmp_path / "reordered/train/0000.parquet", [0, 1], ["b", "a"])
    write_shard(tmp_path / "reordered/test/0000.parquet", [0, 1], ["a", "b"])
    assert load(tmp_path, "parquet", tmp_path / "reordered", "test").labels.tolist() == [1, 0]

    write_shard(tmp_path / "bare/train-0.parquet", [0, 1] * 5, None)
    held = load(tmp_path, "parquet", tmp_path / "bare", "test")
    assert (held.class_names, held.labels.bincount().tolist()) == (("0", "1"), [1, 1])


def test_without_data_dir_the_cache_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path / "cache/downloads/cifar10", "cifar10")
    names = [f"name{10 - label:03d}" for label in range(10)]
    check_both(tmp_path, "cifar10", None, names, (50, 10))
    monkeypatch.setenv("DDGEN_CACHE", str(tmp_path / "elsewhere"))
    assert cache_root(DataConfig()) == tmp_path / "elsewhere"
    assert cache_root(DataConfig(cache_dir="given")) == Path("given")


def test_download_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path / "server", "cifar10")

    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        assert url.startswith("https://www.cs.toronto.edu/") and len(md5) == 32
        with tarfile.open(Path(root) / filename, "w:gz") as file:
            file.add(tmp_path / "server/cifar-10-batches-py", "cifar-10-batches-py")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    assert len(load(tmp_path, "cifar10", None)) == 50
    assert [path.name for path in (tmp_path / "cache/downloads/cifar10").iterdir()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize(
    ("name", "what"),
    [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz"),
     ("tinyimagenet", "tiny-imagenet-200.zip"), ("imagenette", "imagenette2-320.tgz"),
     ("imagewoof", "imagewoof2-320.tgz"), ("imagenet1k", "train/<wnid>/*")],
)  # fmt: skip
def test_no_data_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str) -> None:
    def fetch(*_: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    message = error(tmp_path, name, None)
    assert f"--dataset {name}" in message and str(tmp_path / "cache/downloads" / name) in message and what in message
    assert name == "imagenet1k" or "no route to host" in message


# --- kinds of images -----------------------------------------------------------------------------------------


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def corner(content: bytes, size: int = SIZE) -> list[int]:
    pixels = decode_image(content, size)
    assert pixels.shape == (3, size, size) and pixels.dtype == np.uint8
    return [int(value) for value in pixels[:, 0, 0]]


def test_modes() -> None:
    square = (SIZE, SIZE)
    assert corner(encoded(Image.new("L", square, 77))) == [77] * 3
    assert corner(encoded(Image.new("1", square, 1))) == [255] * 3
    assert corner(encoded(Image.new("LA", square, (10, 0)))) == [255] * 3
    assert corner(encoded(Image.new("RGBA", square, (200, 100, 0, 255)))) == [200, 100, 0]
    assert corner(encoded(Image.new("RGBA", square, (200, 100, 0, 0)))) == [255] * 3
    assert corner(encoded(Image.new("RGBA", square, (0, 0, 0, 51)))) == [204] * 3  # 20 % black over white
    assert corner(encoded(Image.new("CMYK", square, (0, 255, 255, 0)), "TIFF")) == [255, 0, 0]
    red = corner(encoded(Image.new("CMYK", square, (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(np.array(red) - [255, 0, 0]).max() <= 3
    assert corner(encoded(Image.new("YCbCr", square, (128, 128, 128)), "JPEG")) == [128] * 3
    palette = Image.new("P", square, 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert corner(encoded(palette)) == [10, 20, 30]
    assert corner(encoded(palette, transparency=1)) == [255] * 3
    assert corner(encoded(palette, transparency=b"\xff\x00")) == [255] * 3
    assert corner(encoded(palette, "GIF")) == [10, 20, 30]
    assert corner(encoded(Image.new("RGB", square, (9, 8, 7)), transparency=(9, 8, 7))) == [255] * 3


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (257, 1), (32896, 128), (65535, 255), (300, 1), (128, 0)])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled(value: int, grey: int, format: str) -> None:
    image = Image.fromarray(np.full((SIZE, SIZE), value, dtype=np.uint16))
    assert corner(encoded(image, format)) == [grey] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    from PIL import ImageOps

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content)))).transpose(2, 0, 1)
    assert np.array_equal(decode_image(content, SIZE), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_image_with_broken_exif_is_still_an_image() -> None:
    for exif in (b"Exif\0\0rubbish", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"):
        content = encoded(Image.new("RGB", (SIZE, SIZE), (128, 128, 128)), "JPEG", exif=exif)
        assert corner(content) == [128] * 3


def test_resize_keeps_the_centre_square_and_leaves_the_right_size_alone() -> None:
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    wide[:, 16:32] = 200  # exactly the centre square
    for image in (wide, wide.transpose(1, 0, 2)):
        pixels = decode_image(encoded(Image.fromarray(np.ascontiguousarray(image))), SIZE).astype(int)
        assert np.abs(pixels[:, 1:-1, 1:-1] - 200).max() <= 2
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encoded(Image.fromarray(noise)), SIZE), noise.transpose(2, 0, 1))
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)  # finest stripes: antialiased to mid grey
    assert np.abs(decode_image(encoded(Image.fromarray(checks)), SIZE).astype(int)[:, 1:-1, 1:-1] - 127).max() <= 2
    assert decode_image(encoded(Image.new("RGB", (1, 3000), (5, 5, 5))), SIZE).max() == 5


def test_a_large_jpeg_is_decoded_small_without_a_visible_difference() -> None:
    ramp = np.linspace(0, 255, 512, dtype=np.uint8)
    image = Image.fromarray(np.stack([np.tile(ramp, (512, 1)), np.tile(ramp[:, None], (1, 512)), np.full((512, 512), 90)], -1).astype(np.uint8))  # noqa: E501  # fmt: skip
    drafted = decode_image(encoded(image, "JPEG", quality=95), 32).astype(int)
    whole = decode_image(encoded(image), 32).astype(int)
    assert np.abs(drafted - whole).max() <= 4


# --- broken images -------------------------------------------------------------------------------------------


def broken_files() -> dict[str, tuple[bytes, str]]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), "JPEG")
    return {
        "cut.jpg": (whole[: len(whole) // 2], "truncated"),
        "page.png": (b"<html>404</html>", "not an image"),
        "empty.png": (b"", "empty file"),
        "bomb.png": (bomb(), "decompression bomb"),
        "float.tif": (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "no fixed range"),
        "cut.png": (encoded(Image.fromarray(noise))[:3000], "truncated"),
    }


def bomb() -> bytes:
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", list(broken_files()))
def test_a_broken_image_says_why(name: str) -> None:
    content, cause = broken_files()[name]
    with pytest.raises(BadImageError, match=cause):
        decode_image(content, SIZE)


def test_broken_images_are_listed_all_at_once_or_skipped_and_counted(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    write_folders(root, ("train", "test"), ["a", "b"], 3)
    for name, (content, _) in broken_files().items():
        write(root / "train" / ("a" if name.startswith("cut") else "b") / name, content)
    message = error(tmp_path, "imagefolder", root)
    assert "6 of 12 images cannot be read" in message and "--skip_bad_images" in message
    for name, (_, cause) in broken_files().items():
        assert name in message and cause in message
    listing = next((tmp_path / "cache/bad_images").glob("*.txt"))
    assert str(listing) in message and len(listing.read_text().splitlines()) == 6
    assert not list((tmp_path / "cache/packed").iterdir())  # nothing half-written stays

    kept = load(tmp_path, "imagefolder", root, skip_bad_images=True)
    assert kept.skipped == {"a": 2, "b": 4}
    assert len(kept) == 6 and kept.pixels.shape == (6, 3, SIZE, SIZE)
    check_labels(kept, ["a", "b"], False)
    assert "6 of 12 images cannot be read" in error(tmp_path, "imagefolder", root)  # also from the cache

    for index in range(30):
        write(root / "train/a" / f"bad{index:02d}.png", b"no")
    message = error(tmp_path, "imagefolder", root)
    assert "36 of 42" in message and "and 16 more" in message and message.count("not an image") <= 20


def test_skipping_must_leave_something_of_every_class(tmp_path: Path) -> None:
    write_folders(tmp_path / "photos", ("train", "test"), ["a", "b"])
    write(tmp_path / "photos/train/b/0.png", b"")
    message = error(tmp_path, "imagefolder", tmp_path / "photos", skip_bad_images=True)
    assert "no readable image is left of class b" in message


def test_parquet_rows_without_bytes_are_broken_images(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": None, "path": "far/away.png"}, {"bytes": picture((0, 0, 0)), "path": None}],
                      "label": [0, 1]})  # fmt: skip
    (tmp_path / "hub").mkdir()
    pq.write_table(table, tmp_path / "hub/train-0.parquet")
    pq.write_table(table, tmp_path / "hub/test-0.parquet")
    message = error(tmp_path, "parquet", tmp_path / "hub")
    assert "train-0.parquet:0 (far/away.png) (empty file)" in message


# --- subsets and settings ------------------------------------------------------------------------------------


def test_subsets(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", "dog"]
    write_folders(tmp_path / "photos", ("train", "test"), names, 2)
    for data_dir, dataset in ((tmp_path / "photos", "imagefolder"),):
        chosen = load(tmp_path, dataset, data_dir, classes="dog, ant")
        assert chosen.class_names == ("dog", "ant")
        check_labels(chosen, names, False)
        assert sorted(chosen.labels.tolist()) == [0, 0, 1, 1]
        first = load(tmp_path, dataset, data_dir, "test", num_classes=3)
        assert first.class_names == ("ant", "bee", "cat")
        check_labels(first, names, True)
    write_shard(tmp_path / "hub/train-0.parquet", [0, 1, 2, 3] * 4, names)
    write_shard(tmp_path / "hub/test-0.parquet", [0, 1, 2, 3], names)
    check_labels(load(tmp_path, "parquet", tmp_path / "hub", classes="cat,ant"), names, False)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"classes": "ant,cow,bees"}, "--classes cow: no such class"),
        ({"classes": "ant,beee"}, "--classes beee: no such class; did you mean bee?"),
        ({"classes": "ant,ant"}, "ant stands twice"),
        ({"classes": "ant"}, "--classes ant: a classifier needs at least 2"),
        ({"num_classes": 9}, "--num_classes 9: the dataset has 4 classes"),
        ({"num_classes": 0}, "--num_classes 0: a classifier needs at least 2"),
        ({"num_classes": 2, "classes": "ant,bee"}, "give one of the two"),
        ({"image_size": 2}, "--image_size 2: give at least 8"),
    ],
)
def test_wrong_settings(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    write_folders(tmp_path / "photos", ("train", "test"), ["ant", "bee", "cat", "dog"])
    assert expected in error(tmp_path, "imagefolder", tmp_path / "photos", **settings)


def test_wrong_data_dir(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dataset: not given"):
        load_dataset(DataConfig(), "train")
    with pytest.raises(UserError, match=r"--dataset cifar11: unknown; did you mean cifar10\?"):
        load_dataset(DataConfig(dataset="cifar11"), "train")  # type: ignore[arg-type]
    assert "give --data_dir" in error(tmp_path, "imagefolder", None)
    assert "does not exist" in error(tmp_path, "cifar10", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for name in ("cifar10", "tinyimagenet", "imagenette", "imagefolder", "parquet"):
        message = error(tmp_path, name, tmp_path / "empty")
        assert f"no {name} found; expected" in message and str(tmp_path / "empty") in message
    write(tmp_path / "notes.txt", b"hello")
    assert "neither a folder nor a zip or tar" in error(tmp_path, "cifar10", tmp_path / "notes.txt")
    for name in ("broken.zip", "broken.tar.gz"):
        write(tmp_path / name, b"hello")
        assert "cannot be unpacked" in error(tmp_path, "cifar10", tmp_path / name)
    write_folders(tmp_path / "photos", ("train",), ["only"])
    assert "at least 2" in error(tmp_path, "imagefolder", tmp_path / "photos")


def test_wrong_content(tmp_path: Path) -> None:
    write_folders(tmp_path / "three", ("train", "test"), ["a", "b", "c"])
    assert "3 classes, cifar10 has 10" in error(tmp_path, "cifar10", tmp_path / "three")
    (tmp_path / "three/train/d").mkdir()
    assert "class folder d holds no image" in error(tmp_path, "imagefolder", tmp_path / "three")
    write(tmp_path / "three/train/d/0.png", picture((3, 0, 0)))
    write(tmp_path / "three/test/dd/0.png", picture((3, 0, 0)))
    assert "class folder dd is not among the training classes; did you mean d?" in error(
        tmp_path, "imagefolder", tmp_path / "three", "test"
    )
    write_folders(tmp_path / "no_test", ("train",), [str(label) for label in range(10)])
    assert "no test images" in error(tmp_path, "cifar10", tmp_path / "no_test", "test")
    write_folders(tmp_path / "flat", ("train",), ["a", "b"])
    write(tmp_path / "flat/val/ILSVRC2012_val_00000001.png", picture((0, 0, 0)))
    assert "no class folders with images" in error(tmp_path, "imagefolder", tmp_path / "flat", "test")


def test_wrong_parquet(tmp_path: Path) -> None:
    write(tmp_path / "junk/train-0.parquet", b"PAR1 no")
    assert "not a readable parquet file" in error(tmp_path, "parquet", tmp_path / "junk")
    write_shard(tmp_path / "columns/train-0.parquet", [0, 1], None, ("picture", "class"))
    assert "no image column among picture, class" in error(tmp_path, "parquet", tmp_path / "columns")
    write_shard(tmp_path / "typed/train-0.parquet", [0, 1], ["a", "b"], ("picture", "kind"))
    write_shard(tmp_path / "typed/test-0.parquet", [-1, 1], ["a", "b"], ("picture", "kind"))
    assert len(load(tmp_path, "parquet", tmp_path / "typed")) == 2  # found by the types in the metadata
    assert "1 rows have labels outside 0..1, first -1" in error(tmp_path, "parquet", tmp_path / "typed", "test")
    write_shard(tmp_path / "other/train-0.parquet", [0, 1], ["ant", "bee"])
    write_shard(tmp_path / "other/test-0.parquet", [0, 1], ["ant", "been"])
    assert "class been is not among the training classes; did you mean bee?" in error(
        tmp_path, "parquet", tmp_path / "other", "test"
    )
    for config in ("one", "two"):
        write_shard(tmp_path / "many" / config / "train-0.parquet", [0, 1], ["a", "b"])
    assert "train shards in several folders" in error(tmp_path, "parquet", tmp_path / "many")


def test_damage_in_the_middle_of_a_shard(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [encoded(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))) for _ in range(8)]
    path = tmp_path / "hub/train-0.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"image": images, "label": [0, 1] * 4}), path, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)  # the header of the first page
    path.write_bytes(content)
    assert "not a readable parquet file" in error(tmp_path, "parquet", path.parent)


def test_a_link_to_nowhere_is_a_broken_image(tmp_path: Path) -> None:
    write_folders(tmp_path / "photos", ("train", "test"), ["a", "b"])
    (tmp_path / "photos/train/a/gone.png").symlink_to(tmp_path / "gone.png")
    assert "gone.png (No such file or directory)" in error(tmp_path, "imagefolder", tmp_path / "photos")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "owned",)

    write_cifar(tmp_path, "cifar10")
    write(tmp_path / "cifar-10-batches-py/data_batch_3", pickle.dumps({"data": Evil()}))
    assert "not a CIFAR batch" in error(tmp_path, "cifar10", tmp_path)
    assert not (tmp_path / "owned").exists()
    (tmp_path / "cifar-10-batches-py/data_batch_3").unlink()
    assert "data_batch_3 missing" in error(tmp_path, "cifar10", tmp_path)


# --- the cache -----------------------------------------------------------------------------------------------


def test_pixels_are_decoded_once_and_again_when_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "photos"
    write_folders(root, ("train", "test"), ["a", "b"])
    first = load(tmp_path, "imagefolder", root)
    with monkeypatch.context() as patch:
        patch.setattr("ddgen.data.pack.decode_image", None)
        again = load(tmp_path, "imagefolder", root)
    assert torch.equal(first.pixels, again.pixels) and first.fingerprint == again.fingerprint
    again.pixels[0] = 7  # copy-on-write: neither a warning nor a change on disk
    assert torch.equal(load(tmp_path, "imagefolder", root).pixels, first.pixels)
    assert load(tmp_path, "imagefolder", root, image_size=16).pixels.shape == (2, 3, 16, 16)
    write(root / "train/a/0.png", picture((50, 50, 50)))
    changed = load(tmp_path, "imagefolder", root)
    assert changed.pixels[0, 0, 0, 0] == 50 and changed.fingerprint != first.fingerprint


def test_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    names = ["a", "b"]
    write_folders(tmp_path / "one", ("train", "test"), names)
    write_folders(tmp_path / "two", ("train", "test"), names)
    for split in ("train", "test"):
        write_shard(tmp_path / "three" / f"{split}-0.parquet", [0, 1], names)
    prints = [
        load(tmp_path, dataset, tmp_path / where).fingerprint
        for dataset, where in (("imagefolder", "one"), ("imagefolder", "two"), ("parquet", "three"))
    ]
    assert len(set(prints)) == 1
    others = [
        load(tmp_path, "imagefolder", tmp_path / "one", "test").fingerprint,
        load(tmp_path, "imagefolder", tmp_path / "one", classes="b,a").fingerprint,
        load(tmp_path, "imagefolder", tmp_path / "one", image_size=16).fingerprint,
    ]
    assert len({*prints, *others}) == 4


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path / "photos", ("train", "test"), ["a", "b"])
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    message = error(tmp_path, "imagefolder", tmp_path / "photos")
    assert "--cache_dir" in message and "GB are free" in message


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    write_folders(tmp_path / "photos", ("train", "test"), ["a", "b"])
    write(tmp_path / "file", b"")
    assert "--cache_dir" in error(tmp_path, "imagefolder", tmp_path / "photos", cache_dir=str(tmp_path / "file"))


def pack_and_report(root: str, cache: str, barrier: Any, results: Any) -> None:
    config = DataConfig(dataset="imagefolder", data_dir=root, cache_dir=cache, image_size=SIZE)
    barrier.wait()
    results.put(load_dataset(config, "train", progress=False).pixels.sum().item())


def test_two_processes_may_pack_at_once(tmp_path: Path) -> None:
    write_folders(tmp_path / "photos", ("train", "test"), ["a", "b"], 50)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (str(tmp_path / "photos"), str(tmp_path / "cache"), barrier, results)
    workers = [context.Process(target=pack_and_report, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    sums = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sums[0] == sums[1] == load(tmp_path, "imagefolder", tmp_path / "photos").pixels.sum().item()
    assert len(list((tmp_path / "cache/packed").iterdir())) == 1


def test_whoever_loses_the_race_uses_the_winners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddgen.data import pack as packing

    write_folders(tmp_path / "photos", ("train", "test"), ["a", "b"])
    whole_write, inner = packing._write, []

    def overtaken(*args: Any) -> Any:
        bad = whole_write(*args)
        if not inner:
            inner.append(True)
            monkeypatch.setattr("os.getpid", lambda: -1)  # another process's temporary folder
            inner.append(load(tmp_path, "imagefolder", tmp_path / "photos"))
        return bad

    monkeypatch.setattr(packing, "_write", overtaken)
    mine = load(tmp_path, "imagefolder", tmp_path / "photos")
    assert torch.equal(mine.pixels, inner[1].pixels)
    assert len(list((tmp_path / "cache/packed").iterdir())) == 1


# --- the dataset ---------------------------------------------------------------------------------------------


def toy(counts: Sequence[int]) -> ImageDataset:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    pixels = torch.zeros(len(labels), 3, SIZE, SIZE, dtype=torch.uint8)
    return ImageDataset(pixels, labels, tuple(f"c{k}" for k in range(len(counts))), "toy", "train", "0")


def test_holdout_is_stratified_and_deterministic() -> None:
    dataset = toy([40, 11, 2, 1])
    train, held = split_holdout(dataset, 0.1, 0)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(54))
    assert dataset.labels[held].bincount(minlength=4).tolist() == [4, 1, 1, 0]
    assert torch.equal(held, split_holdout(dataset, 0.1, 0)[1])
    assert not torch.equal(held, split_holdout(dataset, 0.1, 1)[1])
    assert split_holdout(dataset, 0.99, 0)[0].numel() >= 4  # every class keeps an image to train on
    for fraction in (0.0, 1.0, -1.0, 2.0):
        with pytest.raises(UserError, match="--observer_holdout"):
            split_holdout(dataset, fraction, 0)
    with pytest.raises(UserError, match="no class of toy has two images"):
        split_holdout(toy([1, 1]), 0.1, 0)


def test_dataset_properties() -> None:
    dataset = toy([3, 2])
    assert (len(dataset), dataset.num_classes, dataset.image_size) == (5, 2, SIZE)
    by_class = dataset.indices_by_class()
    assert [dataset.labels[rows].tolist() for rows in by_class] == [[0, 0, 0], [1, 1]]
    assert native_image_size("tinyimagenet") == 64 and native_image_size("imagewoof") == 256


def test_class_order() -> None:
    check_class_order(["a", "b"], ("a", "b"), expected_name="the observer", found_name="the dataset")
    for found, message in [
        (["b", "a"], "class 0 is 'a' in the observer but 'b' in the dataset .the same classes in another order"),
        (["a", "c"], "class 1 is 'b' in the observer but 'c' in the dataset .different classes"),
        (["a"], "the observer has 2 classes but the dataset has 1"),
    ]:
        with pytest.raises(UserError, match=message):
            check_class_order(["a", "b"], found, expected_name="the observer", found_name="the dataset")
