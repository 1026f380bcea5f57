"""Writing: whole or not at all, and never the old one gone before the new one is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ddgen.checkpoint import (
    atomic_dir,
    checkpoint_dir,
    latest_checkpoint,
    prune_checkpoints,
    read_json,
    write_bytes,
    write_json,
)
from ddgen.errors import UserError


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with atomic_dir(path) as temporary:
        (temporary / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with atomic_dir(path) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(OSError, match="no space"), atomic_dir(path, replace=True) as temporary:
        (temporary / "a").write_text("new")
        raise OSError("no space")
    assert (path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "a").write_text("old")
    with pytest.raises(FileExistsError), atomic_dir(path):
        pass
    with atomic_dir(path, replace=True) as temporary:
        (temporary / "b").write_text("new")
    assert [p.name for p in path.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_failed_exchange_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "a").write_text("old")
    rename = os.rename

    def fail_for_the_new(source: Path, target: Path) -> None:
        if ".tmp-" in str(source):
            raise OSError("cannot")
        rename(source, target)

    monkeypatch.setattr("os.rename", fail_for_the_new)
    with pytest.raises(OSError, match="cannot"), atomic_dir(path, replace=True) as temporary:
        (temporary / "a").write_text("new")
    assert (path / "a").read_text() == "old"


def test_a_killed_deletion_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        checkpoint_dir(tmp_path, step).mkdir()
        (checkpoint_dir(tmp_path, step) / "state.json").write_text("{}")

    def killed(path: Path, **_: object) -> None:
        if "old" in path.name and path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(tmp_path, 1)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000002"]
    monkeypatch.undo()
    prune_checkpoints(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    before = path.read_bytes()

    def no_space(_: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        write_bytes(path, b"half")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_refuses_what_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_latest_and_pruning_go_by_step_and_ignore_unfinished_ones(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    for step in (900, 1000, 100):
        checkpoint_dir(tmp_path, step).mkdir()
    (tmp_path / ".step-00002000.tmp-1").mkdir()
    assert latest_checkpoint(tmp_path) == checkpoint_dir(tmp_path, 1000)
    prune_checkpoints(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000900", "step-00001000"]
    prune_checkpoints(tmp_path, 0)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00001000"]


@pytest.mark.parametrize("content", [b'{"step": 1', b"\xff\xfe"])
def test_damaged_json_is_one_line_that_names_the_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"state\.json is damaged, not readable as JSON") as found:
        read_json(path)
    assert isinstance(found.value, ValueError)  # what is caught where damage is expected
