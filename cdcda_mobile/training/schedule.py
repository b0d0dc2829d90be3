"""What an order is trained on at every step, and how fast: a matter of the order and the configuration, so that a resume finds it again."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cdcda_export.verify import Probe
from cdcda_mobile.config import SCHEDULES, TrainConfig
from cdcda_mobile.training.packing import Row


@dataclass(frozen=True)
class Example:
    """One training record; ``weight`` is that of a synthetic one against a real one."""

    probe: Probe
    weight: float = 1.0
    synthetic: bool = False


def row_of(probe: Probe, weight: float = 1.0) -> Row:
    """Return an exchange as a row: loss on the answer only."""
    return Row(tuple(probe.ids[:-1]), probe.answer_positions().start, tuple(probe.answer), weight)


@dataclass(frozen=True)
class Order:
    """One adapter to train.

    Attributes:
        user: whose; named in errors and progress.
        examples: training records, real and synthetic.
        validation: held-out real records that decide the best step; may be empty (then the last step is kept).
        directory: where the checkpoint lives.
        seed: decides initialisation and order.
        schedule: one of ``config.SCHEDULES``.
    """

    user: str
    examples: Sequence[Example]
    validation: Sequence[Probe]
    directory: Path
    seed: int = 0
    schedule: str = SCHEDULES[0]


@dataclass(frozen=True)
class _Phase:
    """Rows that are shuffled together, pass after pass, and what the learning rate is multiplied by meanwhile."""

    rows: list[Row]
    rate: float = 1.0


class Schedule:
    """The steps of an order.

    Args:
        order: the examples and how synthetic and real ones follow each other.
        config: batch size, epochs, rate, warm-up.

    Attributes:
        total_steps: if nothing stops it early.
        steps_per_epoch: of all phases together.
        last_phase: the step that begins it; nothing stops a training before the real records had their turn.
        evaluate_every: steps between two evaluations.
        tokens: of the rows of one epoch.
    """

    def __init__(self, order: Order, config: TrainConfig) -> None:
        self.config, self.seed = config, order.seed
        self.phases = _phases(order)
        self.steps_per_epoch = sum(self._steps(phase) for phase in self.phases)
        self.total_steps = config.max_steps or self.steps_per_epoch * config.epochs
        self._ends = self._phase_ends()
        self.last_phase = self._ends[-2] if len(self._ends) > 1 else 0
        self.evaluate_every = config.evaluate_every or max(1, math.ceil(self.steps_per_epoch / max(1, config.evaluations_per_epoch)))
        self.tokens = sum(len(row.ids) for phase in self.phases for row in phase.rows)

    def _steps(self, phase: _Phase) -> int:
        return math.ceil(len(phase.rows) / self.config.batch_size)

    def _phase_ends(self) -> list[int]:
        """Return the step at which each phase is over; each has its share of the steps, as its records have of all."""
        ends, done = [], 0
        for phase in self.phases:
            done += self._steps(phase)
            ends.append(round(self.total_steps * done / self.steps_per_epoch))
        return ends

    def _place(self, step: int) -> tuple[int, int]:
        """Return the phase of a step, and which of the phase's steps it is."""
        begin = 0
        for index, end in enumerate(self._ends):
            if step < end:
                return index, step - begin
            begin = end
        raise IndexError(step)

    def batch(self, step: int) -> list[Row]:
        """Return the rows of a step."""
        index, within = self._place(step)
        rows, size = self.phases[index].rows, self.config.batch_size
        epoch, at = divmod(within, self._steps(self.phases[index]))
        order = list(range(len(rows)))
        random.Random(f"{self.seed}/{index}/{epoch}").shuffle(order)
        return [rows[i] for i in order[at * size : (at + 1) * size]]

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step: in each phase a linear warm-up, then a cosine down to 5 %, times the phase's factor."""
        index, within = self._place(step)
        rate, steps = self.config.learning_rate * self.phases[index].rate, self._ends[index] - (self._ends[index - 1] if index else 0)
        warmup = max(1, round(steps * self.config.warmup_fraction))
        if within < warmup:
            return rate * (within + 1) / warmup
        rest = (within - warmup) / max(1, steps - warmup)
        return rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * rest)))


def _phases(order: Order) -> list[_Phase]:
    rows = [(row_of(e.probe, e.weight), e.synthetic) for e in order.examples]
    if order.schedule != "synthetic-first":
        return [_Phase([row for row, _ in rows])]
    made = [row for row, synthetic in rows if synthetic]
    real = [row for row, synthetic in rows if not synthetic]
    # AdamW does not feel a factor that all rows of a step have in common: here the weight has to slow the steps themselves.
    rate = made[0].weight if made else 1.0
    phases = [_Phase([replace(row, weight=1.0) for row in made], rate), _Phase(real)]
    return [phase for phase in phases if phase.rows]
