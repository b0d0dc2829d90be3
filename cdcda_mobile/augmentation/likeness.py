"""How much like the user a record is: by how much likelier the user's own adapter finds its answer than the base does.

The adapter is trained on the user's real records alone. A generic answer gains little from it, one in the user's voice gains much. The
scores rank records of one kind against each other; a real answer of the user's gains most, whatever input a teacher made up for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cdcda_export.base import Base
from cdcda_export.errors import CdcdaError
from cdcda_export.manifest import sha256_json
from cdcda_export.progress import Progress
from cdcda_export.runtime import cpu_threads
from cdcda_export.verify import Probe
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.dataset import encoding_of
from cdcda_mobile.history import Record
from cdcda_mobile.user_training import train_orders, training_settings

if TYPE_CHECKING:
    import torch

    from cdcda_mobile.training.packing import Row
    from cdcda_mobile.training.schedule import Order

_AT_ONCE = 16  # records whose tokens fill a pass


class LikelihoodGain:
    """Scores records; the adapter is trained when it is first needed.

    Args:
        base: the base model.
        user: whose adapter.
        train: real training records.
        validation: real records that decide the best step.
        config: how the adapter is trained.
        seed: of its initialisation and order.
        directory: receives its checkpoints, so that a run that was killed goes on.
        progress: told of the training.
    """

    def __init__(
        self,
        base: Base,
        user: str,
        train: Sequence[Record],
        validation: Sequence[Record],
        config: TrainConfig,
        seed: int,
        directory: Path,
        progress: Progress,
    ) -> None:
        self._base, self._user, self._train, self._validation = base, user, train, validation
        # Against the base itself, also where the user's adapter will stand on a shared one.
        self._config, self._seed, self._directory, self._progress = replace(config, warm_start=""), seed, directory, progress
        self._encoding = encoding_of(base.file)

    def __call__(self, records: Sequence[Record]) -> list[float]:
        """Return the gain of each record, in nats per token of its answer.

        Raises:
            CdcdaError: the adapter cannot be trained, or a record does not fit.
        """
        return gain(self._base, self._adapter(), self._config, self._encoding.probes(records, self._config.max_tokens))

    def order(self) -> Order:
        """Return the adapter's training: who scores for many users can train all of them side by side first, and it is found done."""
        from cdcda_mobile.training.schedule import Example, Order

        real, held = (self._encoding.probes(part, self._config.max_tokens) for part in (self._train, self._validation))
        # Other records or settings must not go on from this checkpoint.
        decides = {"base": self._base.sha256, "seed": self._seed, **training_settings(self._config)}
        name = sha256_json({"train": [p.ids for p in real], "validation": [p.ids for p in held], **decides})[:16]
        order = Order(self._user, [Example(probe) for probe in real], held, self._directory / name, self._seed)
        order.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return order

    def _adapter(self) -> torch.Tensor:
        (outcome,) = train_orders(self._base, [self.order()], self._config, self._progress)
        if isinstance(outcome, CdcdaError):
            raise outcome
        return outcome.best


def gain(base: Base, adapter: torch.Tensor, config: TrainConfig, probes: Sequence[Probe]) -> list[float]:
    """Return by how much an adapter lowers the NLL of each record's answer, in nats per token.

    Args:
        base: the base model.
        adapter: parameters, shape (size,), as ``TrainResult.best`` has them.
        config: the adapter's configuration.
        probes: the records.
    """
    import torch

    from cdcda_mobile.training.engine import engine_of
    from cdcda_mobile.training.lora import Layout
    from cdcda_mobile.training.schedule import row_of

    layout = Layout(base.decoder, config.targets, config.rank, config.alpha, config.first_layer)
    with ThreadPoolExecutor(cpu_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        engine = engine_of(base.decoder, layout, None)
        rows = [[row_of(probe)] for probe in probes]
        groups = [rows[at : at + _AT_ONCE] for at in range(0, len(rows), _AT_ONCE)]

        def scores(group: Sequence[Sequence[Row]]) -> list[float]:
            return list((engine.nll(group, None) - engine.nll(group, [adapter] * len(group))).tolist())

        return [value for found in pool.map(scores, groups) for value in found]
