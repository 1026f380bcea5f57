"""From a source of candidates to what each class keeps: the pool, selection while it fills, budgets, batch sizes.

This file is also a script: `python tests/test_pool.py die FOLDER` kills forked children at every write, and
`python -m torch.distributed.run tests/test_pool.py share FOLDER` is one of several processes.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tqdm
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save
from test_scale import ROOT, finish, free_port

from ddgen.commands.candidates import SamplingWork
from ddgen.config import SampleConfig
from ddgen.distill import filling, progress
from ddgen.distill.batching import FIRST_SIZE, BatchSizes, Budget, HostMemory
from ddgen.distill.filling import fill, keys_in_turn, missing_keys
from ddgen.distill.pool import CandidatePool, CandidateSource
from ddgen.distill.progress import LatestCandidates, Watch, seconds_since_start
from ddgen.distill.selection_report import ClassReport
from ddgen.distill.streaming import SelectedClass, confusions, is_blank, rejections
from ddgen.errors import Stopped, UserError
from ddgen.observer.realism import RealismScores
from ddgen.seeds import torch_generator
from ddgen.timing import Clock, Timed, untimed

SIZE = 8
NAMES = ("bullet_train", "cat", "dog")
SETTINGS = {"generator": "abc", "guidance_scale": 1.5, "guidance_interval": (0.3, 0.85)}


def candidate(label: int, index: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=torch_generator(seed, label, index))


class Source:
    """Noise of (seed, class, index); remembers what it was asked for.

    Attributes:
        asked: Batches that were sampled, as lists of (class, index).
        before: Called with the number of images of every batch before it is sampled.
        seconds: What an image takes on `time`.
        blank: Candidates that show nothing.
    """

    def __init__(self, class_names: tuple[str, ...] = NAMES, *, seconds: float = 0.0) -> None:
        self.class_names, self.image_size, self.seconds = class_names, SIZE, seconds
        self.asked: list[list[tuple[int, int]]] = []
        self.before: Callable[[int], None] = lambda count: None
        self.time = SimpleNamespace(now=0.0)
        self.blank: set[tuple[int, int]] = set()

    def sample(self, labels: torch.Tensor, indices: torch.Tensor, seed: int, *, timed: Timed = untimed) -> torch.Tensor:
        keys = list(zip(labels.tolist(), indices.tolist(), strict=True))
        self.before(len(keys))
        with timed("sampling"):
            self.time.now += 0.75 * self.seconds * len(keys)
        with timed("decoding"):
            self.time.now += 0.25 * self.seconds * len(keys)
        self.asked.append(keys)
        return torch.stack([candidate(*key, seed) if key not in self.blank else torch.full((3, 8, 8), 7).byte()
                            for key in keys])  # fmt: skip

    def settings(self) -> dict[str, Any]:
        return {"source": "noise", "size": [SIZE, SIZE]}

    def describe(self) -> dict[str, str]:
        return {"sampler": "noise"}

    @property
    def all_asked(self) -> list[tuple[int, int]]:
        return [key for batch in self.asked for key in batch]


def score(pixels: torch.Tensor, labels: torch.Tensor, num_classes: int = len(NAMES)) -> RealismScores:
    """The darker, the more realistic; where the first pixel is odd, the next class is named."""
    named = (labels + (pixels[:, 0, 0, 0] % 2)) % num_classes
    logits = torch.nn.functional.one_hot(named, num_classes) * pixels[:, 0, 0, :1].float()
    return RealismScores(pixels.float().mean((1, 2, 3)), named, logits)


def candidates(folder: Path, source: CandidateSource, accelerator: Accelerator | None = None, **settings: Any) -> Any:
    settings = {"ipc": 2, "sample_batch_size": 4, "selection": "realism"} | settings
    clock = Clock(now=(lambda: source.time.now) if isinstance(source, Source) else None)
    accelerator = accelerator or Accelerator(cpu=True)
    return SamplingWork(SampleConfig(**settings), source, score, {"observer": "dark"}, folder, accelerator, clock)


def select(folder: Path, source: Source, accelerator: Accelerator | None = None, **settings: Any) -> list[Any]:
    """What each class keeps; the pool is deleted unless it is to be kept."""
    work = candidates(folder, source, accelerator, **settings)
    work.open()
    counts = work.run()
    selected = work.gather(counts)
    work.accelerator.wait_for_everyone()
    if work.accelerator.is_main_process:
        work.finish(counts)
    work.accelerator.wait_for_everyone()
    return list(selected)


def as_bytes(classes: list[SelectedClass]) -> bytes:
    tensors = {f"{label} {item.name}": getattr(found, item.name) for label, found in enumerate(classes)
               for item in fields(found) if item.name != "report"}  # fmt: skip
    for label, found in enumerate(classes):
        tensors |= {f"{label} report {name}": tensor for name, tensor in found.report.to_tensors().items()}
    return bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def open_pool(path: Path, **changes: Any) -> CandidatePool:
    arguments: dict[str, Any] = {"class_names": NAMES, "image_size": SIZE, "seed": 0, "settings": SETTINGS} | changes
    return CandidatePool.open(path, **arguments)


def fill_up(pool: CandidatePool, source: Source, count: int, batch_size: int = 4) -> int:
    keys = missing_keys(pool, range(len(NAMES)), count)
    return fill(pool, source, keys, sizes=BatchSizes(batch_size, HostMemory()), clock=Clock())


def expect_all(pool: CandidatePool, count: int) -> None:
    for label in range(len(NAMES)):
        wanted = torch.randperm(count)
        expected = torch.stack([candidate(label, i) for i in wanted.tolist()])
        torch.testing.assert_close(pool.read(label, wanted), expected, rtol=0, atol=0)


def interrupt_at(number: int, signal_number: int | None = None) -> Callable[[int], None]:
    """Fails before batch `number`, counted from 0, or sends a signal then."""
    left = number

    def before(_: int) -> None:
        nonlocal left
        if left == 0 and signal_number is None:
            raise KeyboardInterrupt
        if left == 0 and signal_number is not None:
            signal.raise_signal(signal_number)
        left -= 1

    return before


# --- the pool


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_a_filled_pool_gives_back_each_candidate(tmp_path: Path, batch_size: int) -> None:
    pool, source = open_pool(tmp_path / "pool"), Source()
    assert fill_up(pool, source, 5, batch_size) == 15
    assert [len(batch) for batch in source.asked[:-1]] == [batch_size] * (len(source.asked) - 1)
    expect_all(pool, 5)
    expect_all(open_pool(tmp_path / "pool"), 3)
    assert len(list((tmp_path / "pool" / "candidates").iterdir())) == len(source.asked)


def test_an_interrupted_pool_goes_on_where_it_stopped(tmp_path: Path) -> None:
    source = Source()
    source.before = interrupt_at(2)
    with pytest.raises(KeyboardInterrupt):
        fill_up(open_pool(tmp_path), source, 5)
    pool, again = open_pool(tmp_path), Source()
    assert pool.missing(1, 5) == [3, 4]
    assert fill_up(pool, again, 5) == 15 - 8
    assert again.asked[0] == [(1, 3), (1, 4), (2, 0), (2, 1)]
    expect_all(pool, 5)
    assert fill_up(pool, Source(), 5) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_within_a_batch_stores_it_first(tmp_path: Path, number: int) -> None:
    source = Source()
    source.before = interrupt_at(1, number)
    with pytest.raises(Stopped) as stopped:
        fill_up(open_pool(tmp_path), source, 5)
    assert stopped.value.signal_number == number and len(source.asked) == 2
    assert open_pool(tmp_path).num_stored() == 8


def test_a_larger_pool_keeps_what_the_smaller_one_had(tmp_path: Path) -> None:
    pool, more = open_pool(tmp_path), Source()
    fill_up(pool, Source(), 2)
    fill_up(pool, more, 6, 5)
    assert sorted(more.all_asked) == [(c, i) for c in range(3) for i in range(2, 6)]
    expect_all(pool, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "made with seed 0, now 1"),
        ({"image_size": 16}, "made with image_size 8, now 16"),
        ({"class_names": ("cat", "bullet_train", "dog")}, "made with class_names"),
        ({"settings": SETTINGS | {"guidance_scale": 3.0}}, "made with guidance_scale 1.5, now 3.0"),
        ({"settings": SETTINGS | {"sampler": "unipc"}}, 'made with sampler null, now "unipc"'),
    ],
)
def test_a_pool_is_not_mixed_with_another(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    open_pool(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        open_pool(tmp_path, **changes)
    assert "delete that folder" in str(caught.value)


def test_damaged_files_are_never_read(tmp_path: Path) -> None:
    pool = open_pool(tmp_path)
    fill_up(pool, Source(), 3, 3)
    with pytest.raises(UserError, match="candidate 3 of 'cat' is missing"):
        pool.read(1, torch.tensor([3]))
    first, second = sorted((tmp_path / "candidates").iterdir())[:2]
    whole = first.read_bytes()
    for damaged, message in (
        (whole[:100], "is unreadable"),
        (whole[:-1], "is unreadable"),
        (second.read_bytes(), "another pool's, or was renamed"),
    ):
        first.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            open_pool(tmp_path)
    place = whole.index(candidate(0, 0).numpy().tobytes())
    first.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(UserError, match="checksum of image 0 differs"):
        open_pool(tmp_path).read(0, torch.tensor([2, 0]))
    expected = torch.stack([candidate(0, 2), candidate(0, 1)])
    assert torch.equal(open_pool(tmp_path).read(0, torch.tensor([2, 1])), expected)


def test_what_fails_in_storing_is_raised_where_it_is_sampled(tmp_path: Path) -> None:
    source = Source()
    with pytest.raises(ValueError, match="from the sampler"):
        fill_up(open_pool(tmp_path / "a", image_size=4), source, 50)
    assert len(source.asked) <= filling.WAITING + 2
    pool = open_pool(tmp_path / "b")
    (tmp_path / "b" / "candidates").touch()  # a file where the folder has to be
    with pytest.raises(FileExistsError):
        fill_up(pool, Source(), 3)


def test_only_files_without_another_class_are_deleted(tmp_path: Path) -> None:
    pool = open_pool(tmp_path)
    fill_up(pool, Source(), 4, 3)  # files: 0 0 0 | 0 1 1 | 1 1 2 | 2 2 2
    pool.remove(0)
    assert [path.name[:5] for path in sorted((tmp_path / "candidates").iterdir())] == ["00000", "00001", "00002"]
    pool.remove(1)
    assert [path.name[:5] for path in sorted((tmp_path / "candidates").iterdir())] == ["00001", "00002"]
    assert torch.equal(pool.read(2, torch.arange(4)), torch.stack([candidate(2, i) for i in range(4)]))


# --- selection while the pool fills


def test_each_class_keeps_its_most_realistic_and_is_forgotten(tmp_path: Path) -> None:
    held: list[list[int]] = []
    source = Source()
    classes = select(tmp_path, source, ipc=3, candidates_per_image=5)
    for label, found in enumerate(classes):
        everything = torch.stack([candidate(label, i) for i in range(15)])
        loss = everything.float().mean((1, 2, 3))
        best = loss.argsort()[:3]
        assert torch.equal(found.index, best) and torch.equal(found.loss, loss[best])
        assert torch.equal(found.pixels, everything[best]) and torch.equal(found.all_loss, loss)
        assert torch.equal(found.all_predicted, (label + everything[:, 0, 0, 0].long() % 2) % 3)
        assert torch.equal(found.rejected, everything[loss.argsort()[3:13]])
        assert torch.equal(found.rejected_loss, loss.sort().values[3:13])
        assert torch.equal(found.logits, score(everything[best], torch.full((3,), label)).logits)
        assert len({int(i) for image in found.random for i in (everything == image).flatten(1).all(1).nonzero()}) == 3
    assert sorted(source.all_asked) == [(c, i) for c in range(3) for i in range(15)]
    assert not list((tmp_path / "pool").iterdir())
    assert held == []


def test_the_best_rejected_are_the_most_realistic_that_the_rule_did_not_keep(tmp_path: Path) -> None:
    source = Source()
    source.blank = {(0, 0)}
    found = select(tmp_path, source, ipc=2, candidates_per_image=3, selection="middle")[0]
    everything = torch.stack([candidate(0, i) for i in range(1, 6)])
    order = everything.float().mean((1, 2, 3)).argsort()
    assert torch.equal(found.pixels[0], everything[order[2]]) and len(found.rejected) == 3
    rest = [int(i) for i in order if int(i) + 1 not in found.index.tolist()]
    assert torch.equal(found.rejected, everything[rest])


def test_finished_classes_leave_the_disk_while_others_are_made(tmp_path: Path) -> None:
    source, left = Source(), []

    def look(_: int) -> None:
        left.append(len(list(tmp_path.glob("pool/*/candidates/[0-9]*"))))

    source.before = look
    select(tmp_path, source, ipc=8, candidates_per_image=1, sample_batch_size=2)
    assert len(left) == 12 and max(left) <= 4 + filling.WAITING


def test_a_kept_pool_serves_other_requests(tmp_path: Path) -> None:
    large = select(tmp_path, Source(), ipc=4, candidates_per_image=3, keep_pool=True)
    never = Source()
    never.before = interrupt_at(0)
    small = select(tmp_path, never, ipc=2, candidates_per_image=6)
    assert [found.index.tolist() for found in small] == [found.index[:2].tolist() for found in large]
    more = Source()
    select(tmp_path, more, ipc=5, candidates_per_image=3)
    assert sorted(more.all_asked) == [(c, i) for c in range(3) for i in (12, 13, 14)]
    assert len(list(tmp_path.glob("pool/*/keep"))) == 1


def test_a_smaller_request_leaves_an_unfinished_larger_one_alone(tmp_path: Path) -> None:
    broken = Source()
    broken.before = interrupt_at(4)
    with pytest.raises(KeyboardInterrupt):
        select(tmp_path, broken, ipc=4, candidates_per_image=2)  # class 0 is ranked, class 1 made
    select(tmp_path, Source(), ipc=1, candidates_per_image=2)
    again = Source()
    select(tmp_path, again, ipc=4, candidates_per_image=2)
    assert sorted(again.all_asked) == [(2, i) for i in range(8)]
    assert not list((tmp_path / "pool").iterdir())


def test_blank_candidates_are_rejected_before_ranking(tmp_path: Path) -> None:
    source = Source()
    source.blank = {(1, i) for i in range(5)}
    classes = select(tmp_path, source, ipc=3, candidates_per_image=3)
    assert is_blank(torch.stack([candidate(0, 0), torch.full((3, 8, 8), 7).byte()])).tolist() == [False, True]
    assert min(classes[1].index.tolist()) >= 5 and classes[1].blank.sum() == 5 and classes[1].loss.isfinite().all()
    reasons = rejections(classes)
    assert reasons["blank"] == 5 and sum(reasons.values()) == 27 - 9
    named_other = sum(int((found.all_predicted != label).sum()) for label, found in enumerate(classes)) - 5
    kept_other = sum(int((found.predicted != label).sum()) for label, found in enumerate(classes))
    assert reasons["the observer names another class"] == named_other - kept_other
    source.blank = {(1, i) for i in range(8)}
    with pytest.raises(UserError, match=r"--ipc 3: class 'cat' has only 1 of 9 .* \(8 are blank\)"):
        select(tmp_path / "b", source, ipc=3, candidates_per_image=3)


def test_confusions_name_the_worst_classes_first() -> None:
    def seen(*predicted: int) -> SelectedClass:
        empty = torch.zeros(0)
        report = ClassReport(0, empty, {}, {})
        return SelectedClass(*[empty] * 8, torch.zeros(len(predicted)), torch.tensor(predicted), report)

    classes = [seen(0, 1, 1, 1), seen(1, 1, 2, 0), seen(2, 1, -1, 1), seen(3, 3, 3, 3), seen(0, 0, 0, 0)]
    assert confusions(classes) == [(4, 0, 1.0), (0, 1, 0.75), (2, 1, 0.5)]


def test_no_more_than_one_class_and_the_batches_under_way_are_in_memory(tmp_path: Path) -> None:
    def images() -> dict[int, int]:
        return {t.untyped_storage().data_ptr(): len(t) for t in gc.get_objects()
                if type(t) is torch.Tensor and t.dtype == torch.uint8 and t.ndim == 4}  # fmt: skip

    gc.collect()
    of_other_tests, most = images(), 0

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, sum(count for place, count in images().items() if place not in of_other_tests))

    names = tuple(f"class {i:02d}" for i in range(8))
    source = Source(names)
    source.before = look
    work = candidates(tmp_path, source, ipc=2, candidates_per_image=30, sample_batch_size=30)

    def watched(pixels: torch.Tensor, labels: torch.Tensor) -> RealismScores:
        look()
        return score(pixels, labels, 8)

    work.score = watched
    work.open()
    assert work.run() == [60] * 8
    assert 60 <= most <= 60 + 60 + 30 * (filling.WAITING + 2)  # what is scored is a copy of what was read


def test_a_damaged_selection_is_made_again_or_refused(tmp_path: Path) -> None:
    source = Source()
    work = candidates(tmp_path, source, keep_pool=True)
    work.open()
    counts = work.run()
    path = work.selection.directory / "class-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(UserError, match=r"class-00001\.safetensors: unreadable"):
        work.gather(counts)
    path.write_bytes(whole[:200])
    again = candidates(tmp_path, source, keep_pool=True)
    again.open()
    assert again.run() == counts and path.read_bytes() == whole and again.num_ranked == 8


# --- killed


def preceded(function: Callable[..., Any], step: Callable[[], None]) -> Callable[..., Any]:
    def changed(*args: Any, **kwargs: Any) -> Any:
        step()
        return function(*args, **kwargs)

    return changed


def at_every_write(folder: Path) -> dict[str, Any]:
    """Kills a run at its first, second ... write and lets it go on; says what came of it, and how many were redone."""
    tqdm.tqdm.monitor_interval = 0  # no thread, so that forking is safe
    torch.set_num_threads(1)
    folder.mkdir()

    def in_child(work: Callable[[], None]) -> int:
        child = os.fork()
        if not child:
            code = 70
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def run(path: Path, kill_at: int | None) -> None:
        source, left = Source(), kill_at

        def step() -> None:
            nonlocal left
            if left is not None:
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
            setattr(os, name, preceded(getattr(os, name), step))
        classes = select(path, source, ipc=2, candidates_per_image=3, sample_batch_size=4)
        (path / "classes").write_bytes(as_bytes(classes))
        (path / "made").write_text(str(len(source.all_asked)))

    assert in_child(lambda: run(folder / "whole", None)) == 0
    codes, made, same = [], [], []
    for count in range(1, 200, 3):
        path = folder / str(count)
        code = in_child(lambda path=path, count=count: run(path, count))  # type: ignore[misc]
        if code == 0:
            break
        stored = [load_file(shard) for shard in path.glob("pool/*/candidates/[0-9]*")]
        done = len(list(path.glob("pool/*/selected-*/class-*")))
        keys = {key for shard in stored for key in zip(shard["label"].tolist(), shard["index"].tolist(), strict=True)}
        finished = {int(p.name[6:11]) for p in path.glob("pool/*/selected-*/class-*")}
        assert len(finished) == done
        codes.append(code)
        assert in_child(lambda path=path: run(path, None)) == 0  # type: ignore[misc]
        there = len({key for key in keys if key[0] not in finished}) + 6 * len(finished)
        made.append(int((path / "made").read_text()) + there)
        same.append((path / "classes").read_bytes() == (folder / "whole" / "classes").read_bytes())
    return {"codes": codes, "made": made, "same": same}


def test_killed_at_any_write_it_goes_on_exactly_and_redoes_nothing_that_is_stored(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, "die", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["codes"]) >= 12 and set(found["codes"]) == {-signal.SIGKILL}
    assert all(found["same"])
    # Nothing is lost but what had not been stored; killed while the finished pool is deleted, all is made again.
    deleting = found["made"].index(36) if 36 in found["made"] else len(found["made"])
    assert set(found["made"][:deleting]) == {18} and deleting >= 10


# --- a budget of seconds


def test_a_budget_is_spent_in_turn_and_never_exceeded(tmp_path: Path) -> None:
    source = Source(seconds=1.0)
    classes = select(tmp_path, source, ipc=0, candidates_per_image=None, budget_seconds=10.0)
    assert source.time.now == 8.0  # a third batch of four would not have fitted
    assert source.all_asked == [(number % 3, number // 3) for number in range(8)]
    assert [sorted(found.index.tolist()) for found in classes] == [[0, 1, 2], [0, 1, 2], [0, 1]]
    assert not list((tmp_path / "pool").iterdir())


def test_a_stopped_budget_goes_on_with_the_remainder(tmp_path: Path) -> None:
    whole = select(tmp_path / "whole", Source(seconds=1.0), ipc=1, budget_seconds=41.0)
    first, second = Source(seconds=1.0), Source(seconds=1.0)
    first.before = interrupt_at(3)
    with pytest.raises(KeyboardInterrupt):
        select(tmp_path / "cut", first, ipc=1, budget_seconds=41.0)
    classes = select(tmp_path / "cut", second, ipc=1, budget_seconds=41.0)
    assert (first.time.now, second.time.now) == (12.0, 28.0)
    assert len(classes[0].all_loss) == 14 and as_bytes(classes) == as_bytes(whole)


def test_a_kept_budget_pool_grows_with_a_larger_budget(tmp_path: Path) -> None:
    select(tmp_path, Source(seconds=1.0), ipc=1, budget_seconds=13.0, keep_pool=True)
    same, more = Source(seconds=1.0), Source(seconds=1.0)
    assert len(select(tmp_path, same, ipc=1, budget_seconds=13.0)[0].all_loss) == 4
    select(tmp_path, more, ipc=1, budget_seconds=20.0)
    assert (same.time.now, more.time.now) == (0.0, 8.0)
    assert more.all_asked[0] == (0, 4)


def test_a_budget_for_less_than_one_image_a_class_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--budget_seconds 2: 2 of 3 classes got an image in that time; give more"):
        select(tmp_path, Source(seconds=1.0), ipc=1, budget_seconds=2.0, sample_batch_size=1)


def test_fewer_candidates_than_asked_for_are_all_kept(tmp_path: Path) -> None:
    classes = select(tmp_path, Source(seconds=1.0), ipc=5, budget_seconds=8.0)
    assert [len(found.index) for found in classes] == [3, 3, 2] == [len(found.random) for found in classes]


def test_processes_take_turns_and_classes_are_cut_to_the_smallest_round(tmp_path: Path) -> None:
    pool = open_pool(tmp_path)
    fast, slow = (keys_in_turn(pool, process, 2) for process in (0, 1))
    keys = [next(fast) for _ in range(9)] + [next(slow) for _ in range(4)]
    fill(pool, Source(), keys, sizes=BatchSizes(3, HostMemory()), clock=Clock())
    assert keys[:4] == [(0, 0), (2, 0), (1, 1), (0, 2)] and keys[9:11] == [(1, 0), (0, 1)]
    assert [pool.num_stored(label) for label in range(3)] == [4, 5, 4]
    assert pool.balanced_counts() == [3, 4, 3]
    assert next(keys_in_turn(pool)) == (0, 3)


# --- batch sizes


def grow(rate: Callable[[int], float], taken: int = 10, free: int = 10**9) -> list[int]:
    """Sizes of twenty batches, of which one of n images takes n / rate(n) seconds and n * taken bytes."""
    memory = SimpleNamespace(before=lambda: None, release=lambda: None, after=lambda: (sizes.size * taken, free))
    sizes, seen = BatchSizes(None, memory), []
    for _ in range(20):
        seen.append(sizes.size)
        sizes.before()
        sizes.after(sizes.size, sizes.size / rate(sizes.size))
    return seen


def test_batches_double_while_that_pays() -> None:
    assert grow(lambda n: 1000 * n / (n + 64))[:10] == [16, 32, 64, 128, 256, 512, 1024, 2048, 2048, 1024]
    assert grow(lambda n: 1000.0) == [16, 32, 32, *[16] * 17]
    assert grow(lambda n: 1000 * min(n, 64)) == [16, 32, 64, 128, 128, *[64] * 15]
    slow_once = iter([True])  # a size that is disturbed when it is first measured
    disturbed = grow(lambda n: n * (0.1 if n == 64 and next(slow_once, False) else 1.0), taken=1000, free=500_000)
    assert disturbed[:7] == [16, 32, 64, 64, 128, 256, 256]
    assert grow(lambda n: 1000 * n, taken=1000, free=500_000)[-1] == 256  # 2 x 256,000 bytes are too many
    assert grow(lambda n: n / 7)[-1] == 16  # the next would take more than ten seconds... and brings nothing
    assert FIRST_SIZE == 16


def test_sizes_are_found_without_sampling_an_image_twice(tmp_path: Path) -> None:
    source = Source()

    def faster_together(count: int) -> None:
        source.time.now += 0.1 + 0.001 * count

    source.before = faster_together
    select(tmp_path, source, ipc=100, candidates_per_image=3, sample_batch_size=None, keep_pool=True)
    assert [len(batch) for batch in source.asked] == [16, 32, 64, 128, 256, 404]
    assert sorted(source.all_asked) == [(c, i) for c in range(3) for i in range(300)]


def test_what_does_not_fit_is_halved_and_made_again(tmp_path: Path) -> None:
    source = Source()

    def small_memory(count: int) -> None:
        source.time.now += 0.1
        if count > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")

    source.before = small_memory
    classes = select(tmp_path, source, ipc=10, candidates_per_image=4, sample_batch_size=None)
    assert {len(batch) for batch in source.asked[:-1]} == {16}
    assert source.all_asked == [(c, i) for c in range(3) for i in range(40)]
    assert as_bytes(classes) == as_bytes(select(tmp_path / "b", Source(), ipc=10, candidates_per_image=4))
    with pytest.raises(UserError, match="--sample_batch_size 21: 21 images do not fit"):
        select(tmp_path / "c", source, ipc=10, sample_batch_size=21)
    source.before = lambda count: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError, match="out of memory with a single image"):
        select(tmp_path / "d", source, ipc=10, sample_batch_size=None)


def test_host_memory_sees_a_batch() -> None:
    memory = HostMemory()
    memory.before()
    with mmap.mmap(-1, 2**26) as block:  # not out of what the process has freed and kept
        block.write(b"1" * 2**26)
        taken, free = memory.after()
    assert taken >= 0.99 * 2**26 and free > 0


def test_a_budget_goes_by_the_last_batches() -> None:
    budget = Budget(100.0)
    for count, seconds in ((10, 40.0), (10, 10.0), (10, 10.0), (10, 10.0)):
        assert budget.allows(count)
        budget.spend(count, seconds)
    assert budget.seconds_per_image == 1.0 and budget.allows(30) and not budget.allows(31)


# --- what a person sees


def test_the_picture_is_drawn_for_the_first_classes_and_then_every_ten_seconds(tmp_path: Path) -> None:
    time, drawn = SimpleNamespace(now=0.0), []
    latest = LatestCandidates(tmp_path / "p.png", [f"class {i}" for i in range(30)], lambda: time.now)
    draw = latest.draw
    latest.draw = lambda: (drawn.append(time.now), draw())  # type: ignore[method-assign, assignment, func-returns-value]
    for label in range(30):
        latest.add(torch.tensor([label, label]), torch.stack([candidate(label, 0), candidate(label, 1)]))
        time.now += 1.0
    assert drawn == [*map(float, range(progress.ROWS)), 21.0]
    latest.add(torch.tensor([0]), torch.tensor([250, 0, 0]).byte().reshape(1, 3, 1, 1).expand(1, 3, 8, 8))
    draw()
    with Image.open(tmp_path / "p.png") as picture:
        red = sum(count for count, colour in picture.getcolors(10**6) if colour == (250, 0, 0))
    assert red == 96 * 96


def test_the_first_image_and_the_shares_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    clock.seconds.update({"sampling": 6.0, "decoding": 3.0, "ranking": 1.0})
    watch = Watch(num_images=8, clock=clock)
    for index in range(2):
        watch.batch(torch.tensor([0]), candidate(0, index)[None])
    watch.close()
    said = capsys.readouterr()
    assert re.findall(r"first image after ([\d.]+) s", said.out) and said.out.count("first image") == 1
    assert "2/8" in said.err and "sampling 60 %, decoding 30 %, ranking 10 %" in said.err
    assert 0 < seconds_since_start() < 3600


def test_a_clock_adds_up_stages() -> None:
    time = SimpleNamespace(now=0.0)
    clock = Clock(wait=lambda: setattr(time, "now", time.now + 1), now=lambda: time.now)
    for _ in range(2):
        with clock("sampling"):
            time.now += 2
    assert clock.seconds == {"sampling": 6.0}


# --- processes


def share(folder: Path) -> None:
    """One of two processes: by count, by time, and one that fails; each says in a file how that ended."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    for name, settings in RUNS.items():
        path = folder / name
        classes = select(path, Source(seconds=1.0), accelerator, **settings)
        if rank == 0:
            (path / "classes").write_bytes(as_bytes(classes))
    failing = Source(seconds=1.0)
    if rank == 1:
        failing.image_size = SIZE

        def fail(_: int) -> None:
            raise UserError("process 1 has found a mistake")

        failing.before = fail
    ended = "nothing was wrong"
    try:
        select(folder / "failing", failing, accelerator, budget_seconds=1e9, ipc=1)
    except UserError as error:
        ended = str(error)
    (folder / f"ended{rank}").write_text(ended)
    accelerator.end_training()


RUNS: dict[str, dict[str, Any]] = {
    "count": {"ipc": 2, "candidates_per_image": 4, "keep_pool": True},
    "time": {"ipc": 0, "budget_seconds": 9.0, "keep_pool": True},
}


def pixels_of(folder: Path) -> dict[tuple[int, int], bytes]:
    found = {}
    for path in folder.glob("pool/*/candidates/*.safetensors"):
        shard = load_file(path)
        for label, index, image in zip(shard["label"].tolist(), shard["index"].tolist(), shard["pixels"], strict=True):
            found[label, index] = image.numpy().tobytes()
    return found


def test_two_processes_leave_what_one_leaves_and_stop_together(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finish(subprocess.Popen([*command, __file__, "share", str(tmp_path)], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))  # fmt: skip
    assert [(tmp_path / f"ended{rank}").read_text() for rank in (0, 1)] == ["process 1 has found a mistake"] * 2
    by_count = select(tmp_path / "one", Source(), **RUNS["count"])
    assert (tmp_path / "count" / "classes").read_bytes() == as_bytes(by_count)
    theirs = sorted(tmp_path.glob("count/pool/*/selected-*/*"))
    ours = sorted(tmp_path.glob("one/pool/*/selected-*/*"))
    assert [p.name for p in theirs] == [p.name for p in ours] and len(ours) == 4
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(theirs, ours, strict=True))
    assert pixels_of(tmp_path / "count") == pixels_of(tmp_path / "one") and len(pixels_of(tmp_path / "one")) == 24
    # Each process has 9 seconds, 2 batches of 4 images at 1 second each: 16 images, in turn.
    assert set(pixels_of(tmp_path / "time")) == {(number % 3, number // 3) for number in range(16)}
    by_time = load_file(tmp_path / "time" / "classes")
    assert [len(by_time[f"{label} index"]) for label in range(3)] == [6, 5, 5]


if __name__ == "__main__":
    if sys.argv[1] == "share":
        share(Path(sys.argv[2]))
    else:
        found = at_every_write(Path(sys.argv[2]) / "writes")
        (Path(sys.argv[2]) / "found.json").write_text(json.dumps(found))
