"""The study of rules and labels: what it takes for measured, and which pools it takes for the same."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks import study
from benchmarks.study import FIGURES, Row, Settings, Study, in_turn, pool_name, read_results, table, write_report
from ddgen.errors import UserError

IDENTITY = {"seed": 0, "ipcs": (1, 2)}  # a tuple is a list in the file


def write(path: Path, row: Row, identity: dict[str, Any] = IDENTITY, **measured: float) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"identity": identity, **asdict(row), **measured}) + "\n")


def test_only_students_of_the_wanted_epochs_count_whichever_process_wrote_them(tmp_path: Path) -> None:
    row, other = Row("crops", "realism", "online", 10, 0), Row("crops", "random", "online", 10, 0)
    write(tmp_path / "results-0.jsonl", row, epochs=300, accuracy=0.5)
    write(tmp_path / "results-1.jsonl", row, epochs=30, accuracy=0.3)  # of an earlier start
    guided = replace(row, guidance=3.0)
    write(tmp_path / "results-1.jsonl", guided, epochs=30, accuracy=0.2)
    write(tmp_path / "results-1.jsonl", other, identity=IDENTITY | {"seed": 1}, epochs=300, accuracy=0.4)
    for epochs, accuracy in ((300, 0.5), (30, 0.3)):
        found = read_results(tmp_path, IDENTITY, lambda ipc, epochs=epochs: epochs if ipc == 10 else 1)
        assert found.pop(guided, None) == ({"epochs": 30, "accuracy": 0.2} if epochs == 30 else None)
        assert found == {row: {"epochs": epochs, "accuracy": accuracy}}
    assert read_results(tmp_path, IDENTITY, lambda ipc: 7) == {}
    with open(tmp_path / "results-1.jsonl", "a", encoding="utf-8") as file:
        file.write('{"identity": {"se')  # killed while writing
    assert set(read_results(tmp_path, IDENTITY, lambda ipc: 300)) == {row}


def test_a_pool_is_of_everything_that_its_images_depend_on() -> None:
    settings = Settings()
    for pool, changes in (
        ("generated", [{"seed": 1}, {"pool_size": 30}]),
        ("autoguided", [{"seed": 1}, {"guide": "runs/a"}, {"guide": "runs/b"}]),
        ("steered", [{"seed": 1}, {"modes": 50}]),
    ):
        names = {pool_name(replace(settings, **change), pool, 0) for change in ({}, *changes)}  # type: ignore[arg-type]
        assert len(names | {pool_name(settings, pool, 1)}) == len(changes) + 2  # type: ignore[arg-type]
    assert len({pool_name(settings, "generated", 0, scale) for scale in (None, 1.0, 1.5, 2.0)}) == 4
    assert pool_name(settings, "generated", 0) == pool_name(replace(settings, guide="x", modes=3), "generated", 0)


def test_the_report_is_of_what_was_asked_with_all_repeats_that_there_are(tmp_path: Path) -> None:
    asked = cast(Study, object.__new__(Study))
    asked.settings = Settings(
        studies=("selection",), pools=("crops",), rules=("realism", "random"), ipcs=(1,), epochs=(5,), repeats=1
    )
    asked.root, asked.student, asked.train = tmp_path, "convnet3", cast(Any, SimpleNamespace(name="some"))
    others = [
        Row("whole", "random", "online", 1, 0), Row("crops", "herding", "online", 1, 0),
        Row("crops", "realism", "online", 10, 0), Row("crops", "realism", "class number", 1, 0),
        Row("crops", "random", "online", 1, 0, 3.0),
    ]  # fmt: skip
    figures = dict.fromkeys(FIGURES, 0.5)
    done = {row: {"accuracy": 0.99, **figures} for row in others}
    done |= {Row("crops", "realism", "online", 1, i): {"accuracy": a, **figures} for i, a in enumerate((0.2, 0.3, 0.4))}
    done[Row("crops", "random", "online", 1, 0)] = {"accuracy": 0.25, **figures}
    write_report(asked, done)
    text = (tmp_path / "selection.md").read_text()
    assert text.splitlines()[0].startswith("some, convnet3, epochs 5 at ipc 1, 1 to 3 pools and students each;")
    assert "| rule | crops, ipc 1 |\n| --- | --: |\n| realism | **30.0** ± 10.0 |\n| random | 25.0 |\n" in text
    assert "99.0" not in text and (tmp_path / "selection.png").stat().st_size > 1000


def test_labels_stand_in_one_order_whichever_was_measured_first() -> None:
    order = ["online, epoch 2", "online, epoch 10", "online", "one soft label, epoch 1", "class number"]
    done = {Row("crops", "herding", labels, 1, 0): {"accuracy": 0.5} for labels in reversed(order)}
    lines = table(done, "labels").splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["labels", "---", *order]


def test_the_command_starts_the_processes_it_was_launched_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked() -> None:
        raise UserError("two processes")

    monkeypatch.setattr(study, "start_asked_for_processes", asked)
    monkeypatch.setattr("sys.argv", ["study.py"])
    assert study.main() == 2
    assert "study: two processes" in capsys.readouterr().err


def test_processes_begin_with_different_pools_and_all_look_at_every_row() -> None:
    rows = [
        Row(pool, rule, "online", 10, repeat)  # type: ignore[arg-type]
        for repeat in (0, 1) for rule in ("realism", "random") for pool in ("crops", "autoguided")
    ]  # fmt: skip
    assert in_turn(rows, 0, 1) == list(range(8))
    orders = [in_turn(rows, process, 4) for process in range(4)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    pools = [[(rows[number].pool, rows[number].repeat) for number in order] for order in orders]
    assert len({pool for pool, *_ in pools}) == 4
    assert all(pool[0::2] == pool[1::2] for pool in pools)  # done with a pool before another is scored
