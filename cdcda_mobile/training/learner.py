"""One user in a cohort: their own optimizer, early stop, best step and checkpoint.

Every step is a function of the state before it and of (seed, step): nothing is drawn from a running random generator (there is no
dropout), so a run that was killed continues from its last checkpoint to the same bits.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdcda_export.decoder import Lora
from cdcda_export.errors import CdcdaError
from cdcda_export.manifest import write_atomic
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.training.lora import Layout
from cdcda_mobile.training.packing import Row
from cdcda_mobile.training.schedule import Order, Schedule, row_of

CHECKPOINT = "checkpoint-{step}.safetensors"
_FORMAT = 1


@dataclass
class State:
    """All that a resumed run needs besides the examples; ``parts`` is how many passes a batch is cut into, ``failed`` why it ended."""

    step: int = 0
    best_step: int = 0
    best_nll: float = math.inf
    bad_evaluations: int = 0
    stopped: bool = False
    failed: str = ""
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
        """Return what the manifest and the card say of it.

        ``tokens`` counts those of the training rows, computed once or shared; seconds include evaluations and checkpoints; the peak is
        the process's.
        """
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
    """The state of one order.

    Args:
        order: what to train.
        config: see ``TrainConfig``.
        layout: of the parameters.
        flat: the parameters, shape (size,): one row of the group's stacked tensor; filled here.
        parts: passes that a batch is cut into, unless a checkpoint says otherwise.
    """

    def __init__(self, order: Order, config: TrainConfig, layout: Layout, flat: Tensor, parts: int) -> None:
        self.order, self.config, self.layout, self.flat, self.parts = order, config, layout, flat, parts
        self.schedule = Schedule(order, config)
        self.validation = [row_of(probe) for probe in order.validation]
        self.gradient = torch.zeros_like(flat)
        self.start()

    def start(self) -> None:
        """Go to the beginning."""
        self.state = State(parts=self.parts)
        with torch.no_grad():
            self.flat.copy_(self.layout.initial(self.order.seed))
        self.best = self.flat.clone()
        self.flat.grad = self.gradient
        config = self.config
        self.optimizer = torch.optim.AdamW([self.flat], lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)

    @property
    def over(self) -> bool:
        """Whether there is no step left."""
        return bool(self.state.failed) or self.state.stopped or self.state.step >= self.schedule.total_steps

    @property
    def steps_left(self) -> int:
        """How many steps there would be if nothing stopped it early."""
        return self.schedule.total_steps - self.state.step

    @property
    def due(self) -> bool:
        """Whether the validation records are to be asked at this step."""
        return self.state.step % self.schedule.evaluate_every == 0 or not self.steps_left

    def batch(self) -> list[Row]:
        """Return the rows of the next step."""
        return self.schedule.batch(self.state.step)

    def update(self, tokens: int) -> None:
        """Clip the gradient and take a step; ``tokens`` is how many the rows had. Nothing here waits for a GPU."""
        norm = self.gradient.norm()
        self.gradient.mul_(torch.clamp(self.config.clip / (norm + 1e-6), max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(self.state.step)
        with torch.no_grad():
            self.optimizer.step()
        self.state.tokens += tokens
        self.state.step += 1

    def check(self, loss: float) -> None:
        """Note that a loss is no number: the user has failed then."""
        if not math.isfinite(loss):
            where = f"user {self.order.user} became {loss} at step {self.state.step}"
            self.state.failed = f"The training loss of {where}; lower train.learning_rate in a recipe."

    def judge(self, nll: float | None, train_loss: float | None) -> None:
        """Note a point of the curve; keep the best step, or stop when patience is at its end.

        Args:
            nll: mean per answer token of the validation records, in nats; None without such.
            train_loss: of the last step; None before the first.
        """
        state = self.state
        point: dict[str, float] = {"step": state.step, "epoch": state.step / self.schedule.steps_per_epoch}
        if train_loss is not None:
            point["train_loss"] = train_loss
        if nll is not None:
            point["validation_nll"] = nll
            if nll < state.best_nll:
                state.best_nll, state.best_step, state.bad_evaluations = nll, state.step, 0
                self.best.copy_(self.flat.detach())
            else:
                state.bad_evaluations += state.step > self.schedule.last_phase
                state.stopped = state.bad_evaluations >= self.config.patience
        state.curve.append(point)

    def result(self) -> Trained:
        """Return what was trained, or why it failed; without validation records the last step is the best."""
        if not self.state.failed and not self.validation:
            self.best.copy_(self.flat.detach())
            self.state.best_step = self.state.step
        if not self.state.failed and not bool(torch.isfinite(self.best).all()):
            self.check(math.nan)
        if self.state.failed:
            return CdcdaError(self.state.failed)
        return TrainResult(self.layout.layers(self.best), self.best, self.state, self.schedule.total_steps)

    # Checkpoints: the last two are kept, so that a group of users finds a step that all of them have.

    def save(self) -> None:
        """Write a checkpoint of this step.

        Raises:
            CdcdaError: it cannot be written.
        """
        from safetensors.torch import save

        moments = self.optimizer.state.get(self.flat) or {}
        tensors = {"flat": self.flat, "best": self.best, **{name: moments[name] for name in ("exp_avg", "exp_avg_sq", "step") if moments}}
        metadata = {"format": str(_FORMAT), "state": json.dumps(vars(self.state))}
        payload = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)
        write_atomic(self._path(self.state.step), payload)
        for old in self._checkpoints()[:-2]:
            old.unlink(missing_ok=True)

    def steps_saved(self) -> set[int]:
        """Return the steps that a run may resume from; 0 is always one."""
        return {0, *map(_step_of, self._checkpoints())}

    def resume(self, step: int) -> bool:
        """Continue from the checkpoint of a step (0 is the beginning), and forget later ones; say whether it was whole."""
        for later in self._checkpoints():
            if _step_of(later) > step:
                later.unlink(missing_ok=True)
        self.start()
        if step == 0 or self._load(step):
            return True
        self._path(step).unlink(missing_ok=True)
        self.start()
        return False

    def end(self) -> bool:
        """Go to the newest checkpoint if it is of an end: of a user who was through, or had failed, before the others of the group."""
        newest = max(self.steps_saved())
        if newest and self._load(newest) and self.over:
            return True
        self.start()
        return False

    def _load(self, step: int) -> bool:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(step), framework="pt", device=str(self.flat.device)) as file:
                metadata = file.metadata()
                if metadata["format"] != str(_FORMAT):
                    return False
                self.state = State(**json.loads(metadata["state"]))
                found = {name: file.get_tensor(name) for name in ("flat", "best", "exp_avg", "exp_avg_sq", "step")}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return False
        if any(found[name].shape != self.flat.shape for name in ("flat", "best", "exp_avg", "exp_avg_sq")):
            return False
        with torch.no_grad():
            self.flat.copy_(found["flat"])
        self.best = found["best"]
        self.optimizer.state[self.flat] = {name: found[name] for name in ("step", "exp_avg", "exp_avg_sq")}
        return True

    def _path(self, step: int) -> Path:
        return self.order.directory / CHECKPOINT.format(step=step)

    def _checkpoints(self) -> list[Path]:
        found = self.order.directory.glob(CHECKPOINT.format(step="*"))
        return sorted((path for path in found if path.stem.rpartition("-")[2].isdecimal()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])
