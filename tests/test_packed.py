"""The pass written by hand: what is shared, and that loss and gradients are autograd's, user by user, whoever stands beside."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cdcda_export.decoder import Decoder
from cdcda_export.gguf import GgufFile
from cdcda_mobile.training.lora import Layout
from cdcda_mobile.training.packed import PackedEngine
from cdcda_mobile.training.packed_pass import PackedPass
from cdcda_mobile.training.packing import Row, pack, split
from tiny import TARGETS

# A second thread for products of this size costs more than it helps.
torch.set_num_threads(1)

CASES = [(TARGETS, 0), (("q_proj", "v_proj"), 0), (("up_proj",), 1), (TARGETS, 1)]


@pytest.fixture(scope="module")
def decoder(tiny_base: Path) -> Decoder:
    return Decoder(GgufFile(tiny_base))


def make_rows(chance: random.Random, vocabulary: int, count: int, longest: int = 9) -> list[Row]:
    """Rows of one user: all begin alike, every second one goes on alike."""
    opening = [chance.randrange(vocabulary) for _ in range(7)]
    rows = []
    for index in range(count):
        own = [chance.randrange(vocabulary) for _ in range(chance.randrange(3, longest))]
        ids = opening + ([1, 2, 3, 4, 5] if index % 2 else []) + own
        answer = chance.randrange(1, 4)
        rows.append(Row(tuple(ids[:-1]), len(ids) - 1 - answer, tuple(ids[-answer:]), 1.0 if index % 3 else 0.5))
    return rows


def random_adapter(layout: Layout, seed: int) -> torch.Tensor:
    return torch.randn(layout.size, generator=torch.Generator().manual_seed(seed)) * 0.05


def by_autograd(decoder: Decoder, layout: Layout, rows: Sequence[Row], flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of one user, one row after another."""
    parameters = flat.clone().requires_grad_()
    total, answers = torch.zeros(()), 0
    for row in rows:
        logits = decoder.logits([row.ids], layout.layers(parameters))[row.first :]
        total = total + row.weight * F.cross_entropy(logits, torch.tensor(row.targets), reduction="sum")
        answers += len(row.targets)
    loss = total / answers
    loss.backward()
    assert parameters.grad is not None
    return loss.detach(), parameters.grad


@pytest.mark.parametrize(("targets", "first_layer"), CASES)
@pytest.mark.parametrize("parts", [1, 3])
def test_losses_and_gradients_are_autograds(decoder: Decoder, targets: Sequence[str], first_layer: int, parts: int) -> None:
    chance = random.Random(1)
    layout = Layout(decoder, targets, 3, 6.0, first_layer)
    batches = [make_rows(chance, decoder.vocabulary, count) for count in (5, 2, 4)]
    flats = [random_adapter(layout, seed) for seed in range(3)]
    gradients = [torch.full((layout.size,), float("nan")) for _ in range(3)]  # what stood there is lost
    losses = PackedEngine(decoder, layout).gradients(batches, flats, gradients, parts)
    for rows, flat, gradient, loss in zip(batches, flats, gradients, losses, strict=True):
        expected, by_hand = by_autograd(decoder, layout, rows, flat)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, by_hand, rtol=1e-4, atol=1e-6)


def test_rows_longer_than_a_sliding_window(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tiny import make_gguf

    decoder = Decoder(GgufFile(make_gguf(tmp_path_factory.mktemp("window") / "g.gguf", "gemma3")))
    chance = random.Random(2)
    layout = Layout(decoder, TARGETS, 2, 4.0)
    rows = make_rows(chance, decoder.vocabulary, 3, longest=3 * decoder.shape.window)
    assert max(len(row.ids) for row in rows) > decoder.shape.window > 0
    flat, gradient = random_adapter(layout, 0), torch.empty(layout.size)
    PackedEngine(decoder, layout).gradients([rows], [flat], [gradient])
    torch.testing.assert_close(gradient, by_autograd(decoder, layout, rows, flat)[1], rtol=1e-4, atol=1e-6)


def test_validation_loss_is_that_of_the_decoder(decoder: Decoder) -> None:
    layout = Layout(decoder, TARGETS, 3, 6.0)
    rows, flat = make_rows(random.Random(3), decoder.vocabulary, 6), random_adapter(layout, 0)
    engine = PackedEngine(decoder, layout)
    for adapter, layers in (([flat], layout.layers(flat)), (None, None)):
        total = torch.zeros(())
        for row in rows:
            total += F.cross_entropy(decoder.logits([row.ids], layers)[row.first :], torch.tensor(row.targets), reduction="sum")
        expected = total / sum(len(row.targets) for row in rows)
        torch.testing.assert_close(engine.nll([rows], adapter)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_user_in_other_company_gets_the_same_bits(decoder: Decoder) -> None:
    layout = Layout(decoder, TARGETS, 3, 6.0)
    chance = random.Random(4)
    mine = make_rows(chance, decoder.vocabulary, 4)
    other = make_rows(chance, decoder.vocabulary, 4)
    # The same shapes, other tokens: what the companion writes must not matter.
    changed = [Row(tuple((i + 1) % decoder.vocabulary for i in r.ids), r.first, r.targets, r.weight) for r in other]
    engine = PackedEngine(decoder, layout)
    found = []
    for companion, seed in ((other, 5), (changed, 6)):
        gradients = [torch.empty(layout.size), torch.empty(layout.size)]
        losses = engine.gradients([mine, companion], [random_adapter(layout, 0), random_adapter(layout, seed)], gradients)
        found.append((losses[0], gradients[0], gradients[1]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("poison", ["adapter", "weights"])
def test_nan_stays_with_its_user(decoder: Decoder, poison: str) -> None:
    layout = Layout(decoder, TARGETS, 3, 6.0)
    chance = random.Random(5)
    mine, other = (make_rows(chance, decoder.vocabulary, 3) for _ in range(2))
    engine, flats = PackedEngine(decoder, layout), [random_adapter(layout, 0), random_adapter(layout, 1)]
    clean, poisoned = ([torch.empty(layout.size), torch.empty(layout.size)] for _ in range(2))
    losses = engine.gradients([mine, other], flats, clean)
    if poison == "adapter":
        flats = [flats[0], torch.full((layout.size,), float("nan"))]
    else:
        other = [Row(row.ids, row.first, row.targets, float("nan")) for row in other]
    spoilt = engine.gradients([mine, other], flats, poisoned)
    assert torch.equal(spoilt[0], losses[0]) and torch.equal(poisoned[0], clean[0])
    assert torch.isnan(spoilt[1])


def test_what_rows_begin_with_stands_once() -> None:
    rows = [Row((1, 2, 3, 4, 5, 6, 7), 5, (7, 8)), Row((1, 2, 3, 4, 5, 9), 4, (9, 1)), Row((1, 2, 3, 4, 5, 6, 7), 6, (4,))]
    packed = pack([rows])
    assert packed.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 6, 7, 9]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 5]
    assert sorted(packed.targets.tolist()) == [1, 4, 7, 8, 9]
    predicted_from = {(int(packed.ids[at]), int(target)) for at, target in zip(packed.at, packed.targets, strict=True)}
    assert predicted_from == {(6, 7), (7, 8), (5, 9), (9, 1), (7, 4)}


def test_a_row_that_is_the_beginning_of_another() -> None:
    short, long = Row((1, 2, 3, 4, 5), 3, (5, 6)), Row((1, 2, 3, 4, 5, 6, 7, 8), 7, (9,))
    packed = pack([[short, long]])
    assert packed.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sorted(packed.at.tolist()) == [3, 4, 7]


def test_a_short_beginning_is_not_worth_a_segment() -> None:
    packed = pack([[Row((1, 2, 3), 1, (3, 4)), Row((1, 2, 5), 1, (5, 4))]])
    assert len(packed.segments) == 2 and len(packed.ids) == 6


def test_two_users_share_nothing() -> None:
    row = Row((1, 2, 3, 4, 5, 6), 4, (6, 7))
    packed = pack([[row], [row]])
    assert len(packed.ids) == 12
    assert all(segment.before == () for segment in packed.segments)


@pytest.mark.parametrize(("parts", "most", "expected"), [(1, 1000, 1), (2, 1000, 2), (1, 60, 3), (50, 1000, 12)])
def test_a_batch_is_cut_into_passes_of_about_equal_size(parts: int, most: int, expected: int) -> None:
    rows = make_rows(random.Random(6), 50, 12)
    passes = split(rows, parts, most)
    assert len(passes) == expected
    assert sorted(map(hash, (row for part in passes for row in part))) == sorted(map(hash, rows))
    sizes = [sum(len(row.ids) for row in part) for part in passes]
    assert max(sizes) <= max(most, max(len(row.ids) for row in rows)) * 1.5
    assert min(sizes) > 0


def test_unknown_targets_and_layers_are_refused(decoder: Decoder) -> None:
    from cdcda_export.errors import ConfigError

    with pytest.raises(ConfigError, match="Did you mean 'q_proj'"):
        Layout(decoder, ["q_prj"], 2, 4.0)
    with pytest.raises(ConfigError, match="the layers 0 to"):
        Layout(decoder, ["q_proj"], 2, 4.0, 99)


def test_frozen_layers_are_computed_once_and_change_nothing(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(decoder, TARGETS, 3, 6.0, first_layer=1)
    rows, flat = make_rows(random.Random(8), decoder.vocabulary, 6), random_adapter(layout, 0)
    asked: list[int] = []
    compute = PackedPass.below

    def counted(self: PackedPass, layer: int) -> torch.Tensor:
        asked.append(len(self.pack.ids))
        return compute(self, layer)

    monkeypatch.setattr(PackedPass, "below", counted)
    engine = PackedEngine(decoder, layout)
    for batch in (rows[:4], rows[2:], rows):
        gradient = torch.empty(layout.size)
        loss = engine.gradients([batch], [flat], [gradient])[0]
        expected, by_hand = by_autograd(decoder, layout, batch, flat)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, by_hand, rtol=1e-4, atol=1e-6)
    assert sum(asked) == sum(len(row.ids) for row in rows)
