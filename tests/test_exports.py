"""Anybody's datasets in, ours out: class order, pixels and labels survive, and what contradicts itself is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

import evaluate
from ddgen import cli
from ddgen.commands import evaluate as evaluate_command
from ddgen.data import ImageDataset
from ddgen.distill.challenge import ENTRIES
from ddgen.distill.dataset import DistilledDataset, encode_png
from ddgen.distill.exports import export_challenge, export_dd_ranking
from ddgen.distill.foreign_dataset import ForeignDataset, read_dataset
from ddgen.errors import UserError

NAMES = ("dog", "cat", "bullet train")  # not in sorted order


def real_images(name: str = "toys", class_names: tuple[str, ...] = NAMES, size: int = 8) -> ImageDataset:
    k = len(class_names)
    return ImageDataset(
        torch.zeros(k, 3, size, size, dtype=torch.uint8), torch.arange(k), class_names, name, "train", "f"
    )


def distilled(
    name: str = "toys", class_names: tuple[str, ...] = NAMES, ipc: int = 2, size: int = 8
) -> DistilledDataset:
    k = len(class_names)
    labels = torch.arange(k).repeat_interleave(ipc)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(labels), k, generator=generator) * 5
    return DistilledDataset(
        pixels=torch.randint(0, 256, (len(labels), 3, size, size), dtype=torch.uint8, generator=generator),
        labels=labels,
        soft_labels=logits.softmax(1).half(),
        realism=torch.ones(len(labels)),
        seeds=torch.zeros(len(labels), dtype=torch.int64),
        indices=torch.arange(len(labels)),
        class_names=class_names,
        provenance={"dataset": name},
    )


def cifar100() -> tuple[DistilledDataset, ImageDataset]:
    names = tuple(f"class {label:02d}" for label in range(100))
    return distilled("cifar100", names, 10, 32), real_images("cifar100", names, 32)


def assert_equal(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def write_folder(root: Path, folders: tuple[str, ...], pixels: Tensor, ipc: int = 2) -> None:
    """Writes class folders: folder i gets images i * ipc and on."""
    for position, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for i in range(ipc):
            (root / folder / f"{i}.png").write_bytes(encode_png(pixels[position * ipc + i]))


def foreign(source: Path, real: ImageDataset) -> ForeignDataset:
    found = read_dataset(str(source), real)
    assert isinstance(found, ForeignDataset)
    assert found.class_names == real.class_names
    return found


# --- the challenge


def test_the_challenge_file_is_normalised_class_by_class_and_comes_back(tmp_path: Path) -> None:
    dataset, real = cifar100()
    path = tmp_path / "cifar100.pt"
    export_challenge(dataset, path)
    images = torch.load(path, weights_only=True)
    assert images.dtype == torch.float32 and images.shape == (1000, 3, 32, 32)
    value = int(dataset.pixels[437, 2, 5, 6])  # image 7 of class 43; blue
    assert images[437, 2, 5, 6].item() == pytest.approx((value / 255 - 0.4409) / 0.2762, abs=1e-6)
    for source in (path, tmp_path):  # the file, or the folder that holds the pair of files
        back = foreign(source, real)
        assert_equal(back.pixels, dataset.pixels)
        assert_equal(back.labels, dataset.labels)
        assert back.soft_labels is None
        assert back.remarks == (
            "The file names no classes: labels are positions, in the order of the classes of cifar100.",
        )


@pytest.mark.parametrize("name", list(ENTRIES))
def test_every_pixel_value_survives_normalisation(name: str) -> None:
    from ddgen.distill.challenge import denormalise, normalise

    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    back, clipped = denormalise(normalise(pixels, ENTRIES[name]), ENTRIES[name])
    assert_equal(back, pixels)
    assert clipped == 0


def test_values_outside_a_picture_are_clipped_and_said(tmp_path: Path) -> None:
    _, real = cifar100()
    images = torch.zeros(100, 3, 32, 32)
    images[:50] = 100.0
    images[50:] -= 0.1
    torch.save(images, tmp_path / "mine.pt")
    found = foreign(tmp_path / "mine.pt", real)
    assert (found.pixels[0] == 255).all()
    assert any("50.0% of the values" in remark for remark in found.remarks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: replace(d, **{name: getattr(d, name)[1:] for name in
                                 ("pixels", "labels", "soft_labels", "realism", "seeds", "indices")}),
         "class class 00 has 9 images"),
        (lambda d: replace(d, provenance={"dataset": "cifar10"}), "not cifar10"),
        (lambda d: replace(d, pixels=d.pixels[..., :16, :16]), "16 x 16 px"),
        (lambda d: distilled("cifar100", NAMES, 10, 32), "3 classes; the challenge takes all 100"),
    ],
)  # fmt: skip
def test_what_the_challenge_does_not_take_is_not_written(
    tmp_path: Path, change: Callable[[DistilledDataset], DistilledDataset], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export_challenge(change(cifar100()[0]), tmp_path / "cifar100.pt")
    assert not list(tmp_path.iterdir())


def test_an_export_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    dataset, _ = cifar100()
    path = tmp_path / "cifar100.pt"
    path.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists already"):
        export_challenge(dataset, path)
    assert path.read_bytes() == b"precious"
    export_challenge(dataset, path, overwrite=True)
    assert len(torch.load(path, weights_only=True)) == 1000


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("harm"),)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: torch.rand(100, 3, 32, 32), "no value is negative"),
        (lambda: torch.zeros(100, 3, 32, 32, dtype=torch.uint8), "holds uint8"),
        (lambda: torch.randn(100, 3, 32, 16), "float32 .100, 3, 32, 16."),
        (lambda: torch.randn(101, 3, 32, 32), "101 images do not divide into 100"),
        (lambda: [torch.randn(3)], "holds a list"),
        (lambda: torch.full((100, 3, 32, 32), float("nan")), "not finite"),
        (Harmful, "not a file of tensors alone"),
    ],
)
def test_other_tensors_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Callable[[], object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content(), tmp_path / "cifar100.pt")
    with pytest.raises(UserError, match=message):
        read_dataset(str(tmp_path / "cifar100.pt"), cifar100()[1])
    assert not (tmp_path / "harm").exists()


def test_normalised_images_of_another_dataset_are_refused(tmp_path: Path) -> None:
    torch.save(torch.randn(3, 3, 8, 8), tmp_path / "toys.pt")
    with pytest.raises(UserError, match="cifar100 and tinyimagenet, not of toys"):
        read_dataset(str(tmp_path / "toys.pt"), real_images())


# --- DD-Ranking


def test_dd_ranking_gets_an_image_folder_and_labels_whose_softmax_they_are(tmp_path: Path) -> None:
    dataset = distilled()
    export_dd_ranking(dataset, tmp_path / "out")
    folder = ImageFolder(str(tmp_path / "out" / "images"))
    assert folder.targets == dataset.labels.tolist()
    read = np.stack([np.asarray(folder[i][0]) for i in range(len(folder))])
    assert_equal(torch.from_numpy(read).permute(0, 3, 1, 2), dataset.pixels)
    labels = torch.load(tmp_path / "out" / "labels.pt", weights_only=True)
    torch.testing.assert_close(labels.softmax(1), dataset.soft_labels.float(), rtol=2e-3, atol=1e-6)

    back = foreign(tmp_path / "out", real_images())
    assert_equal(back.pixels, dataset.pixels)
    assert_equal(back.labels, dataset.labels)
    assert back.soft_labels is not None and back.soft_labels.dtype == torch.float16
    torch.testing.assert_close(back.soft_labels, dataset.soft_labels, rtol=3e-3, atol=1e-6)


def test_a_probability_of_zero_gives_a_finite_label(tmp_path: Path) -> None:
    dataset = replace(distilled(), soft_labels=torch.eye(3).repeat_interleave(2, 0).half())
    export_dd_ranking(dataset, tmp_path / "out")
    labels = torch.load(tmp_path / "out" / "labels.pt", weights_only=True)
    assert torch.isfinite(labels).all()
    assert labels.softmax(1).diagonal().min() > 0 and (labels.softmax(1).argmax(1) == dataset.labels).all()


def test_an_export_replaces_nothing_but_an_export(tmp_path: Path) -> None:
    export_dd_ranking(distilled(), tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        export_dd_ranking(distilled(), tmp_path / "out")
    export_dd_ranking(distilled(ipc=1), tmp_path / "out", overwrite=True)
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="leaves it alone"):
        export_dd_ranking(distilled(), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_labels_of_another_order_are_refused(tmp_path: Path) -> None:
    export_dd_ranking(distilled(), tmp_path / "out")
    torch.save(torch.tensor([1, 1, 0, 0, 2, 2]), tmp_path / "out" / "labels.pt")
    with pytest.raises(UserError, match="another order of classes"):
        read_dataset(str(tmp_path / "out"), real_images())


def test_the_export_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distilled().save(tmp_path / "ipc2")
    args = ["export", "--distilled_dir", str(tmp_path / "ipc2"), "--format"]
    assert cli.main([*args, "dd-ranking"]) == 0
    assert (tmp_path / "ipc2-dd-ranking" / "labels.pt").is_file()
    assert "exported 6 images of 3 classes" in capsys.readouterr().out
    assert cli.main([*args, "challenge"]) == 2
    assert "not toys" in capsys.readouterr().err
    assert cli.main(args[:-1]) == 2
    assert "--format: not set" in capsys.readouterr().err


# --- folders


def test_folders_are_read_by_their_names_whatever_their_order(tmp_path: Path) -> None:
    dataset = distilled()
    write_folder(tmp_path, NAMES, dataset.pixels)
    found = foreign(tmp_path, real_images())
    assert sorted(NAMES) != list(NAMES)
    assert_equal(found.pixels, dataset.pixels)
    assert_equal(found.labels, dataset.labels)
    assert found.remarks == ("Labels are the names of the class folders.",)


def test_our_own_images_are_read_from_their_folder_alone(tmp_path: Path) -> None:
    dataset = distilled()
    dataset.save(tmp_path / "ours")
    assert isinstance(read_dataset(str(tmp_path / "ours"), real_images()), DistilledDataset)
    found = foreign(tmp_path / "ours" / "train", real_images())
    assert_equal(found.pixels, dataset.pixels)
    assert_equal(found.labels, dataset.labels)


def test_a_folder_with_shuffled_class_names_is_refused(tmp_path: Path) -> None:
    distilled().save(tmp_path / "ours")
    shuffled = [NAMES[1], NAMES[0], NAMES[2]]
    (tmp_path / "ours" / "class_names.json").write_text(json.dumps(shuffled))
    with pytest.raises(UserError, match=r"'dog' in the real images of toys but 'cat'.*another order"):
        read_dataset(str(tmp_path / "ours" / "train"), real_images())
    write_folder(tmp_path / "other", ("000_cat", "001_dog", "002_bullet_train"), distilled().pixels)
    with pytest.raises(UserError, match="folder 000_cat is class 0, which is 'dog'"):
        read_dataset(str(tmp_path / "other"), real_images())


def test_numbers_are_positions_and_a_remark_says_so(tmp_path: Path) -> None:
    names = tuple(f"name {label}" for label in range(11))
    pixels = torch.arange(11, dtype=torch.uint8).view(11, 1, 1, 1).expand(11, 3, 8, 8)
    write_folder(tmp_path, tuple(map(str, range(11))), pixels, ipc=1)  # 10 sorts before 2
    found = foreign(tmp_path, real_images(class_names=names))
    assert found.pixels[:, 0, 0, 0].tolist() == list(range(11)) == found.labels.tolist()
    assert "taken as positions in the order of the classes of toys" in found.remarks[0]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("dog", "cat", "bullet trian"), "bullet trian is not among the 3 classes of toys; did you mean bullet train"),
        (("dog", "cat"), "1 of 3 classes have no folder with images, first bullet train"),
        (("1", "2", "3"), "class folder 1 is not among"),
        ((), "no manifest.json, .pt of toys, parquet file or class folder"),
    ],
)
def test_other_classes_are_refused(tmp_path: Path, folders: tuple[str, ...], message: str) -> None:
    write_folder(tmp_path, folders, distilled().pixels)
    with pytest.raises(UserError, match=message):
        read_dataset(str(tmp_path), real_images())


def test_images_of_several_sizes_become_squares_and_a_remark_says_so(tmp_path: Path) -> None:
    write_folder(tmp_path, NAMES, torch.full((6, 3, 8, 8), 7, dtype=torch.uint8))
    Image.new("RGB", (40, 20), (7, 7, 7)).save(tmp_path / "dog" / "0.png")
    found = foreign(tmp_path, real_images())
    assert found.pixels.shape == (6, 3, 8, 8) and (found.pixels == 7).all()
    assert found.remarks[1] == "1 of 6 images were cropped to a square and resized to 8 px."


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, NAMES, distilled().pixels)
    (tmp_path / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 of 6 images cannot be read, first .*cat/1\.png"):
        read_dataset(str(tmp_path), real_images())


# --- tables


def hub_dataset(rows: list[int], names: tuple[str, ...] | None = NAMES) -> datasets.Dataset:
    """A dataset as the hub has them, its rows in any order; image i is of colour i."""
    label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=list(names))
    features = datasets.Features({"picture": datasets.Image(), "label": label})
    images = [{"bytes": encode_png(torch.full((3, 8, 8), row, dtype=torch.uint8)), "path": None} for row in rows]
    return datasets.Dataset.from_dict({"picture": images, "label": [row // 2 for row in rows]}, features=features)


def test_parquet_is_read_in_class_order_with_its_soft_labels(tmp_path: Path) -> None:
    dataset = distilled()
    dataset.save(tmp_path / "ours")
    file = next((tmp_path / "ours" / "data").glob("*.parquet"))
    for source in (file, file.parent):
        found = foreign(source, real_images())
        assert_equal(found.pixels, dataset.pixels)
        assert_equal(found.labels, dataset.labels)
        assert found.soft_labels is not None
        assert_equal(found.soft_labels, dataset.soft_labels)
    with pytest.raises(UserError, match="another order"):
        read_dataset(str(file), real_images(class_names=(NAMES[2], *NAMES[:2])))


def test_a_dataset_of_the_hub_is_sorted_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return hub_dataset([5, 0, 3, 1, 4, 2], None if name.endswith("numbers") else NAMES)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = foreign(Path("someone/toys"), real_images())
    assert found.pixels[:, 0, 0, 0].tolist() == [0, 1, 3, 2, 5, 4]
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert asked == [("someone/toys", "train")]
    numbered = foreign(Path("someone/numbers"), real_images())
    assert "names no classes" in numbered.remarks[0]
    with pytest.raises(UserError, match="another order"):
        read_dataset("someone/toys", real_images(class_names=("dog", "bullet train", "cat")))


def test_what_the_hub_does_not_have_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str) -> datasets.Dataset:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match="no such folder, and the hub has no train split"):
        read_dataset("a/b", real_images())
    with pytest.raises(UserError, match="no such file or folder, and not a hub id"):
        read_dataset("runs/a/b", real_images())


def test_labels_outside_the_classes_are_refused(tmp_path: Path) -> None:
    table = hub_dataset([0, 2, 9], None)
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    (tmp_path / "train.parquet").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="not a class number from 0 to 2"):
        read_dataset(str(tmp_path), real_images())


# --- the evaluate command

DIGITS = ["--dataset", "digits", "--num_classes", "2", "--image_size", "8", "--mixed_precision", "no"]
FAST = ["--protocols", "hard", "--students", "convnet1", "--repeats", "1", "--epochs", "1"]


def test_a_folder_is_evaluated_and_gets_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "herding", tmp_path / "out"
    write_folder(source, ("0", "1"), torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8))
    assert evaluate.main([*DIGITS, *FAST, "--distilled_dir", str(source), "--output_dir", str(out)]) == 0
    assert "Labels are the names of the class folders." in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert [row["images"] for row in results["rows"]] == ["distilled", "random real"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{100 * results['rows'][0]['mean']:.1f}" in page and "Labels are the names" in page
    assert json.loads((out / "provenance.json").read_text())["distilled_dir"] == str(source)


def test_rounds_may_be_folders_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, classes in (("first", ("0", "1")), ("second", ("0", "1")), ("third", ("0", "2"))):
        write_folder(tmp_path / name, classes, torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8))
    args = [*DIGITS, *FAST, "--distilled_dir", str(tmp_path / "first"), "--output_dir", str(tmp_path / "out")]
    assert evaluate.main([*args, "--rounds", str(tmp_path / "third")]) == 2
    assert f"--rounds {tmp_path / 'third'}: class folder 2 is not among" in capsys.readouterr().err
    assert evaluate.main([*args, "--rounds", str(tmp_path / "second"), "--baselines"]) == 0
    remarks = json.loads((tmp_path / "out" / "provenance.json").read_text())["remarks"]
    assert remarks == ["Labels are the names of the class folders."]


def test_a_wrong_order_is_refused_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "set", ("0", "1"), distilled().pixels)
    (tmp_path / "set" / "class_names.json").write_text('["1", "0"]')
    monkeypatch.setattr(evaluate_command, "evaluate_students", lambda *_, **__: pytest.fail("trained"))
    out = ["--output_dir", str(tmp_path / "out")]
    assert evaluate.main([*DIGITS, *FAST, "--distilled_dir", str(tmp_path / "set"), *out]) == 2
    assert "the same classes in another order" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "set")
    assert evaluate.main([*DIGITS, *FAST, "--distilled_dir", str(tmp_path / "set"), *out]) == 2
    assert "no such file or folder" in capsys.readouterr().err
