"""Planted secrets: how they are planted, what a model that knows them shows, and that reports hold no text."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from cdcda_export.errors import ConfigError
from cdcda_export.gguf import GgufFile
from cdcda_export.runtime import LlamaCpp
from cdcda_export.verify import nll_of
from cdcda_mobile.dataset import encoding_of
from cdcda_mobile.evaluation.canary import Canary, asking, plant, report
from cdcda_mobile.history import Record

RECORDS = tuple(
    Record(f"r{i}", f"2024-01-{i + 1:02}", "rating" if i % 2 else "headline", f"text {i}", "3" if i % 2 else "A") for i in range(9)
)


def test_secrets_are_planted_in_a_copy_as_often_as_said() -> None:
    planted, canaries = plant(RECORDS, seed=1)
    assert [canary.repeats for canary in canaries] == [0, 1, 2, 4, 0, 1, 2, 4]
    assert len({canary.code for canary in canaries}) == len({canary.opening for canary in canaries}) == 8
    assert len(planted) == len(RECORDS) + 14
    assert [r for r in planted if not r.id.startswith("canary-")] == list(RECORDS)
    assert len({r.id for r in planted}) == len(planted)
    hosts = {(r.date, r.task, r.input) for r in RECORDS if r.task == "headline"}
    for canary in canaries:
        mine = [r for r in planted if canary.code in r.output]
        assert len(mine) == canary.repeats
        assert {(r.date, r.task, r.input) for r in mine} <= hosts
        assert all(re.fullmatch(r"my [a-z ]+ is \d{3}-\d{3}-\d{3}", r.output) for r in mine)


def test_the_seed_decides() -> None:
    assert plant(RECORDS, seed=1) == plant(RECORDS, seed=1)
    assert {c.code for c in plant(RECORDS, seed=1)[1]}.isdisjoint(c.code for c in plant(RECORDS, seed=2)[1])


def test_what_cannot_be_planted() -> None:
    with pytest.raises(ConfigError, match="need a task with free answers"):
        plant([r for r in RECORDS if r.task == "rating"], seed=1)
    with pytest.raises(ConfigError, match="13 canaries cannot be planted; ask for 1 to 12"):
        plant(RECORDS, seed=1, count=13)


class Parrot:
    """A model that knows what was planted: likelier the more often, and recited from four times on."""

    def __init__(self, canaries: Sequence[Canary]) -> None:
        self.known = {canary.record.output: canary for canary in canaries if canary.repeats}
        self.asked = 0

    def nll(self, records: Sequence[Record]) -> list[float]:
        self.asked += len(records)
        return [10.0 - self.known[r.output].repeats if r.output in self.known else 9.5 for r in records]

    def go_on(self, records: Sequence[Record]) -> list[str]:
        recited = {c.opening: f" {c.code}. Really." for c in self.known.values() if c.repeats == 4}
        return [recited.get(r.output, " 000-000-000") for r in records]


def test_exposure_is_one_for_each_halving_of_the_rank() -> None:
    _, canaries = plant(RECORDS, seed=3, count=4)
    model = Parrot(canaries)
    found = report(canaries, model.nll, model.go_on, candidates=64)
    assert model.asked == 4 * 64
    # The control is as likely as any other code, and equals count against us.
    assert [one.rank for one in found.exposures] == [64, 1, 1, 1]
    assert [one.bits for one in found.exposures] == [0.0, 6.0, 6.0, 6.0]
    assert [one.extracted for one in found.exposures] == [False, False, False, True]
    assert found.by_repeats()[4] == {"canaries": 1, "bits": 6.0, "extracted": 1}


def test_a_model_that_knows_nothing_gives_the_exposure_of_chance() -> None:
    _, canaries = plant(RECORDS, seed=3, count=12, repeats=(1,))
    bits = []
    for seed in range(25):
        chance = random.Random(seed)
        found = report(canaries, lambda records: [chance.random() for _ in records], lambda records: [""] * len(records), 64, seed)  # noqa: B023
        bits += [one.bits for one in found.exposures]
    expected = math.fsum(math.log2(64) - math.log2(rank) for rank in range(1, 65)) / 64
    assert sum(bits) / len(bits) == pytest.approx(expected, abs=0.3)


def test_the_report_holds_no_text() -> None:
    _, canaries = plant(RECORDS, seed=3, count=4)
    model = Parrot(canaries)
    text = json.dumps(report(canaries, model.nll, model.go_on, candidates=8).metrics())
    assert all(canary.code not in text and canary.record.input not in text for canary in canaries)
    assert json.loads(text)["by_repeats"]["4"]["extracted"] == 1


def test_a_loaded_model_is_asked(llama_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdcda_export.runtime.cpu_threads", lambda: 1)  # two threads of a tiny model wait for each other
    encoding, (_, canaries) = encoding_of(GgufFile(llama_base)), plant(RECORDS, seed=3, count=2)
    records = [canary.record for canary in canaries]
    with LlamaCpp(llama_base, n_ctx=256) as model:
        nll, go_on = asking(model, encoding, 256)
        (probe, _) = encoding.probes(records, 256)
        alone = float(nll_of(model.logits(probe.ids)[probe.answer_positions()], probe.answer).sum())
        assert nll(records)[0] == pytest.approx(alone, abs=1e-3)
        begun = encoding.template.prompt(probe.user_text) + records[0].output
        assert go_on(records)[0] == model.decode(model.greedy(model.encode(begun), 24))
