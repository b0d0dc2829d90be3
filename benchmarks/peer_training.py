"""PEFT and transformers' Trainer, one user after another, as people do it: the peer of ``train_speed.py``.

What could differ and must not is taken from ours, by way of ``Learner``: the rows of every optimizer step, the learning rate of every
step, the first values of the adapter, when validation records are asked. What the peer needs to be at its best is given to it: rows of a
step sorted by length, no KV cache, no checkpoints (ours writes its own), one base model loaded once for all users.

Trainer's ``group_by_length`` draws rows at random, ``8 * (n // 32)`` at a time, and sorts each of these by length; with 32 to 63 records
that is 8 rows, so it makes the padding that sorting the rows of our steps makes. ``own_grouping`` uses it as it is, for comparison.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Sampler
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from cdcda_export.gguf import GgufFile
from cdcda_export.tokenizer import bpe_tokenizer
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.training.lora import Layout
from cdcda_mobile.training.packing import Row
from cdcda_mobile.training.schedule import Order, row_of
from training_profile import Schedule, schedule_of

_IGNORED = -100


@dataclass(frozen=True)
class PeerOptions:
    """How the peer trains.

    Attributes:
        batch: rows of one forward pass; accumulated up to the rows of a step.
        own_grouping: Trainer's ``group_by_length`` chooses the rows of a step, and ours do not count.
    """

    batch: int = 8
    own_grouping: bool = False


@dataclass
class PeerRun:
    """One user's training: best validation loss, losses and seconds of every step, seconds of everything."""

    best: float
    seconds: float
    curve: list[dict[str, float]]
    steps: list[float] = field(default_factory=list)


def layout_of(model: PreTrainedModel, config: TrainConfig) -> Layout:
    """Return our layout of the parameters for a transformers model: it asks names and shapes only."""
    weights = model.state_dict()
    linear = [name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight")]
    shape = SimpleNamespace(layers=model.config.num_hidden_layers)
    stand_in: Any = SimpleNamespace(linear=linear, weights=weights, shape=shape)
    return Layout(stand_in, config.targets, config.rank, config.alpha)


def item_of(row: Row) -> dict[str, list[int]]:
    """Return a row as Trainer reads it: all tokens, and labels on the answer only."""
    return {
        "input_ids": [*row.ids, row.targets[-1]],
        "attention_mask": [1] * (len(row.ids) + 1),
        "labels": [_IGNORED] * (row.first + 1) + list(row.targets),
    }


class _InOrder(Sampler[int]):
    """Gives every epoch its own order."""

    def __init__(self, epochs: Sequence[Sequence[int]]) -> None:
        self.epochs, self.epoch = epochs, 0

    def __len__(self) -> int:
        return len(self.epochs[0])

    def __iter__(self) -> Iterator[int]:
        order = self.epochs[self.epoch % len(self.epochs)]
        self.epoch += 1
        return iter(order)


class _SameBatches(Trainer):
    """Takes the rows of our steps, each step's sorted by length."""

    order: _InOrder | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order if self.order is not None else super()._get_train_sampler(train_dataset)


class _Clock(TrainerCallback):
    """Notes the seconds of every optimizer step, and asks the validation records after the last one, as ours does."""

    def __init__(self) -> None:
        self.began, self.steps = 0.0, []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin a step."""
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End a step."""
        self.steps.append(time.perf_counter() - self.began)
        if state.global_step == state.max_steps:
            control.should_evaluate = True


class Peer:
    """Trains users one after another beside one frozen base.

    Args:
        base: the model's file, for the padding token.
        model: the frozen base as ``load_base_model`` returns it.
        config: rank, rates, steps.
        options: what is the peer's own to choose.
    """

    def __init__(self, base: GgufFile, model: PreTrainedModel, config: TrainConfig, options: PeerOptions) -> None:
        self.model, self.config, self.options = model, config, options
        tokens = base.get_value("tokenizer.ggml.tokens")
        pad = base.get_value("tokenizer.ggml.padding_token_id", base.get_value("tokenizer.ggml.eos_token_id"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe_tokenizer(base).fast, pad_token=tokens[int(pad)])
        self.collator = DataCollatorForSeq2Seq(tokenizer)
        logging.set_verbosity_error()  # Trainer would say that the best weights are not put back: no matter here
        self.model.config.use_cache = False  # Trainer leaves it on, and every pass fills a cache that nobody reads
        self.layout = layout_of(model, config)

    def train(self, order: Order) -> PeerRun:
        """Train one user's adapter and save it."""
        # What our trainer would do is looked up before the clock starts: the peer would not need it.
        schedule = schedule_of(order, self.config, self.layout)
        train, sampler = self._data(order, schedule)
        validation = [item_of(row) for row in schedule.validation]
        began = time.perf_counter()
        torch.manual_seed(order.seed)
        peft_config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=list(self.config.targets),
        )
        model = get_peft_model(self.model, peft_config)
        self._initialise(model, schedule.initial)
        trainable = [p for p in model.parameters() if p.requires_grad]
        rate = self.config.learning_rate
        optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=self.config.weight_decay, fused=True)
        shares = [value / rate for value in schedule.rates]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shares[min(step, len(shares) - 1)])
        clock = _Clock()
        trainer = _SameBatches(
            model=model,
            args=self._arguments(order, schedule),
            train_dataset=train,
            eval_dataset=validation,
            data_collator=self.collator,
            optimizers=(optimizer, scheduler),
            callbacks=[clock, EarlyStoppingCallback(self.config.patience)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.order = None if self.options.own_grouping else sampler
        trainer.train()
        model.save_pretrained(str(order.directory))
        self.model = model.unload()
        seconds = time.perf_counter() - began
        curve = _curve(trainer.state.log_history)
        return PeerRun(min(p["validation_nll"] for p in curve if "validation_nll" in p), seconds, curve, clock.steps)

    def _data(self, order: Order, schedule: Schedule) -> tuple[list[dict[str, list[int]]], _InOrder]:
        """Return the training records and, for every epoch, their places in the order of our steps."""
        rows = [row_of(example.probe, example.weight) for example in order.examples]
        places = {row: at for at, row in enumerate(rows)}
        per_epoch = len(schedule.rows) // self.config.epochs
        epochs = []
        for epoch in range(self.config.epochs):
            steps = schedule.rows[epoch * per_epoch : (epoch + 1) * per_epoch]
            epochs.append([places[row] for step in steps for row in sorted(step, key=lambda row: -len(row.ids))])
        return [item_of(row) for row in rows], _InOrder(epochs)

    def _initialise(self, model: torch.nn.Module, flat: torch.Tensor) -> None:
        """Give the adapter the values that ours starts from."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, lora in self.layout.layers(flat).items():
                parameters[f"base_model.model.{name}.lora_A.default.weight"].copy_(lora.down)
                parameters[f"base_model.model.{name}.lora_B.default.weight"].copy_(lora.up)

    def _arguments(self, order: Order, schedule: Schedule) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(order.directory),
            use_cpu=True,
            per_device_train_batch_size=self.options.batch,
            gradient_accumulation_steps=self.config.batch_size // self.options.batch,
            per_device_eval_batch_size=self.config.batch_size,
            num_train_epochs=self.config.epochs,
            max_grad_norm=self.config.clip,
            group_by_length=True,
            eval_strategy="steps",
            eval_steps=schedule.evaluate_every,
            eval_on_start=True,
            prediction_loss_only=True,
            save_strategy="no",
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=order.seed,
        )


def _curve(history: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Return Trainer's log as points of a curve like ours."""
    points: dict[int, dict[str, float]] = {}
    for entry in history:
        point = points.setdefault(int(entry["step"]), {"step": int(entry["step"])})
        for name, key in (("loss", "train_loss"), ("eval_loss", "validation_nll")):
            if name in entry:
                point[key] = entry[name]
    return [points[step] for step in sorted(points)]
