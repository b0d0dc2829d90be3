"""One user in a cohort: their own order of rows, learning rate, optimizer, early stop, best step and checkpoint.

Every step is a function of the state before it and of (seed, step): nothing is drawn from a running random generator (there is no
dropout), so a run that was killed continues from its last checkpoint to the same bits.
"""

from __future__ import annotations

import json
import math
import random
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdcda_export.decoder import Lora
from cdcda_export.errors import CdcdaError
from cdcda_export.manifest import write_atomic
from cdcda_export.verify import Probe
from cdcda_mobile.config import SCHEDULES, TrainConfig
from cdcda_mobile.training.lora import Layout
from cdcda_mobile.training.packing import Row

CHECKPOINT = "checkpoint-{step}.safetensors"


@dataclass(frozen=True)
class Example:
    """One training record, and its weight in the loss."""

    probe: Probe
    weight: float = 1.0
    synthetic: bool = False

    def row(self) -> Row:
        """Return it as a row to train on."""
        return row_of(self.probe, self.weight)


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


@dataclass
class State:
    """All that a resumed run needs besides the examples; ``parts`` is how many passes a batch is cut into."""

    step: int = 0
    best_step: int = 0
    best_nll: float = math.inf
    bad_evaluations: int = 0
    stopped: bool = False
    parts: int = 1
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainResult:
    """The best adapter, by module name, and how it came about."""

    layers: dict[str, Lora]
    best: Tensor
    state: State
    total_steps: int

    def metrics(self) -> dict[str, Any]:
        """Return what the manifest and the card say of it; ``tokens`` counts those of the rows, computed once or shared."""
        scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, kilobytes on Linux
        state = self.state
        return {
            "steps": state.step,
            "planned_steps": self.total_steps,
            "best_step": state.best_step,
            "best_validation_nll": None if math.isinf(state.best_nll) else state.best_nll,
            "curve": state.curve,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "cpu_seconds": state.cpu_seconds,
            "tokens_per_second": state.tokens / state.seconds if state.seconds else 0.0,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
        }


# What becomes of an order.
Trained = TrainResult | CdcdaError


class Learner:
    """The state of one order; resumes from its directory if a checkpoint is there.

    Args:
        order: what to train.
        config: see ``TrainConfig``.
        layout: of the parameters.
        flat: the parameters, shape (size,): one row of the group's stacked tensor; filled here.
        parts: passes that a batch is cut into, unless a checkpoint says otherwise.
    """

    def __init__(self, order: Order, config: TrainConfig, layout: Layout, flat: Tensor, parts: int) -> None:
        self.order, self.config, self.layout, self.flat = order, config, layout, flat
        self.state = State(parts=parts)
        self.gradient = torch.zeros_like(flat)
        with torch.no_grad():
            flat.copy_(layout.initial(order.seed))
        self.best = flat.clone()
        flat.grad = self.gradient
        self.optimizer = torch.optim.AdamW([flat], lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        self.validation = [row_of(probe) for probe in order.validation]
        self.phases = self._phases()
        self.total_steps = sum(self._steps(rows) for rows in self.phases) * config.epochs
        per_epoch = math.ceil(self.total_steps / config.epochs)
        self.steps_per_epoch = per_epoch
        self.evaluate_every = max(1, math.ceil(per_epoch / max(1, config.evaluations_per_epoch)))

    @property
    def over(self) -> bool:
        """Whether there is no step left."""
        return self.state.stopped or self.state.step >= self.total_steps

    @property
    def due(self) -> bool:
        """Whether the validation records are to be asked at this step."""
        return self.state.step % self.evaluate_every == 0 or self.state.step == self.total_steps

    def _phases(self) -> list[list[Row]]:
        real = [e.row() for e in self.order.examples if not e.synthetic]
        synthetic = [e.row() for e in self.order.examples if e.synthetic]
        phases = [synthetic, real] if self.order.schedule == "synthetic-first" else [[e.row() for e in self.order.examples]]
        return [rows for rows in phases if rows]

    def _steps(self, rows: Sequence[Row]) -> int:
        return math.ceil(len(rows) / self.config.batch_size)

    def batch(self) -> list[Row]:
        """Return the rows of the next step."""
        step, size = self.state.step, self.config.batch_size
        for phase, rows in enumerate(self.phases):
            steps = self._steps(rows) * self.config.epochs
            if step >= steps:
                step -= steps
                continue
            epoch, index = divmod(step, self._steps(rows))
            order = list(range(len(rows)))
            random.Random(f"{self.order.seed}/{phase}/{epoch}").shuffle(order)
            return [rows[i] for i in order[index * size : (index + 1) * size]]
        raise IndexError(self.state.step)

    def learning_rate(self) -> float:
        """Return the rate of the next step: linear warm-up, then a cosine down to 5 %."""
        step = self.state.step
        warmup = max(1, round(self.total_steps * self.config.warmup_fraction))
        if step < warmup:
            return self.config.learning_rate * (step + 1) / warmup
        rest = (step - warmup) / max(1, self.total_steps - warmup)
        return self.config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * rest)))

    def update(self, tokens: int) -> None:
        """Clip the gradient and take a step; ``tokens`` is how many the rows had. Nothing here waits for a GPU."""
        norm = self.gradient.norm()
        self.gradient.mul_(torch.clamp(self.config.clip / (norm + 1e-6), max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with torch.no_grad():
            self.optimizer.step()
        self.state.tokens += tokens
        self.state.step += 1

    def check(self, loss: float) -> None:
        """Refuse a loss that is no number.

        Raises:
            CdcdaError: it is none.
        """
        if not math.isfinite(loss):
            where = f"user {self.order.user} became {loss} at step {self.state.step}"
            raise CdcdaError(f"The training loss of {where}; lower train.learning_rate in a recipe.")

    def judge(self, nll: float | None, train_loss: float | None) -> None:
        """Note a point of the curve; keep the best step, or stop when patience is at its end.

        Args:
            nll: mean per answer token of the validation records, in nats; None without such.
            train_loss: of the last step; None before the first.
        """
        state = self.state
        point: dict[str, float] = {"step": state.step, "epoch": state.step / self.steps_per_epoch}
        if train_loss is not None:
            point["train_loss"] = train_loss
        if nll is not None:
            point["validation_nll"] = nll
            if nll < state.best_nll:
                state.best_nll, state.best_step, state.bad_evaluations = nll, state.step, 0
                self.best.copy_(self.flat.detach())
            else:
                state.bad_evaluations += 1
                state.stopped = state.bad_evaluations >= self.config.patience
        state.curve.append(point)

    def result(self) -> TrainResult:
        """Return what was trained; without validation records the last step is the best."""
        if not self.validation:
            self.best.copy_(self.flat.detach())
            self.state.best_step = self.state.step
        return TrainResult(self.layout.layers(self.best), self.best, self.state, self.total_steps)

    # Checkpoints: the last two are kept, so that a group of users finds a step that all of them have.

    def save(self) -> None:
        """Write a checkpoint of this step."""
        from safetensors.torch import save

        moments = self.optimizer.state[self.flat]
        tensors = {
            "flat": self.flat,
            "best": self.best,
            "exp_avg": moments["exp_avg"],
            "exp_avg_sq": moments["exp_avg_sq"],
            "optimizer_step": moments["step"],
        }
        payload = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {"state": json.dumps(vars(self.state))})
        path = self.order.directory / CHECKPOINT.format(step=self.state.step)
        write_atomic(path, payload)
        for old in self._checkpoints()[:-2]:
            old.unlink(missing_ok=True)

    def steps_saved(self) -> set[int]:
        """Return the steps that a run may resume from; 0 is always one."""
        return {0, *(int(path.stem.rpartition("-")[2]) for path in self._checkpoints())}

    def resume(self, step: int) -> None:
        """Continue from the checkpoint of a step; 0 is the beginning."""
        from safetensors import safe_open

        if step == 0:
            return
        path = self.order.directory / CHECKPOINT.format(step=step)
        with safe_open(path, framework="pt", device=str(self.flat.device)) as file:
            self.state = State(**json.loads(file.metadata()["state"]))
            with torch.no_grad():
                self.flat.copy_(file.get_tensor("flat"))
            self.best = file.get_tensor("best")
            self.optimizer.state[self.flat] = {
                "step": file.get_tensor("optimizer_step").to(self.flat.device),
                "exp_avg": file.get_tensor("exp_avg"),
                "exp_avg_sq": file.get_tensor("exp_avg_sq"),
            }

    def _checkpoints(self) -> list[Path]:
        found = self.order.directory.glob(CHECKPOINT.format(step="*"))
        return sorted((p for p in found if p.stem.rpartition("-")[2].isdecimal()), key=lambda p: int(p.stem.rpartition("-")[2]))
