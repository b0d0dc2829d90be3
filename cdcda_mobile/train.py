"""Fine-tune one user's LoRA adapter: loss on the answer only, checkpointed, stopped early, the same result after any kill.

Every step is a function of the state before it and of (seed, step): nothing is drawn from a running random generator (there is no
dropout), so a run that was killed continues from its last checkpoint to the same bits.
"""

from __future__ import annotations

import json
import math
import random
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from cdcda_export.decoder import Decoder, keep_freed_memory
from cdcda_export.errors import CdcdaError
from cdcda_export.manifest import write_atomic
from cdcda_export.progress import Progress
from cdcda_export.runtime import cpu_threads
from cdcda_export.verify import Probe
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.lora import TrainableLora

CHECKPOINT = "checkpoint.safetensors"
_EVALUATION_ROWS = 8


@dataclass(frozen=True)
class Example:
    """One training row and its weight in the loss."""

    probe: Probe
    weight: float = 1.0


@dataclass
class State:
    """All that a resumed run needs besides the examples."""

    step: int = 0
    best_step: int = 0
    best_nll: float = math.inf
    bad_evaluations: int = 0
    stopped: bool = False
    seconds: float = 0.0
    tokens: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainResult:
    """The best adapter and how it came about."""

    lora: TrainableLora
    best: torch.Tensor
    state: State
    total_steps: int

    def metrics(self) -> dict[str, Any]:
        """Return what the manifest and the card say of it."""
        scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, kilobytes on Linux
        return {
            "steps": self.state.step,
            "planned_steps": self.total_steps,
            "best_step": self.state.best_step,
            "best_validation_nll": None if math.isinf(self.state.best_nll) else self.state.best_nll,
            "curve": self.state.curve,
            "tokens": self.state.tokens,
            "seconds": self.state.seconds,
            "tokens_per_second": self.state.tokens / self.state.seconds if self.state.seconds else 0.0,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
        }


class Trainer:
    """Trains one adapter; ``run`` resumes from ``directory`` if a checkpoint of the same stage is there.

    Args:
        decoder: the frozen base.
        examples: training rows, real and synthetic.
        validation: held-out rows that decide the best step; may be empty (then the last step is kept).
        config: see ``TrainConfig``.
        seed: decides initialisation and order.
        directory: where the checkpoint lives.
    """

    def __init__(
        self,
        decoder: Decoder,
        examples: Sequence[Example],
        validation: Sequence[Probe],
        config: TrainConfig,
        seed: int,
        directory: Path,
    ) -> None:
        keep_freed_memory()
        torch.set_num_threads(config.threads or cpu_threads())
        self.decoder, self.examples, self.validation = decoder, list(examples), list(validation)
        self.config, self.seed, self.directory = config, seed, directory
        self.lora = TrainableLora(decoder, config.targets, config.rank, config.alpha, seed)
        self.lora.flat.grad = self.lora.gradient
        self.optimizer = torch.optim.AdamW([self.lora.flat], lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        self.best = self.lora.flat.clone()
        self.state = State()
        self.steps_per_epoch = math.ceil(len(self.examples) / config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.evaluate_every = max(1, math.ceil(self.steps_per_epoch / max(1, config.evaluations_per_epoch)))

    def run(self, progress: Progress) -> TrainResult:
        """Train to the end, or to the early stop.

        Raises:
            CdcdaError: the loss became NaN.
        """
        self._load_checkpoint()
        progress.start("training the adapter", self.total_steps, "steps")
        if self.state.step:
            progress.advance(self.state.step, "resumed")
        elif self.validation:
            self._evaluate(train_loss=None)
        while self.state.step < self.total_steps and not self.state.stopped:
            began = time.monotonic()
            loss = self._step()
            self.state.step += 1
            if self.state.step % self.evaluate_every == 0 or self.state.step == self.total_steps:
                self._evaluate(loss)
            self.state.seconds += time.monotonic() - began
            ended = self.state.step == self.total_steps or self.state.stopped
            if self.state.step % self.config.checkpoint_steps == 0 and not ended:
                self._save_checkpoint()
            progress.advance(note=f"loss {loss:.3f}")
        note = f"validation NLL {self.state.best_nll:.3f} at step {self.state.best_step}" if self.validation else ""
        progress.done(note)
        if not self.validation:
            self.best, self.state.best_step = self.lora.flat.clone(), self.state.step
        return TrainResult(self.lora, self.best, self.state, self.total_steps)

    def _batch(self, step: int) -> list[Example]:
        epoch, index = divmod(step, self.steps_per_epoch)
        order = list(range(len(self.examples)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        size = self.config.batch_size
        return [self.examples[i] for i in order[index * size : (index + 1) * size]]

    def _learning_rate(self, step: int) -> float:
        warmup = max(1, round(self.total_steps * self.config.warmup_fraction))
        if step < warmup:
            return self.config.learning_rate * (step + 1) / warmup
        rest = (step - warmup) / max(1, self.total_steps - warmup)
        return self.config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * rest)))

    def _step(self) -> float:
        batch = self._batch(self.state.step)
        loss = self._loss(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CdcdaError(f"The training loss became {value} at step {self.state.step}; lower train.learning_rate in a recipe.")
        self.lora.gradient.zero_()
        loss.backward()
        norm = self.lora.gradient.norm()
        self.lora.gradient.mul_(torch.clamp(self.config.clip / (norm + 1e-6), max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.state.step)
        with torch.no_grad():
            self.optimizer.step()
        self.state.tokens += sum(len(e.probe.ids) for e in batch)
        return value

    def _loss(self, batch: Sequence[Example]) -> torch.Tensor:
        positions, targets = flat_targets([e.probe for e in batch])
        weights = torch.tensor([e.weight for e in batch for _ in e.probe.answer], device=self.decoder.device)
        logits = self.decoder.logits([e.probe.ids[:-1] for e in batch], self.lora.layers, positions.to(self.decoder.device))
        losses = F.cross_entropy(logits, targets.to(self.decoder.device), reduction="none")
        return (losses * weights).sum() / weights.sum()

    def _evaluate(self, train_loss: float | None) -> None:
        point: dict[str, float] = {"step": self.state.step, "epoch": self.state.step / self.steps_per_epoch}
        if train_loss is not None:
            point["train_loss"] = train_loss
        if self.validation:
            nll = mean_nll(self.decoder, self.lora, self.validation)
            point["validation_nll"] = nll
            if nll < self.state.best_nll:
                self.state.best_nll, self.state.best_step, self.state.bad_evaluations = nll, self.state.step, 0
                self.best = self.lora.flat.detach().clone()
            else:
                self.state.bad_evaluations += 1
                self.state.stopped = self.state.bad_evaluations >= self.config.patience
        self.state.curve.append(point)

    def _save_checkpoint(self) -> None:
        from safetensors.torch import save

        moments = self.optimizer.state[self.lora.flat]
        tensors = {
            "flat": self.lora.flat.detach(),
            "best": self.best,
            "exp_avg": moments["exp_avg"],
            "exp_avg_sq": moments["exp_avg_sq"],
            "optimizer_step": moments["step"],
        }
        payload = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {"state": json.dumps(vars(self.state))})
        write_atomic(self.directory / CHECKPOINT, payload)

    def _load_checkpoint(self) -> None:
        from safetensors import safe_open

        path = self.directory / CHECKPOINT
        if not path.exists():
            return
        with safe_open(path, framework="pt", device=str(self.decoder.device)) as file:
            self.state = State(**json.loads(file.metadata()["state"]))
            with torch.no_grad():
                self.lora.flat.copy_(file.get_tensor("flat"))
            self.best = file.get_tensor("best")
            self.optimizer.state[self.lora.flat] = {
                "step": file.get_tensor("optimizer_step").cpu(),
                "exp_avg": file.get_tensor("exp_avg"),
                "exp_avg_sq": file.get_tensor("exp_avg_sq"),
            }


def flat_targets(probes: Sequence[Probe]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where answers are predicted in rows laid end to end (each without its last token), and the tokens to predict."""
    positions: list[int] = []
    targets: list[int] = []
    at = 0
    for probe in probes:
        where = probe.answer_positions()
        positions.extend(range(at + where.start, at + where.stop))
        targets.extend(probe.answer)
        at += len(probe.ids) - 1
    return torch.tensor(positions), torch.tensor(targets)


@torch.no_grad()
def mean_nll(decoder: Decoder, lora: TrainableLora | None, probes: Sequence[Probe]) -> float:
    """Return the mean negative log likelihood per answer token, in nats."""
    total, count = 0.0, 0
    for start in range(0, len(probes), _EVALUATION_ROWS):
        part = probes[start : start + _EVALUATION_ROWS]
        positions, targets = flat_targets(part)
        logits = decoder.logits([p.ids[:-1] for p in part], lora.layers if lora else None, positions.to(decoder.device))
        total += float(F.cross_entropy(logits, targets.to(decoder.device), reduction="sum"))
        count += len(targets)
    return total / count
