"""The training stage: records in, adapter out; one user or a cohort of them at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdcda_export.adapter import CONFIG, WEIGHTS
from cdcda_export.base import Base
from cdcda_export.errors import CdcdaError, ConfigError, WorkspaceError
from cdcda_export.manifest import Manifest, Stage, sha256_file, sha256_json
from cdcda_export.progress import Progress
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.history import Record, records_in, text_of

if TYPE_CHECKING:
    from cdcda_mobile.training.learner import Trained, TrainResult
    from cdcda_mobile.training.schedule import Order

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
        counts: how many records of each kind there were; set by ``orders``.
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
        from cdcda_mobile.training.schedule import Example, Order

        encoding = encoding_of(self.base.file)
        train, validation, test = (records_in(self.directory / "history" / f"{name}.jsonl") for name in ("train", "validation", "test"))
        synthetic = records_in(self.directory / "augment" / "kept.jsonl") if self.augmented is not None else []
        forbid_leaks(train, synthetic, (*validation, *test))
        if self.config.warm_start:
            forbid_shared_leaks(Path(self.config.warm_start), (*validation, *test), self.user)
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

    def finish(self, stage: Stage, outcomes: Sequence[Trained]) -> Manifest:
        """Save the adapter, of several the one that the real validation records like best, and finish the stage.

        Raises:
            CdcdaError: all have failed.
        """
        results = {index: outcome for index, outcome in enumerate(outcomes) if not isinstance(outcome, CdcdaError)}
        if not results:
            raise next(outcome for outcome in outcomes if isinstance(outcome, CdcdaError))
        chosen = min(results, key=lambda index: results[index].state.best_nll)
        mixes = list(itertools.product(self.config.synthetic_weight, self.config.synthetic_schedule))
        metrics = results[chosen].metrics() | {"records": self.counts, "rank": self.config.rank, "epochs": self.config.epochs}
        if self.counts["synthetic"]:
            weight, schedule = mixes[chosen]
            metrics["synthetic"] = {"weight": weight, "schedule": schedule}
        if len(outcomes) > 1:
            nll = [results[index].state.best_nll if index in results else None for index in range(len(mixes))]
            tried = zip(mixes, nll, strict=True)
            metrics["synthetic"]["tried"] = [{"weight": w, "schedule": s, "best_validation_nll": found} for (w, s), found in tried]
            for name in ("seconds", "cpu_seconds", "tokens"):
                metrics[name] = sum(getattr(result.state, name) for result in results.values())
            metrics["tokens_per_second"] = metrics["tokens"] / metrics["seconds"] if metrics["seconds"] else 0.0
        return finish_training(stage, results[chosen], self.base, self.config, metrics)


def training_stage(directory: Path, config: TrainConfig, seed: int, inputs: dict[str, str], redo: bool) -> Stage:
    """Return the stage of an adapter: what decides it, and nothing of how it is computed."""
    return Stage(directory, {**training_settings(config), "seed": seed}, inputs | warm_start_inputs(config), redo)


def training_settings(config: TrainConfig) -> dict[str, Any]:
    """Return what of a configuration decides the adapter; what ``--warm-start`` names counts by its hashes."""
    return {key: value for key, value in asdict(config).items() if key not in (*_HOW, "warm_start")}


def warm_start_inputs(config: TrainConfig) -> dict[str, str]:
    """Return the hashes of the adapter that the training starts from."""
    names = (CONFIG, WEIGHTS) if config.warm_start else ()
    return {f"warm_start/{name}": sha256_file(Path(config.warm_start) / name) for name in names}


def finish_training(
    stage: Stage, result: TrainResult, base: Base, config: TrainConfig, metrics: dict[str, Any], more: Sequence[str] = ()
) -> Manifest:
    """Save an adapter as peft stores it, folded together with what it was started from, and finish the stage with ``more`` outputs."""
    from cdcda_mobile.training.lora import save_adapter
    from cdcda_mobile.training.warm_start import whole

    if any(stage.inputs[name] != found for name, found in warm_start_inputs(config).items()):
        raise WorkspaceError(f"{config.warm_start} was replaced while it was in use; run the same command again.")
    files = save_adapter(whole(result.layers, config.warm_start, base), Path(base.name).name.removesuffix(".gguf"), stage.partial)
    return stage.finish(metrics, [*files, *more])


def forbid_leaks(train: Sequence[Record], synthetic: Sequence[Record], held_out: Sequence[Record]) -> None:
    """Hold the rule that no held-out record is ever trained on: not its text, and not its input with an answer that was made up.

    Raises:
        WorkspaceError: one is.
    """
    texts = {text_of(record) for record in held_out}
    inputs = {(record.task, text_of(record)[0]) for record in held_out}
    for record in train:
        if text_of(record) in texts:
            raise WorkspaceError(f"Record {record.id} is in the training set and in the held-out set; run with --redo history.")
    for record in synthetic:
        if (record.task, text_of(record)[0]) in inputs:
            raise WorkspaceError(
                f"Synthetic record {record.id} has the input of a record that is in the held-out set; run with --redo augment."
            )


def forbid_shared_leaks(directory: Path, held_out: Sequence[Record], user: str) -> None:
    """Hold the same rule for what a shared adapter was trained on, whoever's records they were.

    Raises:
        WorkspaceError: a held-out record of this user is among them.
    """
    from cdcda_mobile.shared import trained_on

    known = trained_on(directory)
    count = sum(sha256_json(text_of(record)) in known for record in held_out)
    if count:
        raise WorkspaceError(
            f"{count} held-out records of user {user} were training records of {directory}, so no gain could be believed; "
            f"train it on other users, or with {user} in the list (then these are left out)."
        )


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
    through: dict[int, Trained] = {}

    def finished(at: int, outcome: Trained) -> None:
        through[at] = outcome
        owner = owners[at]
        mine = [place for place, who in enumerate(owners) if who == owner]
        if not all(place in through for place in mine):
            return
        try:
            found[owner] = trainings[owner].finish(stages[owner], [through[place] for place in mine])
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
    from cdcda_mobile.shared import is_shared
    from cdcda_mobile.training.cohort import train_cohort
    from cdcda_mobile.training.warm_start import shared_layers

    progress.start("loading the base model")
    decoder = base.decoder
    if config.warm_start:
        decoder = decoder.folded(shared_layers(Path(config.warm_start), base))
    progress.done()
    if config.warm_start and not is_shared(Path(config.warm_start)):
        progress.warn(f"{config.warm_start} does not say whose records it was trained on; held-out records may be among them.")
    return train_cohort(decoder, orders, config, progress, members, finished)
