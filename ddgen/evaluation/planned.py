"""Students to be trained, known before their images are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from ddgen.evaluation.batches import TrainingImages
from ddgen.evaluation.cells import Cell, Teacher, digest
from ddgen.evaluation.protocols import Protocol
from ddgen.evaluation.sources import Source


@dataclass(frozen=True)
class Planned:
    """A student to be trained.

    Attributes:
        source: Draws its images.
        recipe: How it is trained.
        network: Name of its network.
        online: Who labels online.
        epochs: Epochs to train.
        repeat: Which of the row's students.
        may_diverge: A loss that is not finite is a result, not a mistake.
    """

    source: Source
    recipe: Protocol
    network: str
    online: tuple[Teacher, ...]
    epochs: int
    repeat: int
    may_diverge: bool = False

    def cell(self, images: TrainingImages) -> Cell:
        """Returns the student with its images, which have the recipe's labels."""
        return Cell(
            self.source.name, images, self.source.content, self.recipe, self.network, self.online, self.source.ipc,
            self.epochs, self.repeat,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """Tells it from the other students of an evaluation, the same on all processes, without drawing its images."""
        teachers = [teacher.name for teacher in self.online]
        facts = (self.source.name, self.recipe, self.network, teachers, self.epochs, self.repeat)
        return digest(repr(facts).encode())

    @property
    def length(self) -> int:
        """Images of a class that it sees: how long it takes, beside others of the same network."""
        return self.epochs * self.source.ipc
