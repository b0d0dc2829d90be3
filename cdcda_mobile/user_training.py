"""The training stage: records in, adapter out; one user or a cohort of them at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdcda_export.base import Base
from cdcda_export.errors import CdcdaError, ConfigError, WorkspaceError
from cdcda_export.manifest import Manifest, Stage, sha256_file
from cdcda_export.progress import Progress
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.history import Record, records_in
from cdcda_mobile.workspace import read_lines

if TYPE_CHECKING:
    from cdcda_mobile.training.learner import Order, Trained, TrainResult

# What says how it is computed, not what: a checkpoint goes on under another value, and the result is the same within rounding.
_HOW = ("checkpoint_steps", "threads", "cohort")


@dataclass
class UserTraining:
    """One user's training.

    Attributes:
        user: whose adapter.
        directory: the user's run; ``history`` is finished in it, and ``augment`` where synthetic records are used.
        base: the base model.
        config: how it is trained.
        seed: decides initialisation and order.
        history: the manifest of the split history.
        augmented: the manifest of the synthetic records, None for none.
        redo: train anew.
        reused: whether the adapter was there already; set by ``train_users``.
    """

    user: str
    directory: Path
    base: Base
    config: TrainConfig
    seed: int
    history: Manifest
    augmented: Manifest | None
    redo: bool = False
    reused: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    def stage(self) -> Stage:
        """Return the stage of the trained adapter."""
        inputs = {f"history/{name}": self.history.outputs[name]["sha256"] for name in ("train.jsonl", "validation.jsonl")}
        if self.augmented is not None:
            inputs["augment/kept.jsonl"] = self.augmented.outputs["kept.jsonl"]["sha256"]
        return training_stage(self.directory / "adapter", self.config, self.seed, {"base": self.base.sha256, **inputs}, self.redo)

    def orders(self, partial: Path) -> list[Order]:
        """Return what to train: one adapter, or one for each weight and schedule of synthetic records that validation chooses from.

        Raises:
            WorkspaceError: a training record is held out too.
            ExportError: a record does not fit, or this base cannot be trained on.
        """
        from cdcda_mobile.dataset import check_token_ids, encoding_of
        from cdcda_mobile.training.learner import Example, Order

        encoding = encoding_of(self.base.file)
        train, validation, test = (records_in(self.directory / "history" / f"{name}.jsonl") for name in ("train", "validation", "test"))
        kept = read_lines(self.directory / "augment" / "kept.jsonl") if self.augmented is not None else []
        synthetic = [Record(**{k: row[k] for k in ("id", "date", "task", "input", "output")}) for row in kept]
        forbid_leaks((*train, *synthetic), (*validation, *test))
        self.counts = {"train": len(train), "validation": len(validation), "synthetic": len(synthetic)}
        real = encoding.probes(train, self.config.max_tokens)
        check_token_ids(self.base.file, encoding, real)
        made, held_out = encoding.probes(synthetic, self.config.max_tokens), encoding.probes(validation, self.config.max_tokens)
        mixes = list(itertools.product(self.config.synthetic_weight, self.config.synthetic_schedule)) if made else [(1.0, "mixed")]
        if len(mixes) > 1 and not held_out:
            raise ConfigError("Several train.synthetic_weight or synthetic_schedule need validation records to choose by; name one.")
        orders = []
        for index, (weight, schedule) in enumerate(mixes):
            examples = [Example(probe) for probe in real] + [Example(probe, weight, synthetic=True) for probe in made]
            folder = partial if len(mixes) == 1 else partial / f"mix-{index}"
            orders.append(Order(self.user, examples, held_out, folder, self.seed, schedule))
        return orders

    def finish(self, stage: Stage, results: Sequence[TrainResult]) -> Manifest:
        """Save the adapter, of several the one that the real validation records like best, and finish the stage."""
        chosen = min(range(len(results)), key=lambda index: results[index].state.best_nll)
        best = results[chosen]
        mixes = list(itertools.product(self.config.synthetic_weight, self.config.synthetic_schedule))
        metrics = best.metrics() | {"records": self.counts, "rank": self.config.rank, "epochs": self.config.epochs}
        if self.counts["synthetic"]:
            weight, schedule = mixes[chosen]
            metrics["synthetic"] = {"weight": weight, "schedule": schedule}
        if len(results) > 1:
            tried = zip(mixes, results, strict=True)
            metrics["synthetic"]["tried"] = [{"weight": w, "schedule": s, "best_validation_nll": r.state.best_nll} for (w, s), r in tried]
            for name in ("seconds", "cpu_seconds", "tokens"):
                metrics[name] = sum(getattr(r.state, name) for r in results)
        return finish_training(stage, best, self.base, self.config, metrics)


def training_stage(directory: Path, config: TrainConfig, seed: int, inputs: dict[str, str], redo: bool) -> Stage:
    """Return the stage of an adapter: what decides it, and nothing of how it is computed."""
    settings = {key: value for key, value in asdict(config).items() if key not in (*_HOW, "warm_start")}
    if config.warm_start:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            inputs[f"warm_start/{name}"] = sha256_file(Path(config.warm_start) / name)
    return Stage(directory, {**settings, "seed": seed}, inputs, redo)


def finish_training(
    stage: Stage, result: TrainResult, base: Base, config: TrainConfig, metrics: dict[str, Any], more: Sequence[str] = ()
) -> Manifest:
    """Save an adapter as peft stores it, folded together with what it was started from, and finish the stage with ``more`` outputs."""
    from cdcda_mobile.training.lora import save_adapter
    from cdcda_mobile.training.warm_start import folded, shared_layers

    layers = result.layers
    if config.warm_start:
        layers = folded(shared_layers(Path(config.warm_start), base), layers)
    files = save_adapter(layers, Path(base.name).name.removesuffix(".gguf"), stage.partial)
    return stage.finish(metrics, [*files, *more])


def forbid_leaks(training: Sequence[Record], held_out: Sequence[Record]) -> None:
    """Hold the rule that no held-out record is ever trained on.

    Raises:
        WorkspaceError: one is.
    """
    forbidden = {(r.task, " ".join(r.input.split()).lower()) for r in held_out}
    for record in training:
        if (record.task, " ".join(record.input.split()).lower()) in forbidden:
            raise WorkspaceError(f"Record {record.id} is in the training set and in the held-out set; run with --redo augment.")


def train_users(trainings: Sequence[UserTraining], progress: Progress, members: Sequence[str] = ()) -> list[Manifest | CdcdaError]:
    """Train the adapters that are missing, all of them at once, and return each one's manifest or what went wrong with it.

    Args:
        trainings: users of one base and one configuration.
        progress: told what goes on.
        members: the users of the cohort as it was begun.
    """
    found: list[Manifest | CdcdaError | None] = [None] * len(trainings)
    stages: dict[int, Stage] = {}
    orders: list[Order] = []
    owners: list[int] = []
    for index, training in enumerate(trainings):
        try:
            stage = training.stage()
            found[index] = stage.finished()
            training.reused = found[index] is not None
            if not training.reused:
                stages[index] = stage
                mine = training.orders(stage.begin())
                orders += mine
                owners += [index] * len(mine)
        except CdcdaError as error:
            found[index] = error
            stages.pop(index, None)
    if orders:
        _train(trainings, stages, orders, owners, found, progress, members)
    return [result for result in found if result is not None]


def _train(
    trainings: Sequence[UserTraining],
    stages: dict[int, Stage],
    orders: Sequence[Order],
    owners: Sequence[int],
    found: list[Manifest | CdcdaError | None],
    progress: Progress,
    members: Sequence[str],
) -> None:
    from cdcda_mobile.training.learner import TrainResult

    through: dict[int, Trained] = {}

    def finished(at: int, outcome: Trained) -> None:
        through[at] = outcome
        owner = owners[at]
        mine = [place for place, who in enumerate(owners) if who == owner]
        if not all(place in through for place in mine):
            return
        failed = next((o for o in map(through.get, mine) if isinstance(o, CdcdaError)), None)
        results = [o for o in map(through.get, mine) if isinstance(o, TrainResult)]
        try:
            found[owner] = failed or trainings[owner].finish(stages[owner], results)
        except CdcdaError as error:
            found[owner] = error

    train_orders(trainings[0].base, orders, trainings[0].config, progress, members, finished)


def train_orders(
    base: Base,
    orders: Sequence[Order],
    config: TrainConfig,
    progress: Progress,
    members: Sequence[str] = (),
    finished: Callable[[int, Trained], None] | None = None,
) -> list[Trained]:
    """Load the base, put the shared adapter of ``--warm-start`` into it, and train; see ``train_cohort``."""
    from cdcda_mobile.training.cohort import train_cohort
    from cdcda_mobile.training.warm_start import shared_layers

    progress.start("loading the base model")
    decoder = base.decoder
    if config.warm_start:
        decoder = decoder.folded(shared_layers(Path(config.warm_start), base))
    progress.done()
    return train_cohort(decoder, orders, config, progress, members, finished)
