"""Selection while candidates are still being made: one class at a time is ranked, and what it keeps is written."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ddgen.checkpoint import remove_dir, write_bytes, write_json
from ddgen.config import Selection
from ddgen.distill.compose import compose
from ddgen.distill.pool import CandidatePool, short_hash
from ddgen.distill.select import Candidates, select, select_most_realistic, select_random
from ddgen.distill.selection_report import ClassReport, report_class
from ddgen.errors import UserError
from ddgen.observer.realism import RealismScores

FORMAT = 1  # raise it when the same settings would keep other candidates
CHUNK = 256
"""Candidates that are read and scored together: a fixed number, so that scores depend on nothing else."""

REPORT = "report."
"""Begins the names of a report's tensors in a class's file."""

MOST_REJECTED = 10
"""Rejected candidates of a class that are remembered, for the report."""

Score = Callable[[Tensor, Tensor], RealismScores]
"""Pixels uint8 (m, 3, h, w) and labels int64 (m,) in, what the observer says of them out, with features."""

RealScores = Callable[[int], RealismScores | None]
"""Label in, what the observer says of real images of the class out, None where nobody has to know."""


def no_real_images(label: int) -> None:
    """Compares with no real images."""


@dataclass(frozen=True)
class SelectedClass:
    """What is left of one class.

    Attributes:
        pixels: Kept images, best first, uint8 (n, 3, h, w).
        index: Numbers of the candidates in them, the first cells' first, int64 (n * factor ** 2,).
        loss: Their realism losses, float32 (n,).
        predicted: The class the observer names for each, int64 (n,).
        logits: Its logits, float32 (n, k).
        random: As many candidates drawn at random, uint8 (n, 3, h, w).
        rejected: The most realistic candidates not kept, the best first, uint8 (r, 3, h, w).
        rejected_loss: Their realism losses, float32 (r,).
        all_loss: Losses of all m candidates, float32 (m,); nan for one that shows nothing.
        all_predicted: Classes that the observer names, int64 (m,); -1 for one that shows nothing.
        report: What the rule did.
    """

    pixels: Tensor
    index: Tensor
    loss: Tensor
    predicted: Tensor
    logits: Tensor
    random: Tensor
    rejected: Tensor
    rejected_loss: Tensor
    all_loss: Tensor
    all_predicted: Tensor
    report: ClassReport

    @property
    def blank(self) -> Tensor:
        """Which of all candidates show nothing, bool (m,)."""
        return self.all_predicted < 0


class StreamingSelection:
    """Ranks the classes of a pool one by one, and remembers on disk what each keeps.

    Args:
        pool: The candidates.
        score: The observer.
        ipc: Images to keep of each class; 0 keeps all that show something.
        settings: Everything else that the choice depends on, as JSON values; it names the folder.
        keep_candidates: Leave a class's candidates in the pool once it is ranked.
        rule: What keeps the candidates of a class.
        factor: Images are grids of factor x factor candidates.
        real: Scores of real images, for the rules that need them and for the report.
        exact: Whether each class must have `ipc` candidates to choose from; otherwise fewer are all kept.
    """

    def __init__(
        self,
        pool: CandidatePool,
        score: Score,
        *,
        ipc: int,
        settings: Mapping[str, Any],
        rule: Selection = "realism",
        factor: int = 1,
        real: RealScores = no_real_images,
        keep_candidates: bool = False,
        exact: bool = True,
    ) -> None:
        self.pool, self.score, self.ipc = pool, score, ipc
        self.rule, self.factor, self.real = rule, factor, real
        self.keep_candidates, self.exact = keep_candidates, exact
        identity = {"format": FORMAT, "ipc": ipc, "exact": exact, "rule": rule, "factor": factor, **settings}
        self.directory = pool.directory / f"selected-{short_hash(identity)}"
        self.identity = identity

    def is_done(self, label: int, count: int) -> bool:
        """Whether a class has been ranked with `count` candidates; its candidates are then no longer needed."""
        path = self._path(label)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                return bool(self._facts(label, count).items() <= _facts_of(file).items())
        except Exception:  # safetensors raises its own type; a damaged file is made again
            return False

    def rank(self, label: int, count: int) -> SelectedClass:
        """Ranks candidates ``0 .. count - 1`` of a class, which are all on disk, and writes what is kept.

        Raises:
            UserError: Too few of them show something.
        """
        valid, scores = self._score_all(label, count)
        num_kept = self._num_kept(label, count, len(valid))
        candidates = Candidates(scores, valid, label, self.pool.seed, self.real(label))
        positions = select(self.rule, candidates, num_kept * self.factor**2)
        kept, passed_over = valid[positions], _most_realistic_rejected(scores.loss, positions)
        rejected = valid[passed_over]
        pixels = compose(self.pool.read(label, kept), self.factor, self.pool.image_size)
        # a grid is another image than its cells
        own = scores.rows(positions) if self.factor == 1 else self.score(pixels, torch.full((num_kept,), label))
        loss, predicted = torch.full((count,), float("nan")), torch.full((count,), -1)
        loss[valid], predicted[valid] = scores.loss, scores.predicted
        drawn = select_random(count, num_kept, self.pool.seed, label)
        selected = SelectedClass(
            pixels=pixels,
            index=kept,
            loss=own.loss,
            predicted=own.predicted,
            logits=own.logits,
            random=self.pool.read(label, drawn),
            rejected=self.pool.read(label, rejected),
            rejected_loss=scores.loss[passed_over],
            all_loss=loss,
            all_predicted=predicted,
            report=report_class(candidates, positions),
        )
        self._write(label, selected)
        self.release(label, count)
        return selected

    def release(self, label: int, count: int) -> None:
        """Deletes the candidates of a class that has been ranked, unless someone wants them, or made more of them."""
        if not self.keep_candidates and self.pool.num_stored(label) <= count:
            self.pool.remove(label)

    def load(self, label: int, count: int) -> SelectedClass:
        """Reads what `rank` wrote.

        Raises:
            UserError: The file is damaged, or of another request.
        """
        path = self._path(label)
        try:
            with safe_open(path, framework="pt") as file:
                facts = _facts_of(file)
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            if facts != self._facts(label, count) | {"checksum": _checksum(tensors)}:
                raise ValueError("it is not what was written")
            names = [name for name in tensors if name.startswith(REPORT)]
            report = ClassReport.from_tensors(label, {name.removeprefix(REPORT): tensors.pop(name) for name in names})
            return SelectedClass(**tensors, report=report)
        except Exception as error:  # safetensors raises its own type, and OSError
            raise UserError(f"{path}: unreadable ({error}); delete it and sample again") from None

    def remove(self) -> None:
        """Deletes the files of this request."""
        if self.directory.is_dir():
            remove_dir(self.directory)

    def _score_all(self, label: int, count: int) -> tuple[Tensor, RealismScores]:
        """Returns which candidates of a class show something, int64 (v,), and their scores, read chunk by chunk."""
        valid, parts = [torch.zeros(0, dtype=torch.int64)], []
        for chunk in torch.arange(count).split(CHUNK):
            pixels = self.pool.read(label, chunk)
            shown = ~is_blank(pixels)
            if shown.any():
                parts.append(self.score(pixels[shown], torch.full((int(shown.sum()),), label)))
                valid.append(chunk[shown])
        if not parts:
            self._num_kept(label, count, 0)  # which is an error
        features = [part.features for part in parts if part.features is not None]
        scores = RealismScores(
            torch.cat([part.loss for part in parts]),
            torch.cat([part.predicted for part in parts]),
            torch.cat([part.logits for part in parts]),
            torch.cat(features) if features else None,
        )
        return torch.cat(valid), scores

    def _num_kept(self, label: int, count: int, num_valid: int) -> int:
        """Returns how many images, each of factor ** 2 candidates, a class is to have."""
        possible = num_valid // self.factor**2
        if possible >= max(self.ipc, 1):
            return self.ipc or possible
        if possible and not self.exact:
            return possible
        blank = f" ({count - num_valid:,} are blank)" if num_valid < count else ""
        raise UserError(
            f"--ipc {self.ipc}: class {self.pool.class_names[label]!r} has only {num_valid:,} of {count:,} candidates"
            f" to choose from{blank}; raise --candidates_per_image, or train the generator for longer"
        )

    def _path(self, label: int) -> Path:
        return self.directory / f"class-{label:05d}.safetensors"

    def _facts(self, label: int, count: int) -> dict[str, Any]:
        return {"class": self.pool.class_names[label], "seed": self.pool.seed, "candidates": count}

    def _write(self, label: int, selected: SelectedClass) -> None:
        if not (self.directory / "selection.json").is_file():
            write_json(self.directory / "selection.json", self.identity)
        tensors = {item.name: getattr(selected, item.name) for item in fields(selected) if item.name != "report"}
        tensors |= {f"{REPORT}{name}": found for name, found in selected.report.to_tensors().items()}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        facts = self._facts(label, len(selected.all_loss)) | {"checksum": _checksum(tensors)}
        # one entry, since the order of several would not be fixed
        write_bytes(self._path(label), save(tensors, {"facts": json.dumps(facts)}))


def _most_realistic_rejected(losses: Tensor, kept: Tensor) -> Tensor:
    """Returns positions of the most realistic that are not among those kept, the best first, int64 (r,)."""
    ranked = select_most_realistic(losses, len(losses))
    return ranked[~torch.isin(ranked, kept)][:MOST_REJECTED]


def is_blank(pixels: Tensor) -> Tensor:
    """Returns which images uint8 (m, 3, h, w) are of one colour, as what is not finite becomes: bool (m,)."""
    first = pixels[:, :, :1, :1]
    return (pixels == first).flatten(1).all(1)


def rejections(classes: Sequence[SelectedClass], rule: Selection = "realism") -> dict[str, int]:
    """Returns reason -> how many candidates were rejected for it."""
    passed_over = "less realistic than those kept" if rule == "realism" else f"not chosen by {rule}"
    reasons = {"the observer names another class": 0, passed_over: 0, "blank": 0}
    for label, found in enumerate(classes):
        rejected = torch.ones(len(found.all_loss), dtype=torch.bool)
        rejected[found.index] = False
        named = found.all_predicted == label
        reasons["the observer names another class"] += int((rejected & ~named & ~found.blank).sum())
        reasons[passed_over] += int((rejected & named).sum())
        reasons["blank"] += int(found.blank.sum())
    return reasons


def confusions(classes: Sequence[SelectedClass], most: int = 3, threshold: float = 0.3) -> list[tuple[int, int, float]]:
    """Returns the classes whose candidates the observer most often takes for one other class.

    Args:
        classes: In label order.
        most: How many to return.
        threshold: Part of a class's candidates from which on it counts.

    Returns:
        (class, taken for, part of its candidates), the worst first.
    """
    found = []
    for label, selected in enumerate(classes):
        named = selected.all_predicted[~selected.blank & (selected.all_predicted != label)].bincount()
        if len(named):
            other = int(named.argmax())
            found.append((label, other, int(named[other]) / len(selected.all_predicted)))
    return sorted((entry for entry in found if entry[2] > threshold), key=lambda entry: -entry[2])[:most]


def _facts_of(file: Any) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(file.metadata()["facts"])
    return facts


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().numpy().data, value)
    return value
