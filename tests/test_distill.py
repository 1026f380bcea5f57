from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ddgen.distill.dataset import DistilledDataset, encode_png, folder_names, read_manifest, update_results
from ddgen.distill.preview import MAX_COLUMNS, MAX_ROWS, draw_preview, percent
from ddgen.distill.relabel import soft_labels
from ddgen.distill.select import select_most_realistic, select_random
from ddgen.errors import UserError
from ddgen.seeds import derive

SIZE = 8
NAMES = ("bullet_train", "cat", "dog")


def make_distilled(class_names: tuple[str, ...] = NAMES, ipc: int = 2, **changes: object) -> DistilledDataset:
    k, n = len(class_names), len(class_names) * ipc
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(k).repeat_interleave(ipc)
    logits = torch.randn(n, k, generator=generator) + 4 * torch.nn.functional.one_hot(labels, k)
    values = {
        "pixels": torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator),
        "labels": labels,
        "soft_labels": soft_labels(logits, 1.0),
        "realism": -logits.log_softmax(1)[torch.arange(n), labels],
        "seeds": torch.full((n,), derive(7, "candidate")),
        "indices": torch.arange(n) * 3,
        "class_names": class_names,
        "provenance": {
            "dataset": "toys",
            "licence": "CC0-1.0",
            "command": "python sample.py --ipc 2",
            "num_source_images": 1234,
            "recipe": {"guidance_scale": 1.5, "guidance_interval": [0.3, 0.85]},
        },
    }
    return DistilledDataset(**(values | changes))  # type: ignore[arg-type]


# --- selection and labels


def test_the_lowest_losses_are_kept_in_order_whatever_the_order_of_candidates() -> None:
    losses = torch.tensor([0.5, 0.1, 0.3, 0.1, 2.0])
    assert select_most_realistic(losses, 3).tolist() == [1, 3, 2]

    shuffle = torch.tensor([3, 4, 0, 1, 2])
    kept = select_most_realistic(losses[shuffle], 3, indices=shuffle)
    assert shuffle[kept].tolist() == [1, 3, 2]


def test_random_selection_is_nested_repeatable_and_differs_between_classes_and_seeds() -> None:
    ten, fifty = select_random(200, 10, 3, 0), select_random(200, 50, 3, 0)
    assert fifty[:10].tolist() == ten.tolist() == select_random(200, 10, 3, 0).tolist()
    assert len(set(fifty.tolist())) == 50
    assert ten.tolist() != select_random(200, 10, 3, 1).tolist()
    assert ten.tolist() != select_random(200, 10, 4, 0).tolist()


def test_selection_refuses_too_few_candidates_and_losses_that_are_no_numbers() -> None:
    with pytest.raises(UserError, match="--ipc 5: only 4 candidates of a class; raise --candidates_per_image"):
        select_most_realistic(torch.rand(4), 5)
    with pytest.raises(UserError, match="--ipc 0"):
        select_random(4, 0, 0, 0)
    with pytest.raises(ValueError, match="not finite"):
        select_most_realistic(torch.tensor([0.1, float("nan")]), 1)


def test_soft_labels_are_the_tempered_softmax() -> None:
    logits = torch.tensor([[2.0, 0.0, -2.0], [1e4, 0.0, -1e4]])
    exp = np.exp([1.0, 0.0, -1.0])
    labels = soft_labels(logits, 2.0)
    assert labels.dtype == torch.float16
    np.testing.assert_allclose(labels[0].float(), exp / exp.sum(), atol=3e-4)
    assert labels[1].tolist() == [1.0, 0.0, 0.0]
    many = soft_labels(torch.randn(4, 1000), 20.0)
    torch.testing.assert_close(many.float().sum(1), torch.ones(4), rtol=0, atol=1e-3)


def test_soft_labels_refuse_bad_temperatures_and_logits() -> None:
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--soft_label_temperature"):
            soft_labels(torch.zeros(1, 2), temperature)
    with pytest.raises(ValueError, match="not finite"):
        soft_labels(torch.tensor([[0.0, float("inf")]]), 1.0)


# --- the folder


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    saved = make_distilled()
    saved.save(tmp_path / "out")
    loaded = DistilledDataset.load(tmp_path / "out")
    for name in ("pixels", "labels", "soft_labels", "realism", "seeds", "indices"):
        torch.testing.assert_close(getattr(loaded, name), getattr(saved, name), rtol=0, atol=0)
    assert (loaded.class_names, loaded.provenance) == (saved.class_names, saved.provenance)


READ_WITHOUT_DDGEN = """
import json, sys, warnings
warnings.simplefilter("error")
sys.modules["ddgen"] = None
import datasets, numpy as np, torchvision
from safetensors.torch import load_file
root = sys.argv[1]
rows = datasets.load_dataset(root)
images = torchvision.datasets.ImageFolder(root + "/train")
soft = load_file(root + "/soft_labels.safetensors")["soft_labels"]
print(json.dumps({
    "splits": list(rows), "names": rows["train"].features["label"].names, "labels": rows["train"]["label"][:],
    "folder_labels": images.targets, "folders": images.classes, "columns": rows["train"].column_names,
    "same_pixels": all(np.array_equal(a["image"], b) for a, (b, _) in zip(rows["train"], images, strict=True)),
    "pixels": np.asarray(images[0][0]).tolist(),
    "soft_type": str(rows["train"].features["soft_label"]),
    "soft": rows["train"].with_format("numpy")["soft_label"][:].astype("float64").tolist(),
    "soft_file": soft.double().tolist(),
    "realism": rows["train"]["realism"][:], "seed": rows["train"]["seed"][:], "index": rows["train"]["index"][:],
}))
"""


def run_python(code: str, *args: str, cwd: Path, cache: Path) -> str:
    """Runs code in a fresh process without this repository on its path, and without a network."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets")}
    command = [sys.executable, "-c", code, *args]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("class_names", [NAMES, ("bullet_train",), ("truck", "a/b\\c", "Truck", "9", "10")])
def test_others_load_the_folder_without_ddgen(tmp_path: Path, class_names: tuple[str, ...]) -> None:
    distilled = make_distilled(class_names)
    distilled.save(tmp_path / "out")
    found = json.loads(run_python(READ_WITHOUT_DDGEN, str(tmp_path / "out"), cwd=tmp_path, cache=tmp_path / "cache"))

    assert found["splits"] == ["train"]
    assert found["names"] == list(class_names)
    assert found["labels"] == found["folder_labels"] == distilled.labels.tolist()
    assert found["folders"] == list(folder_names(class_names)) == read_manifest(tmp_path / "out")["folder_names"]
    assert found["columns"] == ["image", "label", "soft_label", "realism", "seed", "index"]
    assert found["same_pixels"]
    assert found["pixels"] == distilled.pixels[0].permute(1, 2, 0).tolist()
    assert "float16" in found["soft_type"]
    assert found["soft"] == found["soft_file"] == distilled.soft_labels.double().tolist()
    assert found["realism"] == distilled.realism.tolist()
    assert (found["seed"], found["index"]) == (distilled.seeds.tolist(), distilled.indices.tolist())


def test_the_code_on_the_card_runs(tmp_path: Path) -> None:
    make_distilled().save(tmp_path / "out")
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    code = "\n".join([*blocks, "print(sorted(example), len(images), soft_labels.shape, label)"])
    code = code.replace("path/to/this/folder", str(tmp_path / "out"))
    printed = run_python(code, cwd=tmp_path, cache=tmp_path / "cache")
    assert printed.strip() == "['image', 'index', 'label', 'realism', 'seed', 'soft_label'] 6 torch.Size([6, 3]) 0"


def test_folder_names_sort_into_the_class_order() -> None:
    assert folder_names(NAMES) == NAMES
    assert folder_names([str(i) for i in range(10)]) == tuple("0123456789")
    awkward = [
        ["0", "1", "10", "9", "2"],
        ["b", "a"],
        ["A", "a"],
        ["con", "x"],
        ["a.", "b"],
        ["", "b"],
        ["á", "í"],
        ["../x", "y"],
    ]
    for names in awkward:
        folders = folder_names(names)
        assert sorted(folders) == list(folders)
        assert all(folder.startswith(f"{label:03d}_") for label, folder in enumerate(folders))
        assert not any(set(folder) & set("/\\: .") for folder in folders)
    assert folder_names([f"c{i}" for i in range(1001)])[1000] == "1000_c1000"


def test_the_same_dataset_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_distilled().save(tmp_path / name)
    files = [
        {p.relative_to(r): p.read_bytes() for p in r.rglob("*") if p.is_file()}
        for r in (tmp_path / "a", tmp_path / "b")
    ]
    assert files[0] == files[1]
    assert {str(path) for path in files[0] if path.parts[0] != "train"} == {
        "README.md",
        "class_names.json",
        "data/train-00000-of-00001.parquet",
        "manifest.json",
        "preview.png",
        "soft_labels.safetensors",
    }


@pytest.mark.parametrize("victim", ["train/cat/00001.png", "soft_labels.safetensors", "class_names.json"])
def test_changed_and_missing_files_are_found(tmp_path: Path, victim: str) -> None:
    make_distilled().save(tmp_path / "out")
    file = tmp_path / "out" / victim
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(victim) + " is not what the manifest says"):
        DistilledDataset.load(tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match=re.escape(victim) + " is missing"):
        DistilledDataset.load(tmp_path / "out")


def test_a_folder_that_is_no_distilled_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--distilled_dir .*: no manifest.json there"):
        DistilledDataset.load(tmp_path)
    for content, message in [("{", "is damaged"), ("{}", "not a distilled dataset's")]:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=message):
            DistilledDataset.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "ddgen-distilled-dataset", "format_version": 2}')
    with pytest.raises(UserError, match="format version 2, this ddgen reads 1"):
        DistilledDataset.load(tmp_path)


def test_existing_folders_are_replaced_only_when_told_and_only_distilled_ones(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_distilled(ipc=3).save(out)
    with pytest.raises(UserError, match=r"--output_dir .*: exists already; .*--overwrite"):
        make_distilled().save(out)
    assert len(DistilledDataset.load(out)) == 9
    make_distilled().save(out, overwrite=True)
    assert len(DistilledDataset.load(out)) == 6

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(UserError, match="--overwrite leaves it alone"):
        make_distilled().save(tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_the_manifest_counts_the_bytes(tmp_path: Path) -> None:
    distilled = make_distilled()
    distilled.save(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest["image_bytes"] == sum(p.stat().st_size for p in (tmp_path / "out" / "train").rglob("*.png"))
    assert manifest["soft_label_bytes"] == distilled.soft_label_bytes == 6 * 3 * 2
    assert manifest["files"].keys() == {
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()
    } - {"manifest.json"}


def test_wrong_parts_are_refused() -> None:
    good = make_distilled()
    wrong = [
        ("pixels", good.pixels.float()),
        ("soft_labels", good.soft_labels[:, :2]),
        ("labels", good.labels.flip(0)),
        ("labels", torch.zeros_like(good.labels)),
        ("realism", good.realism / 0),
    ]
    for name, value in wrong:
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(good, **{name: value})


def test_png_is_lossless() -> None:
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    with Image.open(io.BytesIO(encode_png(pixels))) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels.permute(1, 2, 0).numpy())


# --- the card


def read_card(root: Path) -> tuple[dict[str, object], str]:
    _, header, text = (root / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


def test_the_card_tells_what_the_dataset_is(tmp_path: Path) -> None:
    distilled = make_distilled()
    distilled.save(tmp_path / "out")
    header, text = read_card(tmp_path / "out")
    assert header["license"] == "cc0-1.0"
    assert header["task_categories"] == ["image-classification"]
    probability = torch.exp(-distilled.realism).mean()
    for expected in (
        "# toys, distilled to 2 images per class",
        "**6 generated images** of 3 classes, 8 x 8 pixels",
        "stand in for 1,234 real ones",
        f"with {probability:.1%} probability on average",
        "| guidance_interval | 0.3, 0.85 |",
        "python sample.py --ipc 2\n",
        "Licence of that source: CC0-1.0.",
        "0 `bullet_train`, 1 `cat`, 2 `dog`",
        "| soft labels (float16) | 36 B | 36 |",
        "Not evaluated yet",
        "![Images of the dataset, one class per row](preview.png)",
    ):
        assert expected in text


def test_a_licence_the_hub_does_not_know_is_spelled_out(tmp_path: Path) -> None:
    make_distilled(provenance={"licence": "research only: ask the authors"}).save(tmp_path / "out")
    header, text = read_card(tmp_path / "out")
    assert (header["license"], header["license_details"]) == ("other", "research only: ask the authors")
    make_distilled(provenance={}).save(tmp_path / "none")
    header, text = read_card(tmp_path / "none")
    assert header["license"] == "unknown"
    assert "Licence of that source: unknown." in text


def test_results_are_put_into_the_card_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_distilled().save(out)
    row = {"images": "distilled", "protocol": "rded", "student": "convnet3", "epochs": 300, "best_epoch_mean": 0.92}
    pair = row | {"scores": (0.91, 0.9154), "mean": 0.9127, "std": 0.004}
    single = row | {"images": "random real", "scores": (0.1,), "mean": 0.1, "std": None}
    update_results(out, {"rows": [row | {"scores": (0.5,), "mean": 0.5, "std": None}]})
    teacher, changed = {"teachers": {"convnet3": 0.985}}, {"epochs_override": 7, "epochs_changed": ["rded"]}
    update_results(out, {"rows": [pair, single], "num_test": 1797, "seed": 4} | changed | teacher)
    text = (out / "README.md").read_text(encoding="utf-8")
    for expected in (
        "on the 1,797 real test images; mean ± standard deviation of 2 students, seed 4.",
        "| distilled | rded | convnet3 | 300 | 91.3 ± 0.4 | (92.0) |",
        "| random real | rded | convnet3 | 300 | 10.0 | (92.0) |",
        "`--epochs 7`, not the epochs of rded: not comparable",
        "a convnet3, itself 98.5 on",
    ):
        assert expected in text
    assert text.count("## Results") == 1
    assert "Not evaluated" not in text
    assert "50.0" not in text
    assert read_manifest(out)["files"]["README.md"]["bytes"] == len(text.encode())

    (out / "README.md").write_text("# My own words\n", encoding="utf-8")
    update_results(out, {"rows": [single]})
    assert (out / "README.md").read_text(encoding="utf-8").startswith("# My own words\n\n## Results\n")
    DistilledDataset.load(out)


# --- the preview


def test_the_preview_has_a_row_per_class_and_the_images_pixel_for_pixel(tmp_path: Path) -> None:
    colours = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250]], dtype=torch.uint8).repeat_interleave(2, 0)
    pixels = colours[:, :, None, None].expand(6, 3, 32, 32)
    recognised = torch.tensor([True, True, True, False, True, True])
    picture = draw_preview(
        pixels, torch.arange(3).repeat_interleave(2), torch.full((6,), 0.1), recognised, NAMES, "toys"
    )
    array = np.asarray(picture).astype(int)
    places = [np.argwhere((array == colour.numpy()).all(-1)) for colour in colours[::2]]
    assert [len(place) for place in places] == [2 * 96 * 96] * 3
    assert places[0][:, 0].max() < places[1][:, 0].min()
    assert places[1][:, 0].max() < places[2][:, 0].min()
    assert min(place[:, 1].min() for place in places) > 60
    reddish = np.argwhere((array[..., 0] - array[..., 1] > 100) & (array[..., 0] < 200))
    assert len(reddish) > 0
    assert (reddish[:, 0] > places[1][:, 0].max()).all()
    assert (reddish[:, 0] < places[2][:, 0].min()).all()


def test_the_preview_of_many_large_images_stays_small() -> None:
    k, ipc = 50, 12
    labels = torch.arange(k).repeat_interleave(ipc)
    pixels = torch.zeros(1, 3, 256, 256, dtype=torch.uint8).expand(k * ipc, 3, 256, 256)
    names = [f"a class with a name far too long to be put beside its images {i}" for i in range(k)]
    picture = draw_preview(pixels, labels, torch.zeros(k * ipc), labels >= 0, names, "large")
    assert picture.width < 300 + MAX_COLUMNS * 140
    assert picture.height < 120 + MAX_ROWS * 160
    black = (np.asarray(picture) == 0).all(-1).sum()
    assert black == MAX_ROWS * MAX_COLUMNS * 128 * 128


def test_percent_keeps_doubt() -> None:
    values = [1.0, 0.9999, 0.998, 0.97, 0.5, 0.002, 0.0]
    assert [percent(value) for value in values] == ["100%", "100%", "99.8%", "97%", "50%", "<1%", "0%"]
