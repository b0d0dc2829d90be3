"""The one home of every default of the cloud half; flags and recipes are derived from these classes.

A field's ``help`` is the text of its flag; fields without ``help`` can be set in a recipe only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from cdcda_export.errors import ConfigError, did_you_mean


def setting(default: Any, help: str = "", metavar: str | None = None) -> Any:
    """Declare a config field with its default and the help text of its flag."""
    metadata = {"help": help, "metavar": metavar}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class HistoryConfig:
    """Where a user's records come from and how they are split by time."""

    data: str = setting("samples", "samples, a LaMP directory, a .jsonl/.csv/.parquet file, or an SQLAlchemy URL", "SOURCE")
    task: str = setting("", "task of the records, where the source has no task column (see README, Tasks)", "NAME")
    map: dict[str, str] = setting({}, "column names of the source, as user=author,input=body,output=title,date=sent", "PAIRS")
    table: str = setting("", "SQL table or view to read", "NAME")
    query: str = setting("", "SQL query to read instead of a table; use :user where the user id belongs", "SQL")
    min_records: int = setting(20)
    test_fraction: float = setting(0.2)
    validation_fraction: float = setting(0.1)

    def __post_init__(self) -> None:
        if not 0 < self.test_fraction < 0.9 or not 0 <= self.validation_fraction < 0.9:
            raise ConfigError("history.test_fraction and history.validation_fraction must lie between 0 and 0.9.")


@dataclass(frozen=True)
class TeacherConfig:
    """Which server LLM writes the synthetic records, and how much it may cost."""

    base_url: str = setting("", "OpenAI-compatible endpoint (default: OPENAI_BASE_URL, else a local llama.cpp server)", "URL")
    model: str = setting("", "model name at that endpoint", "NAME")
    gguf: str = setting("", "GGUF for the local teacher (default: the base model)", "FILE")
    timeout_s: float = setting(120.0)
    retries: int = setting(5)
    concurrency: int = setting(4)
    max_requests: int = setting(0, "stop after this many paid requests (0: no limit)", "N")
    token_budget: int = setting(0, "stop after this many prompt+completion tokens (0: no limit)", "N")

    def __post_init__(self) -> None:
        if self.base_url and self.gguf:
            raise ConfigError("--teacher-base-url and --teacher-gguf name two teachers; keep one of them.")
        if not self.timeout_s > 0 or self.retries < 0 or self.concurrency < 1 or self.max_requests < 0 or self.token_budget < 0:
            raise ConfigError("teacher.timeout_s must be above 0, concurrency 1 or more, retries, max_requests, token_budget not negative.")


# The ways to ask (augmentation/prompts.py) and the rules that can be left out (augmentation/select.py); a test holds them to these names.
STRATEGY_NAMES = ("counterpart", "new", "rewrite", "answer")
RULE_NAMES = ("length", "text", "language", "label", "copy", "duplicate", "echo")


@dataclass(frozen=True)
class AugmentConfig:
    """How many synthetic records, and how they are asked for and kept."""

    keep: int = setting(32, "synthetic records to keep (0: real records only)", "N")
    # Never more than so many for each real one.
    per_real: float = setting(4.0)
    # Candidates for each record that is kept: the best of them are. And which part of them likeness leaves for diversity to choose from.
    pool: float = setting(1.5)
    likeness: str = setting("", "adapter: rank candidates by how much the user's own adapter favours them (default: no ranking)", "HOW")
    alike: float = setting(0.8)
    strategies: list[str] = setting(["counterpart", "new"])
    # Rules that are left out, by name (cdcda_mobile/augmentation/select.py).
    without: list[str] = setting([])
    inputs: str = setting("", "JSONL {task, input} of others' inputs; needs 'answer' in augment.strategies of a --recipe", "FILE")
    style: bool = setting(True)
    examples: int = setting(12)
    temperature: float = setting(0.9)
    top_p: float = setting(0.95)
    max_tokens: int = setting(160)
    max_attempts: int = setting(6)
    near_duplicate: float = setting(0.6)
    redact: bool = setting(False, "hide structured identifiers, secrets and many names from the teacher (docs/privacy.md says how many)")
    redact_names: str = setting("", "spaCy pipeline that finds names for --redact, or plain (default: the best here)", "NAME")

    def __post_init__(self) -> None:
        if self.keep < 0 or self.examples < 1 or self.max_attempts < 1 or self.max_tokens < 1:
            raise ConfigError("augment.keep must be 0 or more, augment.examples, max_attempts and max_tokens at least 1.")
        if not self.per_real > 0 or not 1 <= self.pool < math.inf or not 0 < self.alike <= 1:
            raise ConfigError("augment.per_real must be above 0, augment.pool a number from 1, augment.alike above 0 and at most 1.")
        if self.likeness not in ("", "adapter"):
            raise ConfigError(f"There is no likeness '{self.likeness}'. One of: adapter, or '' for none.")
        if "answer" in self.strategies and not self.inputs:
            raise ConfigError("The strategy 'answer' needs inputs to answer: name them with augment.inputs.")
        if self.inputs and "answer" not in self.strategies:
            raise ConfigError("Nothing answers the inputs of augment.inputs; add 'answer' to augment.strategies in a --recipe.")
        for kind, given, known in (("strategy", self.strategies, STRATEGY_NAMES), ("rule", self.without, RULE_NAMES)):
            for name in given:
                if name not in known:
                    raise ConfigError(f"There is no {kind} '{name}' (augment).{did_you_mean(name, known)}")
        if self.redact_names and not self.redact:
            raise ConfigError("--redact-names says how --redact finds names; give --redact too.")


# How synthetic and real records follow each other: shuffled, or every pass over the synthetic ones before the first over the real ones.
SCHEDULES = ("mixed", "synthetic-first")


@dataclass(frozen=True)
class TrainConfig:
    """LoRA fine-tuning of one user's adapter."""

    rank: int = setting(8, "LoRA rank", "R")
    alpha: float = setting(16.0)
    targets: list[str] = setting(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    learning_rate: float = setting(2e-3)
    warmup_fraction: float = setting(0.1)
    weight_decay: float = setting(0.0)
    clip: float = setting(1.0)
    batch_size: int = setting(8)
    epochs: int = setting(2, "passes over the training records", "N")
    # Above 0: the number of steps, however many records there are; and the steps between two looks at the validation records.
    max_steps: int = setting(0)
    evaluate_every: int = setting(0)
    patience: int = setting(3)
    evaluations_per_epoch: int = setting(2)
    max_tokens: int = setting(512)
    # More than one weight or schedule: each pair is trained, and the real validation records choose.
    synthetic_weight: list[float] = setting([0.3])
    synthetic_schedule: list[str] = setting(["mixed"])
    warm_start: str = setting("", "continue from a shared adapter (cdcda train --shared)", "DIR")
    # Layers below it stay as they are: half the work and less of the person. What comes out of them is computed once.
    first_layer: int = setting(0)
    checkpoint_steps: int = setting(5)
    threads: int = setting(0)
    cohort: str = setting("auto", "users trained together, auto: as memory allows", "N|auto")

    def __post_init__(self) -> None:
        if self.rank < 1 or self.epochs < 1 or self.batch_size < 1 or not self.targets:
            raise ConfigError("train.rank, train.epochs and train.batch_size must be at least 1, train.targets not empty.")
        if self.max_steps < 0 or self.evaluate_every < 0:
            raise ConfigError("train.max_steps and train.evaluate_every must be 0 (by epochs) or more.")
        if self.checkpoint_steps < 1 or self.threads < 0 or not self.clip > 0 or not self.learning_rate > 0:
            raise ConfigError("train.checkpoint_steps, clip and learning_rate must be above 0, train.threads 0 (all cores) or more.")
        if not self.synthetic_weight or not self.synthetic_schedule:
            raise ConfigError("train.synthetic_weight and train.synthetic_schedule are lists of at least one.")
        if not all(isinstance(w, int | float) and math.isfinite(w) and w >= 0 for w in self.synthetic_weight):
            raise ConfigError("train.synthetic_weight is a list of numbers that are not negative.")
        for schedule in self.synthetic_schedule:
            if schedule not in SCHEDULES:
                raise ConfigError(f"There is no train.synthetic_schedule '{schedule}'.{did_you_mean(schedule, SCHEDULES)}")
        if self.cohort != "auto" and not (self.cohort.isdecimal() and int(self.cohort) > 0):
            raise ConfigError(f"--cohort is '{self.cohort}'; give a number of users, or auto.")
