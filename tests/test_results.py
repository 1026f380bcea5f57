"""RESULTS.md: its numbers are those of results.json, nothing is left out or sorted, and what is missing is said."""

from __future__ import annotations

import errno
import json
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from PIL import Image
from results_page.scores import collect

import evaluate
import sample
import train_ldm
from benchmarks import results as benchmark
from ddgen.checkpoint import write_json
from ddgen.commands.history import History
from ddgen.commands.runs import command_line
from ddgen.errors import Stopped
from ddgen.evaluation.protocols import HARD, RDED
from ddgen.evaluation.report import Results, write_results
from ddgen.evaluation.rows import IMAGE_SOURCES, Row
from ddgen.page.run import HISTORY_NAME, PROVENANCE_NAME, read_run
from ddgen.page.times import stage_seconds, time_rows
from ddgen.units import readable_seconds

RDED_REAL = IMAGE_SOURCES[-2]

TRAIN = [
    *["--dataset", "digits", "--image_size", "16", "--num_classes", "2", "--mixed_precision", "no"],
    *["--vae_downsample", "4", "--vae_patch", "4", "--vae_channels", "16", "--vae_train_steps", "4"],
    *["--unet_channels", "32", "32", "--unet_layers_per_block", "1"],
    *["--observer_network", "convnet2", "--observer_epochs", "2", "--observer_batch_size", "32"],
    *["--observer_learning_rate", "0.05", "--train_batch_size", "8", "--max_train_steps", "8"],
    *["--lr_warmup_steps", "2", "--log_every", "1", "--checkpointing_steps", "8", "--num_inference_steps", "2"],
    *["--fid_every", "4", "--fid_num_images", "12", "--fid_num_inference_steps", "2"],
]
COMMANDS = [
    (train_ldm, ["train_ldm.py", *TRAIN, "--output_dir", "{run}"]),
    (sample, ["sample.py", "--run_dir", "{run}", "--ipc", "1", "--candidates_per_image", "3"]),
    (sample, ["sample.py", "--run_dir", "{run}", "--ipc", "2", "--candidates_per_image", "3", "--seed", "5"]),
    (evaluate, ["evaluate.py", "--run_dir", "{run}", "--ipc", "1", "--epochs", "1", "--repeats", "2"]),
    (evaluate, ["evaluate.py", "--run_dir", "{run}", "--ipc", "2", "--epochs", "1", "--repeats", "1"]),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the three commands leave, called as a user calls them."""
    path = tmp_path_factory.mktemp("runs") / "tiny digits"
    with pytest.MonkeyPatch.context() as patch:
        for entry, words in COMMANDS:
            argv = [word.format(run=path) for word in words]
            patch.setattr(sys, "argv", argv)
            assert entry.main(argv[1:]) == 0
    return path


def page(tmp_path: Path, *runs: Path, notes: Path | None = None) -> str:
    extra = ["--notes", str(notes)] if notes is not None else []
    assert benchmark.main([*map(str, runs), "--output", str(tmp_path / "RESULTS.md"), *extra]) == 0
    return (tmp_path / "RESULTS.md").read_text()


def table(text: str, head: str) -> dict[str, list[str]]:
    """The first table whose header begins so: first cell -> the others, with the header under ""."""
    lines = iter(text.splitlines())
    header = next(line for line in lines if line.startswith(f"| {head} |"))
    next(lines)
    rows = [header.replace(f"| {head} |", "|  |", 1)]
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(line)
    cells = [[cell.strip() for cell in row.strip("|").split(" |")] for row in rows]
    return {first: rest for first, *rest in cells}


def row(images: str, *scores: float, protocol: str = "rded", teacher: str | None = "convnet3", **more: object) -> Row:
    made = Row(images, protocol, "convnet3", 300, scores, tuple(0.99 for _ in scores), 1000, 2000, 5.0, teacher)
    return replace(made, **more)  # type: ignore[arg-type]


def evaluation(run_dir: Path, name: str, ipc: int, rows: list[Row], **more: object) -> None:
    found = Results(
        tuple(rows), "cifar10", 10, 10_000, 32, ipc, 10 * ipc, 3, 7, None, True, (("convnet3", 0.8123),), (RDED, HARD),
        "no", "cpu",
    )  # fmt: skip
    path = run_dir / "evaluation" / name / "results.json"
    write_results(replace(found, **more), path)  # type: ignore[arg-type]
    write_json(path.with_name(PROVENANCE_NAME), {"distilled_dir": f"runs/x/distilled/{name}", "command": f"go {name}"})


def test_everything_the_page_tells_of_a_run_is_recorded_by_the_commands(run: Path, tmp_path: Path) -> None:
    text = page(tmp_path, run)
    assert "not recorded" not in text
    commands = text.split("### Commands\n\n```\n")[1].split("\n```")[0].splitlines()
    assert len(commands) == len(COMMANDS)
    assert commands[0].startswith("python train_ldm.py --dataset digits --image_size 16")
    assert commands[0].endswith("--output_dir '/path/to/tiny digits'")
    assert "python sample.py --run_dir '/path/to/tiny digits' --ipc 2 --candidates_per_image 3 --seed 5" in commands
    assert str(run.parent) not in text
    stages = table(text, "stage")
    assert {"observer", "autoencoder and latents", "all of training, with the FD curve", "making ipc1"} < set(stages)
    seconds = stage_seconds(read_run(run).history)
    assert list(seconds) == ["observer", "autoencoder and latents", "diffusion model and its curve"]
    assert stages["all of training, with the FD curve"][0] == readable_seconds(sum(seconds.values()))
    assert "history.jsonl" in stages["all of training, with the FD curve"][1]
    assert re.search(r"; 12 candidates, [\d.]+ a second", stages["making ipc2"][1])  # 2 x 3 of each of 2 classes
    assert re.search(r"- training, making ipc1, students of ipc1, .*: .+, \d+ cores, 1 threads, 1 processes", text)
    assert [cells[-2] for name, cells in table(text, "set").items() if name] == ["0", "5"]  # seeds


def test_scores_are_those_of_results_json(run: Path, tmp_path: Path) -> None:
    scores = table(page(tmp_path, run), "images")
    heads = ["rded (1 epoch), ipc 1", "rded (1 epoch), ipc 2", "hard (1 epoch), ipc 1", "hard (1 epoch), ipc 2"]
    assert scores[""] == heads
    assert list(scores) == ["", "distilled", "random generated", "random real", RDED_REAL]
    for ipc in (1, 2):
        found = json.loads((run / "evaluation" / f"ipc{ipc}" / "results.json").read_text())
        for entry in found["rows"]:
            shown = scores[entry["images"]][heads.index(f"{entry['protocol']} (1 epoch), ipc {ipc}")]
            number = f"{100 * entry['mean']:.1f}"
            assert shown == (number if ipc == 2 else f"{number} ± {100 * entry['std']:.1f} (n = 2)")


def test_the_same_runs_give_the_same_bytes(run: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        page(folder, run)
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*.*")) for folder in folders]
    kinds = ("accuracy-convnet2", "fd", "preview", "samples")
    assert files[0] == files[1] == [Path("RESULTS.md"), *(Path(f"docs/results-tiny-digits-{k}.png") for k in kinds)]
    for name in files[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    text = (folders[0] / "RESULTS.md").read_text()
    assert set(re.findall(r"\]\((docs/.+?)\)", text)) == {path.as_posix() for path in files[0][1:]}


def test_rows_keep_their_order_and_published_numbers_stand_apart(tmp_path: Path) -> None:
    run = tmp_path / "cifar10"
    rows = [row("full real", 0.82), row("random real", 0.53, 0.54, 0.55), row("k-center", 0.3, 0.31, 0.32),
            row("distilled", 0.5, 0.51, 0.52), row(RDED_REAL, 0.7, 0.71, 0.72), row("herding", 0.4, 0.4, 0.4),
            row("distilled", 0.3, 0.31, 0.32, protocol="hard", teacher=None)]  # fmt: skip
    evaluation(run, "ipc10", 10, rows)
    evaluation(run, "ipc1", 1, [row("distilled", 0.2, 0.22, 0.24), row("random real", 0.2, 0.21, 0.22)])
    text = page(tmp_path, run)
    scores = table(text, "images")
    published = "*published RDED (full-scale observer, 82.2)*"
    order = ["", "distilled", "random real", "herding", "k-center", RDED_REAL, "full real", published]
    assert list(scores) == order
    assert scores[""] == ["rded, ipc 1", "rded, ipc 10", "hard, ipc 10"]
    assert scores["distilled"] == ["22.0 ± 2.0", "51.0 ± 1.0", "31.0 ± 1.0"]
    assert scores[published] == ["*23.5*", "*50.2*", ""]
    assert scores["full real"] == ["", "82.0 (n = 1)", ""]
    minus = table(text, "difference, points")
    assert minus["distilled minus random real"] == ["+1.0 within the spread", "-3.0 below", ""]
    assert minus[f"distilled minus {RDED_REAL}"] == ["", "-20.0 below", ""]
    assert "0.99" not in text and "99.0" not in text  # the best epoch
    assert "- rded real: crops of real images, distilled by RDED" in text
    assert "seed 7" in text and "Teacher convnet3: 81.2 on the same test images" in text


@pytest.mark.parametrize(
    "changed",
    [{"epochs_override": 30}, {"num_classes": 5}, {"dataset": "cifar100"}, {"image_size": 64}],
    ids=lambda changed: next(iter(changed)),
)
def test_published_numbers_are_not_shown_beside_other_experiments(changed: dict[str, object], tmp_path: Path) -> None:
    evaluation(tmp_path / "run", "ipc10", 10, [row("distilled", 0.5)], **changed)
    assert "50.2" not in page(tmp_path, tmp_path / "run")
    evaluation(tmp_path / "same", "ipc10", 10, [row("distilled", 0.5)], epochs_override=300)  # rded's own
    assert "50.2" in page(tmp_path, tmp_path / "same")
    evaluation(tmp_path / "other", "ipc10", 10, [row("distilled", 0.5, teacher="resnet18")])
    assert "50.2" not in page(tmp_path, tmp_path / "other")


def test_other_sets_and_contradicting_scores_are_told_apart(tmp_path: Path) -> None:
    run = tmp_path / "cifar10"
    evaluation(run, "ipc10", 10, [row("distilled", 0.5, 0.52), row("random real", 0.4, 0.42)])
    evaluation(run, "ipc10-herding", 10, [row("distilled", 0.6, 0.62), row("random real", 0.4, 0.42)])
    evaluation(run, "ipc10-second", 10, [row("distilled", 0.1, 0.12), row("random real", 0.45, 0.47)])
    scores = table(page(tmp_path, run), "images")
    shown = {name: cells[0] for name, cells in scores.items() if name and "published" not in name}
    assert shown == {
        "distilled": "51.0 ± 1.4", "distilled (herding)": "61.0 ± 1.4", "distilled (second)": "11.0 ± 1.4",
        "random real": "41.0 ± 1.4", "random real [ipc10-second]": "46.0 ± 1.4",
    }  # fmt: skip


def test_what_earlier_runs_did_not_record_is_said_to_be_missing(tmp_path: Path) -> None:
    run = tmp_path / "old"
    evaluation(run, "ipc10", 10, [row("distilled", 0.5)])
    old = json.loads((run / "evaluation/ipc10/results.json").read_text())
    for name in ("teachers", "protocols", "num_images"):
        del old[name]
    for entry in old["rows"]:
        del entry["teacher"]
    write_json(run / "evaluation/ipc10/results.json", old | {"teacher": "convnet3", "teacher_accuracy": 0.5})
    (run / "evaluation/ipc10" / PROVENANCE_NAME).unlink()
    (run / "config.yaml").write_text("seed: 3\nmax_train_steps: 100\ntrain_batch_size: 20\n")
    write_json(run / "dataset.json", {"name": "cifar10", "num_images": 1000, "fingerprint": "abc"})
    text = page(tmp_path, run)
    assert "# train_ldm.py: not recorded\n# evaluating ipc10: not recorded" in text
    assert table(text, "stage")["observer"] == ["not recorded", ""]
    trained = table(text, "what was trained")
    assert trained["seed of training"] == ["3"] and trained["observer"] == ["not recorded"]
    assert trained["diffusion model"] == ["not recorded; 100 steps of 20: 2,000 images, 2.0 epochs"]
    assert "students of ipc10: cpu, of which kind not recorded" in text and "versions not recorded" in text
    assert table(text, "images")["distilled"] == ["50.0"] and "Teacher convnet3: 50.0" in text


def test_the_generators_card_tells_what_history_does_not(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = "| device | A big one |\n| numbers | bf16 |\n| versions | torch 9 |"
    card = f"{rows}\n\nMade with\n\n```\npython train_ldm.py -x\n```"
    (run / "generator").mkdir(parents=True)
    (run / "generator" / "README.md").write_text(card)
    (run / "config.yaml").write_text("vae: /home/me/Ann's vae\nobserver: hub/observer\n")
    write_json(run / "observer" / "config.json", {"network": "convnet3", "accuracy": 0.5})
    text = page(tmp_path, run)
    assert "Not evaluated" in text
    assert "- training: A big one, cores, threads and processes not recorded, mixed precision bf16; torch 9" in text
    assert "```\npython train_ldm.py -x\n```" in text
    assert "given (`/path/to/Ann's vae`), not trained in this run" in text and "/home/me" not in text
    assert "given (`hub/observer`), not trained" in text
    assert table(text, "stage")["observer"] == ["none", "given"]
    start = {"event": "start", "command": "python -m ddgen observer", "made_with": {}}
    stages = [{"event": "stage", "stage": "observer", "seconds": seconds} for seconds in (30.0, 12.0)]
    lines = [json.dumps(line) for line in (start, stages[0], start, stages[1], {"event": "finish"})]
    (run / "observer" / HISTORY_NAME).write_text("\n".join(lines) + "\n")
    text = page(tmp_path, run)
    assert table(text, "stage")["observer"] == ["42 s", "trained alone, observer/history.jsonl"]
    assert "```\npython -m ddgen observer\npython train_ldm.py -x\n```" in text
    assert ("observer", "42 s", "trained alone, observer/history.jsonl") in time_rows(read_run(run))


def test_the_observers_time_is_its_stage_of_the_run_with_what_was_measured_after_each_epoch(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "observer_metrics.jsonl").write_text('{"epoch": 1, "seconds": 20.0}\n')
    (run / "config.yaml").write_text("seed: 0\n")
    assert table(page(tmp_path, run), "stage")["observer"] == ["20 s", "1 epoch, observer_metrics.jsonl"]
    start = {"event": "start", "command": "train_ldm.py", "made_with": {}}
    lines = [start, {"event": "stage", "stage": "observer", "seconds": 25.0}, {"event": "finish"}]
    (run / HISTORY_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert table(page(tmp_path, run), "stage")["observer"] == ["25 s", "history.jsonl"]
    (run / "config.yaml").write_text("seed: 0\nobserver: other/observer\n")  # then the stage is reading it
    (run / "observer_metrics.jsonl").unlink()
    assert table(page(tmp_path, run), "stage")["observer"] == ["none", "given"]


def test_two_runs_and_what_people_wrote(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "more" / run.name
    evaluation(other, "ipc10", 10, [row("distilled", 0.5)])
    notes = tmp_path / "notes.md"
    notes.write_text("We are behind at ipc 50.\n\n| by hand | 1 |\n")
    text = page(tmp_path, other, run, notes=notes)
    assert "## Reading\n\nWe are behind at ipc 50.\n\n| by hand | 1 |\n\n" in text
    names = [line for line in text.splitlines() if line.startswith(("- [", "## "))]
    assert names == [
        "- [tiny-digits: cifar10](#tiny-digits)", "- [tiny-digits-2: digits](#tiny-digits-2)",
        "## Reading", "## tiny-digits: cifar10", "## tiny-digits-2: digits",
    ]  # fmt: skip
    assert (tmp_path / "docs" / "results-tiny-digits-2-fd.png").is_file()


def test_rank_correlations_are_told_with_their_intervals(tmp_path: Path) -> None:
    evaluation(tmp_path / "run", "ipc10", 10, [row("distilled", 0.5)])
    path = tmp_path / "run" / "evaluation" / "ipc10" / "results.json"
    known, none = {"value": 0.814, "low": 0.2, "high": 0.95}, {"value": None, "low": None, "high": None}
    sets = [{"images": "distilled", "epochs": 300, "spearman": known, "kendall": none}]
    ranking = {"protocol": "rded", "candidates": [{}] * 9, "real_epochs": 30, "sets": sets, "seconds": 200.0,
               "diverged": ["vit, on random real"]}  # fmt: skip
    write_json(path, json.loads(path.read_text()) | {"ranking": ranking})
    text = page(tmp_path, tmp_path / "run")
    assert "| distilled | 300 | 0.81 | 0.20 to 0.95 | none |  |" in text and "order 9 candidates" in text
    assert "- vit, on random real: the loss diverged, which counts as chance." in text
    assert table(text, "stage")["ranking candidates by ipc10"] == ["3 min", "results.json"]


def test_a_large_preview_is_made_smaller(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "distilled" / "ipc10"
    made = {"recipe": {"sampler": "unipc, 8 steps", "guidance": "none", "steering": "to 10 modes of each class"}}
    facts = {"ipc": 10, "num_images": 100, "image_bytes": 1, "soft_label_bytes": 2, "provenance": made}
    write_json(folder / "manifest.json", facts)
    Image.effect_noise((1280, 800), 90).convert("RGB").save(folder / "preview.png")
    text = page(tmp_path, tmp_path / "run")
    with Image.open(tmp_path / "docs" / "results-run-preview.png") as small:
        assert small.size == (640, 400) and small.mode == "P"
    assert "Made smaller" in text
    assert table(text, "set")["ipc10"][4] == "unipc, 8 steps; none; steered to 10 modes of each class"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "RUN: none given"),
        (["{tmp}/nowhere"], "RUN {tmp}/nowhere: nothing of a run in it"),
        (["{tmp}/run", "--notes", "{tmp}/none.md"], "--notes {tmp}/none.md: no such file"),
        (["{tmp}/run", "--output", "{tmp}"], "--output {tmp}: a folder"),
        (["{tmp}/bad"], "RUN: {tmp}/bad/dataset.json is damaged"),
    ],
    ids=["none", "nowhere", "notes", "output", "damaged"],
)
def test_mistakes_are_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "run" / "dataset.json", {})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "dataset.json").write_text("{")
    assert benchmark.main([word.format(tmp=tmp_path) for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("results: " + message.format(tmp=tmp_path)) and error.count("\n") == 1


def test_history_counts_all_starts_and_says_what_was_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, again, last = (History(run, Accelerator(cpu=True), "no") for _ in range(3))
    first.start()
    first.add_stage("observer", 10.0)
    with pytest.raises(Stopped), first.stage("diffusion model and its curve"):
        raise Stopped("stopped", signal.SIGTERM)
    again.start()
    again.add_stage("observer", 0.5)  # killed after it
    last.start()
    last.add_stage("observer", 0.5)
    last.finish()
    lines = [json.loads(line) for line in (run / HISTORY_NAME).read_text().splitlines()]
    events = " ".join(line["event"] for line in lines)
    assert events == "start stage stage start stage start stage finish"
    assert lines[2]["done"] is False and lines[1]["done"] is True
    write_json(run / "dataset.json", {"name": "x"})
    assert stage_seconds(read_run(run).history)["observer"] == 11.0
    whole = table(page(tmp_path, run), "stage")["all of training, with the FD curve"]
    assert whole == ["11 s", "history.jsonl, in 3 starts; the last stage of 1 killed not counted"]


def test_what_stops_a_stage_is_told_on_a_full_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(tmp_path, Accelerator(cpu=True), "no")

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ddgen.commands.history.write_bytes", full)
    with pytest.raises(Stopped), history.stage("observer"):
        raise Stopped("stopped at step 3", signal.SIGTERM)
    with pytest.raises(OSError, match="No space left"), history.stage("observer"):
        pass


def test_commands_are_written_as_they_were_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["/venv/ddgen/__main__.py", "distill", "--data_dir", "my photos"])
    assert command_line() == "python -m ddgen distill --data_dir 'my photos'"
    monkeypatch.setattr(sys, "argv", ["/venv/bin/ddgen", "label"])
    assert command_line() == "ddgen label"
    monkeypatch.setattr(sys, "argv", ["train_ldm.py", "--seed", "1"])
    assert command_line() == "python train_ldm.py --seed 1"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert command_line() == "accelerate launch train_ldm.py --seed 1"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert command_line() == "accelerate launch --num_processes 4 --cpu train_ldm.py --seed 1"


def test_columns_of_other_epochs_stand_in_order_of_images_and_share_a_picture(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = [row("distilled", 0.5), row("distilled", 0.4, protocol="hard", teacher=None)]
    evaluation(run, "ipc1", 1, [*rows, row("random real", 0.45)], epochs_override=250)
    equal = row("random real", 0.5004)  # a little above: no difference has a sign to it, once rounded
    evaluation(run, "ipc10", 10, [*rows, equal], epochs_override=100)
    (scores,) = collect(read_run(run))
    found = [[(column[0].protocol, column[1], column[0].epochs) for column in panel] for panel in scores.panels]
    assert found == [[("rded", 1, 250), ("rded", 10, 100)], [("hard", 1, 250), ("hard", 10, 100)]]
    text = page(tmp_path, run)
    assert table(text, "difference, points")["distilled minus random real"] == ["+5.0", "+0.0", "", ""]
    assert "A difference without a word is one whose spread is not known" in text
    evaluation(run, "ipc10-longer", 10, rows[:1], epochs_override=200)  # two lengths at one ipc: a picture each
    (scores,) = collect(read_run(run))
    found = [[(column[1], column[0].epochs) for column in panel] for panel in scores.panels]
    assert found == [[(1, 250)], [(10, 100)], [(10, 200)], [(1, 250), (10, 100)]]


def test_one_point_is_no_curve_and_the_last_samples_are_shown(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    write_json(run / "dataset.json", {"name": "x"})
    (run / "config.yaml").write_text("guidance_scale: 2.0\nguidance_interval: [0.2, 0.9]\n")
    lines = [f'{{"step": {step}, "fd_x_10/ema_0.1": {value}}}\n' for step, value in ((4, 3.5), (8, 2.5))]
    for number, colour in ((4, "red"), (8, "blue")):
        Image.new("RGB", (40, 20), colour).save(run / "samples" / f"step-{number:08d}.png")
        (run / "metrics.jsonl").write_text("".join(lines[: number // 4]))
        text = page(tmp_path, run)
        assert ("![FD curve](docs/results-run-fd.png)" in text) == (number == 8)
        assert "no choice made, classifier-free guidance 2 in 0.2 to 0.9" in text
        assert f"Lowest `fd_x_10`: {3.5 if number == 4 else 2.5} at step {number}" in text
        with Image.open(tmp_path / "docs" / "results-run-samples.png") as shown:
            assert shown.size == (40, 20) and shown.getpixel((5, 5)) == ((255, 0, 0) if number == 4 else (0, 0, 255))


def test_the_readmes_scores_are_those_of_the_results() -> None:
    root = Path(__file__).parents[1]
    readme, results = (root / "README.md").read_text(), (root / "RESULTS.md").read_text()
    names = {"RDED on real images (crops)": RDED_REAL}
    for head, network in (("CIFAR-10, ConvNet-3", "convnet3"), ("Tiny ImageNet, ten classes, ConvNet-4", "convnet4")):
        measured = table(results[results.index(f"### Accuracy of {network}\n") :], "images")
        shown = table(readme, head)
        assert shown.pop("") == [f"{labels}, {ipc}" for labels in ("soft", "hard") for ipc in (1, 10, 50)]
        assert len(shown) == 4
        for name, cells in shown.items():
            assert cells == [re.sub(r" \(n = \d+\)", "", cell) for cell in measured[names.get(name, name)]], name
