"""Canaries end to end: plant secrets, train, quantize, ask; the user's own adapter and records are not touched."""

from __future__ import annotations

import shutil
from pathlib import Path

from cdcda_export.adapter import read_adapter
from cdcda_export.base import Base
from cdcda_export.errors import CdcdaError
from cdcda_export.progress import Progress
from cdcda_export.recipe import ExportConfig
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.dataset import encoding_of
from cdcda_mobile.evaluation.arms import Person
from cdcda_mobile.evaluation.canary import CanaryReport, asking, plant, report
from cdcda_mobile.evaluation.experiment import loaded
from cdcda_mobile.user_training import train_orders


def ask_for_canaries(
    base: Base, person: Person, train: TrainConfig, export: ExportConfig, seed: int, folder: Path, progress: Progress
) -> CanaryReport:
    """Train a user's model on records with planted secrets, and ask its artifact for them.

    Args:
        base: the base model.
        person: the user; synthetic records are trained on too, as in the real job.
        train: how the adapter is trained.
        export: the artifact's quantization.
        seed: of the training and of the secrets.
        folder: where the adapter and the artifact lie meanwhile.
        progress: told what goes on.

    Raises:
        ConfigError: no task of the user's has free answers.
        CdcdaError: the training failed.
    """
    from cdcda_mobile.training.lora import save_adapter
    from cdcda_mobile.training.schedule import Example, Order
    from cdcda_mobile.training.warm_start import whole

    encoding = encoding_of(base.file)
    records, canaries = plant(person.train, seed)
    examples = [Example(probe) for probe in encoding.probes(records, train.max_tokens)]
    made = person.synthetic.get("selected", ())
    examples += [Example(probe, train.synthetic_weight[0], synthetic=True) for probe in encoding.probes(made, train.max_tokens)]
    validation = encoding.probes(person.validation, train.max_tokens)
    order = Order(person.user, examples, validation, folder / "adapter", seed, train.synthetic_schedule[0])
    # Always anew: the checkpoints of other secrets or settings must not be gone on from.
    shutil.rmtree(order.directory, ignore_errors=True)
    order.directory.mkdir(parents=True, mode=0o700)
    (outcome,) = train_orders(base, [order], train, progress)
    if isinstance(outcome, CdcdaError):
        raise outcome
    save_adapter(whole(outcome.layers, train.warm_start, base), base.name, order.directory)
    progress.start("asking for the planted secrets")
    with loaded(base, read_adapter(order.directory, base.file), export, folder, export.max_tokens) as runtime:
        found = report(canaries, *asking(runtime, encoding, export.max_tokens), seed=seed)
    progress.done()
    return found
