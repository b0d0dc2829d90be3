"""Users whose rows share a pass: they take their steps together, and who is through, or fails, leaves."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from cdcda_export.errors import CdcdaError, FileError
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.training.engine import Engine
from cdcda_mobile.training.learner import Learner, Trained
from cdcda_mobile.training.lora import Layout
from cdcda_mobile.training.schedule import Order

# On a GPU steps are short and a checkpoint of a whole cohort is gigabytes.
_SECONDS_BETWEEN_SAVES = 60.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class Event:
    """What a working thread tells: steps of an order, or what became of it."""

    index: int
    steps: int = 0
    loss: float = math.nan
    outcome: Trained | None = None


class Group:
    """A group at work.

    Args:
        orders: by their place in the cohort.
        config: see ``TrainConfig``.
        layout: of the adapters.
        engine: computes the passes.
        parts: passes that each user's batch is cut into.
        tell: hears of every step and outcome, in this thread.
    """

    def __init__(
        self,
        orders: Sequence[tuple[int, Order]],
        config: TrainConfig,
        layout: Layout,
        engine: Engine,
        parts: int,
        tell: Callable[[Event], None],
    ) -> None:
        self.config, self.engine, self.tell = config, engine, tell
        flats = torch.zeros(len(orders), layout.size, device=engine.device)
        self.learners = {i: Learner(order, config, layout, flat, parts) for (i, order), flat in zip(orders, flats, strict=True)}
        self.alone = len(orders) == 1
        self._losses: list[tuple[list[int], torch.Tensor]] = []
        self._saved_at = time.monotonic()

    def run(self, stop: threading.Event) -> None:
        """Train all to their ends; between two steps ``stop`` is obeyed."""
        if not self._resume():
            self._clocked(lambda: self._evaluate(list(self.learners), {}))
        self._dismiss([index for index, learner in self.learners.items() if learner.over])
        while self.learners and not stop.is_set():
            self._step()

    # Resuming.

    def _resume(self) -> int:
        """Go to the newest step that all have whole, and return it."""
        if not self.alone:
            ended = self._each(Learner.end)
            for index in ended:
                self.tell(Event(index, self.learners[index].state.step))
            self._dismiss(ended)
        while self.learners:
            common = max(set.intersection(*(self._steps_saved(index) for index in list(self.learners))))
            whole = self._each(partial(Learner.resume, step=common))
            if len(whole) == len(self.learners):
                for index in whole if common else ():
                    self.tell(Event(index, common))
                return common
        return 0

    def _steps_saved(self, index: int) -> set[int]:
        try:
            return self.learners[index].steps_saved()
        except OSError:
            return {0}

    def _each(self, work: Callable[[Learner], bool], indices: Sequence[int] | None = None) -> list[int]:
        """Do something that reads or writes files for users; return for whom it was so, and let those go whose files fail."""
        found = []
        for index in list(self.learners) if indices is None else indices:
            try:
                if work(self.learners[index]):
                    found.append(index)
            except (CdcdaError, OSError) as error:
                failure = error if isinstance(error, CdcdaError) else FileError(f"{error.filename or 'A file'}: {error.strerror or error}.")
                self._leave(index, failure)
        return found

    # Steps.

    def _step(self) -> None:
        indices = list(self.learners)
        learners = [self.learners[index] for index in indices]
        found = self._clocked(lambda: self._learn(indices))
        over = [index for index in indices if self.learners[index].over]
        self._clocked(lambda: self._save(over), learners)
        for index in indices:
            self.tell(Event(index, 1, found.get(index, math.nan)))
        self._dismiss([index for index in over if index in self.learners])

    def _learn(self, indices: list[int]) -> dict[int, float]:
        """Take a step, evaluate who is due, and return the losses that were read."""
        learners = [self.learners[index] for index in indices]
        batches = [learner.batch() for learner in learners]
        flats, gradients = [learner.flat for learner in learners], [learner.gradient for learner in learners]
        self._losses.append((indices, self.engine.gradients(batches, flats, gradients, learners[0].state.parts)))
        for learner, rows in zip(learners, batches, strict=True):
            learner.update(sum(len(row.ids) for row in rows))
        due = [index for index in indices if self.learners[index].due]
        # Reading a loss waits for the device: where that matters, only when there is something else to wait for.
        found = self._read_losses() if due or not self.engine.queues else {}
        self._evaluate([index for index in due if not self.learners[index].state.failed], found)
        return found

    def _read_losses(self) -> dict[int, float]:
        newest: dict[int, float] = {}
        for indices, losses in self._losses:
            newest |= zip(indices, losses.tolist(), strict=True)
            for index in indices:
                if index in self.learners:
                    self.learners[index].check(newest[index])
        self._losses.clear()
        return newest

    def _evaluate(self, indices: Sequence[int], losses: dict[int, float]) -> None:
        asked = [self.learners[index] for index in indices if self.learners[index].validation]
        found: dict[int, float] = {}
        if asked:
            nll = self.engine.nll([one.validation for one in asked], [one.flat for one in asked], asked[0].state.parts)
            found = {id(learner): value for learner, value in zip(asked, nll.tolist(), strict=True)}
        for index in indices:
            learner = self.learners[index]
            learner.judge(found.get(id(learner)), losses.get(index))

    def _clocked(self, work: Callable[[], _T], learners: Sequence[Learner] | None = None) -> _T:
        """Do something for the whole group; who stands in a pass pays for it by tokens."""
        learners = learners or list(self.learners.values())
        began, own, elsewhere = time.monotonic(), time.thread_time(), self.engine.cpu_seconds
        done = work()
        wall, cpu = time.monotonic() - began, time.thread_time() - own + self.engine.cpu_seconds - elsewhere
        total = sum(learner.schedule.tokens for learner in learners) or 1
        for learner in learners:
            share = learner.schedule.tokens / total
            learner.state.seconds += wall * share
            learner.state.cpu_seconds += cpu * share
        return done

    # Checkpoints and leaving.

    def _save(self, over: Sequence[int]) -> None:
        """Write checkpoints where it is time.

        When somebody leaves, those who stay are saved first, so that after a kill they go on from there in the same company, and then
        the end of who leaves, so that a resumed run knows it. A GPU's bits differ anyway, and the first is spared.
        """
        step = next(iter(self.learners.values())).state.step
        if self.engine.queues:
            now = time.monotonic() - self._saved_at > _SECONDS_BETWEEN_SAVES
        else:
            now = step % self.config.checkpoint_steps == 0 or bool(over and not self.alone)
        if now:
            self._each(_saved, [index for index in self.learners if index not in over])
            self._saved_at = time.monotonic()
        if not self.alone:
            self._each(_saved, over)

    def _dismiss(self, indices: Sequence[int]) -> None:
        for index in indices:
            self._leave(index, self.learners[index].result())

    def _leave(self, index: int, outcome: Trained) -> None:
        # Steps that are not taken count as done, so that the bar ends full.
        self.tell(Event(index, self.learners.pop(index).steps_left, outcome=outcome))


def _saved(learner: Learner) -> bool:
    learner.save()
    return True
