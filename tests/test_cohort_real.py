"""The real model: what a user gets in shared passes is what they get alone, after 50 steps of training."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cdcda_export.base import Base
from cdcda_export.progress import Silent
from cdcda_mobile.config import HistoryConfig, TrainConfig
from cdcda_mobile.dataset import encoding_of
from cdcda_mobile.history import read_history, split_by_time
from cdcda_mobile.training.cohort import train_cohort
from cdcda_mobile.training.learner import TrainResult
from cdcda_mobile.training.schedule import Example, Order

pytestmark = pytest.mark.model
STEPS = 50
# Batches of one row on one core: both users' rows share every pass.
CONFIG = TrainConfig(batch_size=1, epochs=1, learning_rate=1e-3, evaluations_per_epoch=5, patience=99, checkpoint_steps=1000, threads=1)


def test_in_company_as_alone(real_base: Path, tmp_path: Path) -> None:
    base = Base(real_base)
    encoding = encoding_of(base.file)
    orders, test = [], []
    for user in ("42", "63"):
        parts = split_by_time(read_history(user, HistoryConfig()), HistoryConfig())
        (tmp_path / user).mkdir()
        examples = [Example(probe) for probe in encoding.probes(parts.train[:STEPS], 512)]
        orders.append(Order(user, examples, encoding.probes(parts.validation[:3], 512), tmp_path / user))
        test.append(encoding.probes(parts.test[:3], 512))
    decoder = base.decoder
    (tmp_path / "alone").mkdir()
    lonely = [replace(orders[0], directory=tmp_path / "alone")]
    # Both at once, to spare the time: each keeps one core busy.
    with ThreadPoolExecutor(2) as pool:
        together, alone = pool.map(lambda chosen: train_cohort(decoder, chosen, CONFIG, Silent()), (orders, lonely))
    one, two = alone[0], together[0]
    assert isinstance(one, TrainResult) and isinstance(two, TrainResult) and isinstance(together[1], TrainResult)
    assert one.state.step == two.state.step == together[1].state.step == STEPS
    assert one.state.best_nll < one.state.curve[0]["validation_nll"] - 0.3
    for a, b in zip(one.state.curve, two.state.curve, strict=True):
        assert a["validation_nll"] == pytest.approx(b["validation_nll"], abs=1e-3)
        assert a.get("train_loss") == pytest.approx(b.get("train_loss"), abs=1e-3)
    for name, lora in one.layers.items():
        other = two.layers[name]
        learned, again = lora.up @ lora.down, other.up @ other.down
        assert (learned - again).norm() <= 0.01 * learned.norm(), name
    for probe in test[0]:
        with torch.no_grad():
            logits = [decoder.logits([probe.ids], result.layers) for result in (one, two)]
        assert (logits[0] - logits[1]).abs().max() < 1e-2
