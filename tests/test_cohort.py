"""Cohorts of tiny models: everyone as if alone, the bits after a kill, the early stop, who fails by name, and the format on disk."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cdcda_export.base_model import load_base_model
from cdcda_export.decoder import Decoder
from cdcda_export.errors import CdcdaError
from cdcda_export.gguf import GgufFile
from cdcda_export.progress import Silent
from cdcda_export.verify import Probe
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.dataset import check_token_ids, encoding_of
from cdcda_mobile.history import Record
from cdcda_mobile.training.cohort import train_cohort
from cdcda_mobile.training.learner import Trained, TrainResult
from cdcda_mobile.training.lora import Layout, save_adapter
from cdcda_mobile.training.packed import PackedEngine
from cdcda_mobile.training.padded import PaddedEngine
from cdcda_mobile.training.schedule import Example, Order, Schedule, row_of

TEXTS = ("a boat on the north shore", "rust again and again", "the cat is in the engine", "no invoice is ever on time")
CONFIG = TrainConfig(rank=2, learning_rate=0.02, batch_size=4, epochs=3, checkpoint_steps=2, patience=99, threads=2)
torch.set_num_threads(1)
# Batches of one row: several users share a pass.
TOGETHER = replace(CONFIG, batch_size=1, epochs=1, threads=1)


def _records(count: int, shift: int = 0) -> list[Record]:
    return [
        Record(f"{i:03}", f"2024-01-{1 + i % 28:02}", "headline", f"{TEXTS[(i + shift) % 4]} {i}", f"{TEXTS[(shift - i) % 4]}; {i} times")
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def decoder(llama_base: Path) -> Decoder:
    return Decoder(GgufFile(llama_base))


@pytest.fixture(scope="module")
def probes(llama_base: Path) -> list[list[Probe]]:
    """Exchanges of four users."""
    base = GgufFile(llama_base)
    encoding = encoding_of(base)
    found = [encoding.probes(_records(14, shift), 256) for shift in range(4)]
    check_token_ids(base, encoding, found[0])
    return found


def order(probes: Sequence[Probe], folder: Path, user: str = "ann", seed: int = 0, count: int = 10) -> Order:
    directory = folder / user
    directory.mkdir(parents=True, exist_ok=True)
    return Order(user, [Example(p) for p in probes[:count]], probes[10:], directory, seed)


def alone_in(folder: Path, one: Order) -> Order:
    directory = folder / "alone" / one.user
    directory.mkdir(parents=True)
    return replace(one, directory=directory)


def train(decoder: Decoder, orders: Sequence[Order], config: TrainConfig = CONFIG) -> list[TrainResult]:
    found = train_cohort(decoder, orders, config, Silent())
    assert all(isinstance(outcome, TrainResult) for outcome in found), found
    return [outcome for outcome in found if isinstance(outcome, TrainResult)]


def change(result: TrainResult) -> torch.Tensor:
    """What was learned: B A of every module, end to end."""
    return torch.cat([(lora.up @ lora.down).flatten() * lora.scale for lora in result.layers.values()])


def close(one: TrainResult, two: TrainResult) -> None:
    """Hold two results to the bounds of a float32 sum in another order."""
    for a, b in zip(one.state.curve, two.state.curve, strict=True):
        assert a["validation_nll"] == pytest.approx(b["validation_nll"], abs=1e-3)
    assert (change(one) - change(two)).norm() < 0.01 * change(one).norm()


class Killer(Silent):
    """Stops the run from outside after some steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def advance(self, n: int = 1, note: str = "") -> None:
        self.left -= n
        if self.left <= 0:
            raise KeyboardInterrupt


def test_gradients_equal_peft_on_transformers(llama_base: Path, decoder: Decoder, probes: list[list[Probe]]) -> None:
    from peft import LoraConfig, get_peft_model

    layout = Layout(decoder, CONFIG.targets, 2, 16.0)
    flat, gradient = layout.initial(0), torch.empty(layout.size)
    model = get_peft_model(
        load_base_model(GgufFile(llama_base)), LoraConfig(r=2, lora_alpha=16, target_modules=CONFIG.targets, task_type="CAUSAL_LM")
    )
    torch.manual_seed(0)
    for name, layer in layout.layers(flat).items():
        layer.up.normal_(std=0.05)
        theirs = model.get_submodule(f"base_model.model.{name}")
        theirs.lora_A["default"].weight.data.copy_(layer.down)
        theirs.lora_B["default"].weight.data.copy_(layer.up)
    rows = [row_of(probe) for probe in probes[0][:3]]
    loss = PackedEngine(decoder, layout).gradients([rows], [flat], [gradient])[0]
    losses = []
    for probe in probes[0][:3]:
        logits = model(torch.tensor([probe.ids[:-1]])).logits[0][probe.answer_positions()]
        losses.append(F.cross_entropy(logits, torch.tensor(probe.answer), reduction="sum"))
    expected = sum(losses) / sum(len(p.answer) for p in probes[0][:3])
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    for name, layer in layout.layers(gradient).items():
        theirs = model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.down, theirs.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(layer.up, theirs.lora_B["default"].weight.grad, rtol=1e-3, atol=1e-5)


def test_only_answer_tokens_are_targets() -> None:
    row = row_of(Probe("", "", (1, 2, 3), (4, 5)))
    assert row.ids == (1, 2, 3, 4) and row.first == 2 and row.targets == (4, 5)


def test_training_learns_and_the_same_seed_gives_the_same_bits(decoder: Decoder, probes: list[list[Probe]], tmp_path: Path) -> None:
    (first,) = train(decoder, [order(probes[0], tmp_path / "a")])
    (second,) = train(decoder, [order(probes[0], tmp_path / "b")])
    (other,) = train(decoder, [order(probes[0], tmp_path / "c", seed=1)])
    assert torch.equal(first.best, second.best)
    assert not torch.equal(first.best, other.best)
    curve = [point["validation_nll"] for point in first.state.curve]
    assert min(curve) < 0.8 * curve[0]
    assert first.metrics()["cpu_seconds"] > 0 and first.metrics()["tokens"] > 0


def test_a_cohort_gives_everyone_what_they_get_alone(decoder: Decoder, probes: list[list[Probe]], tmp_path: Path) -> None:
    users = [
        order(p, tmp_path / "all", name, seed, count) for p, name, seed, count in zip(probes, "abcd", range(4), (10, 7, 10, 3), strict=True)
    ]
    everyone = train(decoder, users)
    assert len({result.total_steps for result in everyone}) == 3
    for one, together in zip(users, everyone, strict=True):
        (alone,) = train(decoder, [alone_in(tmp_path, one)])
        close(alone, together)
    # In a cohort that keeps all cores busy a user has passes of their own: other company changes no bit.
    swapped = train(decoder, [order(probes[0], tmp_path / "swapped", "a"), order(probes[2], tmp_path / "swapped", "z", 9)])
    assert torch.equal(swapped[0].best, everyone[0].best)


def test_users_who_share_passes_get_what_they_get_alone(decoder: Decoder, probes: list[list[Probe]], tmp_path: Path) -> None:
    users = [order(p, tmp_path / "all", name, seed) for p, name, seed in zip(probes, "abcd", range(4), strict=True)]
    everyone = train(decoder, users, TOGETHER)
    for one, together in zip(users, everyone, strict=True):
        (alone,) = train(decoder, [alone_in(tmp_path, one)], TOGETHER)
        close(alone, together)


def test_companions_of_the_same_shape_change_no_bit_of_a_shared_pass(decoder: Decoder, probes: list[list[Probe]], tmp_path: Path) -> None:
    found = []
    for turned in (False, True):
        mine, other = (order(probes[0], tmp_path / str(turned), name) for name in "ab")
        if turned:
            # Equal shapes, other tokens.
            other = replace(other, examples=[Example(replace(e.probe, answer=e.probe.answer[::-1])) for e in other.examples])
        found.append(train(decoder, [mine, other], TOGETHER))
    assert torch.equal(found[0][0].best, found[1][0].best)
    assert not torch.equal(found[0][1].best, found[1][1].best)


# As many ways to divide the work: a core for each user, shared passes, more cores than users, frozen layers whose states are kept.
WAYS = {
    "own passes": CONFIG,
    "shared passes": TOGETHER,
    "several passes a batch": replace(CONFIG, threads=7),
    "upper layers": replace(CONFIG, first_layer=1),
}


@pytest.mark.parametrize("config", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("stop_after", [1, 2, 5, 9, 17])
def test_a_killed_cohort_continues_to_the_same_bits(
    decoder: Decoder, probes: list[list[Probe]], tmp_path: Path, stop_after: int, config: TrainConfig
) -> None:
    def users(folder: str) -> list[Order]:
        return [order(p, tmp_path / folder, name, 0, count) for p, name, count in zip(probes, "abc", (10, 5, 8), strict=False)]

    undisturbed = train(decoder, users("a"), config)
    through: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        train_cohort(decoder, users("b"), config, Killer(stop_after), finished=lambda index, outcome: through.append(index))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("cohort", "pass"))]
    # Who was through is finished by the caller and not trained again.
    left = [index for index in range(3) if index not in through]
    resumed = train_cohort(decoder, [users("b")[index] for index in left], config, Silent(), members="abc")
    for index, two in zip(left, resumed, strict=True):
        one = undisturbed[index]
        assert isinstance(two, TrainResult) and torch.equal(one.best, two.best)
        assert [p["step"] for p in one.state.curve] == [p["step"] for p in two.state.curve]


def test_whose_mixes_end_at_different_steps_resumes_to_the_same_bits(decoder: Decoder, probes: list[list[Probe]], tmp_path: Path) -> None:
    """Two orders of one user: the caller has nothing until both are through, so the one that ended is found in its checkpoint."""

    def mixes(folder: str) -> list[Order]:
        return [replace(order(probes[0], tmp_path / folder / name, "a", 0, count), seed=0) for name, count in (("one", 4), ("two", 10))]

    config = replace(CONFIG, checkpoint_steps=100, epochs=2)
    undisturbed = train(decoder, mixes("a"), config)
    with pytest.raises(KeyboardInterrupt):
        train_cohort(decoder, mixes("b"), config, Killer(2 + 2 + 2))
    steps = [max(int(p.stem.rpartition("-")[2]) for p in one.directory.glob("*.safetensors")) for one in mixes("b")]
    assert steps == [2, 2]  # saved when the first was through
    resumed = train(decoder, mixes("b"), config)
    assert all(torch.equal(one.best, two.best) for one, two in zip(undisturbed, resumed, strict=True))


def test_a_failure_before_the_kill_costs_the_others_nothing(decoder: Decoder, probes: list[list[Probe]], tmp_path: Path) -> None:
    users = [order(p, tmp_path / "b", name) for p, name in zip(probes, "abc", strict=False)]
    users[1] = replace(users[1], examples=[Example(e.probe, float("nan")) for e in users[1].examples])
    config = replace(TOGETHER, threads=1)
    told: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        train_cohort(decoder, users, config, Killer(10 + 6 + 6), finished=lambda index, outcome: told.append(index))
    assert told == [1]

    class Steps(Silent):
        resumed = 0

        def advance(self, n: int = 1, note: str = "") -> None:
            self.resumed = max(self.resumed, n)

    steps = Steps()
    found = train_cohort(decoder, users, config, steps)
    assert steps.resumed >= 4  # not from the beginning
    assert isinstance(found[1], CdcdaError) and "user b" in str(found[1])
    assert isinstance(found[0], TrainResult) and isinstance(found[2], TrainResult)


@pytest.mark.parametrize("config", [CONFIG, TOGETHER], ids=["own passes", "shared passes"])
def test_a_damaged_checkpoint_is_not_trusted(decoder: Decoder, probes: list[list[Probe]], tmp_path: Path, config: TrainConfig) -> None:
    def users(folder: str) -> list[Order]:
        return [order(p, tmp_path / folder, name) for p, name in zip(probes, "abc", strict=False)]

    undisturbed = train(decoder, users("a"), config)
    with pytest.raises(KeyboardInterrupt):
        train_cohort(decoder, users("b"), config, Killer(15))
    for damaged, content in zip(users("b"), (b"", b"no tensors", b"\x08\0\0\0\0\0\0\0{}      "), strict=True):
        for path in sorted(damaged.directory.glob("*.safetensors"))[-1:]:
            path.write_bytes(content)
    resumed = train(decoder, users("b"), config)
    assert all(torch.equal(one.best, two.best) for one, two in zip(undisturbed, resumed, strict=True))


def test_who_was_through_before_the_kill_is_not_missed_by_the_others(decoder: Decoder, probes: list[list[Probe]], tmp_path: Path) -> None:
    """Users of one pass, one with fewer records: that one ends and is saved, and the others are killed later."""

    def users(folder: str) -> list[Order]:
        return [order(p, tmp_path / folder, name, 0, count) for p, name, count in zip(probes, "abcd", (10, 4, 10, 10), strict=True)]

    config = replace(TOGETHER, checkpoint_steps=3)
    undisturbed, through = train(decoder, users("a"), config), []
    with pytest.raises(KeyboardInterrupt):
        train_cohort(decoder, users("b"), config, Killer(4 * 4 + 3 * 3), finished=lambda index, outcome: through.append(index))
    assert through == [1]
    left = [one for one in users("b") if one.user != "b"]
    found = train_cohort(decoder, left, config, Silent(), members="abcd")
    for one, two in zip((undisturbed[0], undisturbed[2], undisturbed[3]), found, strict=True):
        assert isinstance(two, TrainResult) and torch.equal(one.best, two.best)


def test_early_stop_keeps_the_best_step(decoder: Decoder, probes: list[list[Probe]], tmp_path: Path) -> None:
    config = TrainConfig(rank=2, learning_rate=0.5, batch_size=4, epochs=20, patience=2, evaluations_per_epoch=3, threads=1)
    (result,) = train(decoder, [order(probes[0], tmp_path)], config)
    assert result.state.step < result.total_steps
    best = min(result.state.curve, key=lambda p: p["validation_nll"])
    assert result.state.best_step == best["step"]
    layout = Layout(decoder, config.targets, 2, config.alpha)
    nll = PackedEngine(decoder, layout).nll([[row_of(p) for p in probes[0][10:]]], [result.best])
    assert float(nll[0]) == pytest.approx(best["validation_nll"], rel=1e-4)


@pytest.mark.parametrize("config", [CONFIG, TOGETHER], ids=["own passes", "shared passes"])
def test_who_diverges_fails_by_name_and_the_others_finish(
    decoder: Decoder, probes: list[list[Probe]], tmp_path: Path, config: TrainConfig
) -> None:
    users = [order(p, tmp_path / "a", name) for p, name in zip(probes, "abc", strict=False)]
    users[1] = replace(users[1], examples=[Example(e.probe, float("nan")) for e in users[1].examples])
    found = train_cohort(decoder, users, config, Silent())
    assert isinstance(found[1], CdcdaError)
    assert "user b" in str(found[1]) and "learning_rate" in str(found[1])
    for index in (0, 2):
        outcome = found[index]
        assert isinstance(outcome, TrainResult)
        (alone,) = train(decoder, [alone_in(tmp_path, users[index])], config)
        close(alone, outcome)


@pytest.mark.parametrize("config", [CONFIG, TOGETHER], ids=["own passes", "shared passes"])
def test_a_folder_that_is_gone_fails_its_user_alone(
    decoder: Decoder, probes: list[list[Probe]], tmp_path: Path, config: TrainConfig
) -> None:
    users = [order(p, tmp_path, name) for p, name in zip(probes, "abc", strict=False)]
    users[0].directory.rmdir()
    users[0].directory.write_text("in the way")
    found = train_cohort(decoder, users, config, Silent())
    assert isinstance(found[0], CdcdaError)
    assert isinstance(found[1], TrainResult) and isinstance(found[2], TrainResult)


def test_garbage_of_one_user_harms_nobody(decoder: Decoder, probes: list[list[Probe]], tmp_path: Path) -> None:
    """Random tokens, a rate out of all bounds: the others' bits are what they are beside a quiet user of the same shape."""
    found = []
    for spoilt in (False, True):
        mine, other = (order(probes[0], tmp_path / str(spoilt), name) for name in "ab")
        if spoilt:
            scrambled = [
                replace(e.probe, prompt=e.probe.prompt[:1] * len(e.probe.prompt), answer=e.probe.answer[:1] * len(e.probe.answer))
                for e in other.examples
            ]
            other = replace(other, examples=[Example(probe, 1e6) for probe in scrambled])
        found.append(train_cohort(decoder, [mine, other], TOGETHER, Silent())[0])
    assert all(isinstance(one, TrainResult) for one in found)
    assert torch.equal(found[0].best, found[1].best)


def test_a_whole_cohort_in_the_padded_engine(
    decoder: Decoder, probes: list[list[Probe]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, on the CPU: one group, losses read late, checkpoints seldom."""
    from cdcda_mobile.training import cohort, group

    class Padded(PaddedEngine):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments[:2])  # type: ignore[arg-type]
            self.queues = True

    def users(folder: str) -> list[Order]:
        return [order(p, tmp_path / folder, name, 0, count) for p, name, count in zip(probes, "abcd", (10, 7, 10, 3), strict=True)]

    expected = train(decoder, users("a"))
    monkeypatch.setattr(cohort, "engine_of", Padded)
    monkeypatch.setattr(cohort, "_on_cpu", lambda decoder: False)
    monkeypatch.setattr(group, "_SECONDS_BETWEEN_SAVES", 0.0)
    poisoned = users("b")
    poisoned[1] = replace(poisoned[1], examples=[Example(e.probe, float("nan")) for e in poisoned[1].examples])
    with pytest.raises(KeyboardInterrupt):
        train_cohort(decoder, poisoned, CONFIG, Killer(20))
    found = train_cohort(decoder, poisoned, CONFIG, Silent())
    assert isinstance(found[1], CdcdaError)
    for index in (0, 2, 3):
        outcome = found[index]
        assert isinstance(outcome, TrainResult)
        close(expected[index], outcome)


def test_results_are_told_as_soon_as_they_are_there(decoder: Decoder, probes: list[list[Probe]], tmp_path: Path) -> None:
    told: list[tuple[int, Trained]] = []
    users = [order(p, tmp_path, name) for p, name in zip(probes, "abcd", strict=True)]
    found = train_cohort(decoder, users, CONFIG, Silent(), finished=lambda index, outcome: told.append((index, outcome)))
    assert sorted(index for index, _ in told) == [0, 1, 2, 3]
    assert all(found[index] is outcome for index, outcome in told)


def test_weights_scale_their_part_of_the_loss(decoder: Decoder, probes: list[list[Probe]]) -> None:
    layout = Layout(decoder, CONFIG.targets, 2, 16.0)
    engine, flat, gradient = PackedEngine(decoder, layout), layout.initial(0), torch.empty(layout.size)
    one, two = (float(engine.gradients([[row_of(p)]], [flat], [gradient])[0]) for p in probes[0][:2])
    n, m = (len(p.answer) for p in probes[0][:2])
    both = float(engine.gradients([[row_of(probes[0][0]), row_of(probes[0][1], 0.25)]], [flat], [gradient])[0])
    assert both == pytest.approx((one * n + 0.25 * two * m) / (n + m), rel=1e-4)


def test_synthetic_first_has_every_synthetic_pass_before_the_real_ones(probes: list[list[Probe]], tmp_path: Path) -> None:
    examples = [Example(p) for p in probes[0][:6]] + [Example(p, 0.5, synthetic=True) for p in probes[1][:5]]
    real, made = ({row_of(p).ids for p in part} for part in (probes[0][:6], probes[1][:5]))

    def batches(schedule: Schedule) -> list[set[tuple[int, ...]]]:
        return [{row.ids for row in schedule.batch(step)} for step in range(schedule.total_steps)]

    first = Schedule(Order("a", examples, [], tmp_path, 0, "synthetic-first"), CONFIG)
    found = batches(first)
    assert len(found) == 3 * (2 + 2)
    assert all(batch <= made for batch in found[:6]) and all(batch <= real for batch in found[6:])
    assert set().union(*found[:2]) == made and set().union(*found[6:8]) == real
    # Where all rows of a step are synthetic, their weight slows the steps: a common factor of the loss would not be felt.
    full = Schedule(Order("a", [replace(e, weight=1.0) for e in examples], [], tmp_path, 0, "synthetic-first"), CONFIG)
    assert [first.learning_rate(step) / full.learning_rate(step) for step in (0, 5, 6, 11)] == [0.5, 0.5, 1.0, 1.0]
    assert all(row.weight == 1.0 for step in range(12) for row in first.batch(step))
    mixed = Schedule(Order("a", examples, [], tmp_path), CONFIG)
    assert mixed.total_steps == 3 * 3 and any(batch & real and batch & made for batch in batches(mixed))
    assert {row.weight for step in range(3) for row in mixed.batch(step)} == {0.5, 1.0}


def test_synthetic_records_of_no_weight_change_nothing(decoder: Decoder, probes: list[list[Probe]], tmp_path: Path) -> None:
    for schedule in ("mixed", "synthetic-first"):
        one = order(probes[0], tmp_path / schedule)
        made = [Example(p, 0.0, synthetic=True) for p in probes[1][:4]]
        (result,) = train(decoder, [replace(one, examples=[*one.examples, *made], schedule=schedule)])
        assert result.state.best_nll < result.state.curve[0]["validation_nll"]


def test_saved_adapters_load_in_peft_with_the_same_loss(
    llama_base: Path, decoder: Decoder, probes: list[list[Probe]], tmp_path: Path
) -> None:
    from peft import PeftModel

    for first_layer in (0, 1):
        (result,) = train(decoder, [order(probes[0], tmp_path / str(first_layer))], replace(CONFIG, first_layer=first_layer))
        folder = tmp_path / f"adapter-{first_layer}"
        save_adapter(result.layers, "tiny-llama", folder)
        model = PeftModel.from_pretrained(load_base_model(GgufFile(llama_base)), str(folder))
        assert sum("lora_A" in name for name, _ in model.named_parameters()) == len(result.layers)
        row = probes[0][11].ids
        with torch.no_grad():
            torch.testing.assert_close(decoder.logits([row], result.layers), model(torch.tensor([row])).logits[0], rtol=1e-3, atol=1e-3)


def test_without_validation_the_last_step_is_kept(decoder: Decoder, probes: list[list[Probe]], tmp_path: Path) -> None:
    (result,) = train(decoder, [Order("a", [Example(p) for p in probes[0][:8]], [], tmp_path)])
    assert result.state.best_step == result.total_steps
    assert result.metrics()["best_validation_nll"] is None
