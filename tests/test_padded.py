"""The padded engine against the packed one, whose gradients are held to autograd's elsewhere."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cdcda_export.decoder import Decoder
from cdcda_export.gguf import GgufFile
from cdcda_mobile.training.lora import Layout
from cdcda_mobile.training.packed import PackedEngine
from cdcda_mobile.training.packing import Row
from cdcda_mobile.training.padded import PaddedEngine
from cdcda_mobile.training.padding import blocks
from tiny import TARGETS, make_gguf

# Some rows are longer than the tiny Gemma's window of 16, and users have one to five of them.
SIZES = (3, 5, 1)


@pytest.fixture(scope="module")
def decoder(tiny_base: Path) -> Decoder:
    return Decoder(GgufFile(tiny_base))


@pytest.fixture(scope="module")
def llama(llama_base: Path) -> Decoder:
    return Decoder(GgufFile(llama_base))


def rows_of(decoder: Decoder, sizes: Sequence[int] = SIZES, seed: int = 0) -> list[list[Row]]:
    rng = random.Random(seed)
    batches = []
    for size in sizes:
        batches.append([])
        for _ in range(size):
            ids = [rng.randrange(decoder.vocabulary) for _ in range(rng.randrange(6, 40))]
            answer = rng.randrange(1, 5)
            batches[-1].append(Row(tuple(ids[:-1]), len(ids) - 1 - answer, tuple(ids[-answer:]), rng.choice((1.0, 0.25, 2.0))))
    return batches


def flats_of(layout: Layout, users: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(layout.size, generator=generator) * 0.1 for _ in range(users)]


def run(engine: PackedEngine | PaddedEngine, batches: list[list[Row]], flats: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    gradients = [torch.full_like(flat, 9.0) for flat in flats]  # what stood there must be lost
    return engine.gradients(batches, flats, gradients), gradients


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.cpu() - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("targets", "first"),
    [(TARGETS, 0), (("q_proj", "v_proj"), 0), (("k_proj", "up_proj"), 1), (("o_proj", "down_proj", "gate_proj"), 1)],
)
@pytest.mark.parametrize("most_tokens", [32768, 200])
def test_losses_and_gradients_are_those_of_the_packed_engine(
    decoder: Decoder, targets: tuple[str, ...], first: int, most_tokens: int
) -> None:
    layout = Layout(decoder, targets, 3, 6.0, first)
    batches, flats = rows_of(decoder), flats_of(layout, len(SIZES))
    losses, gradients = run(PaddedEngine(decoder, layout, most_tokens), batches, flats)
    theirs, expected = run(PackedEngine(decoder, layout), batches, flats)
    torch.testing.assert_close(losses, theirs, rtol=1e-4, atol=1e-5)
    for mine, other in zip(gradients, expected, strict=True):
        assert other.norm() > 0.01
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_global_layers_of_gemma_see_beyond_the_window(tmp_path: Path) -> None:
    decoder = Decoder(GgufFile(make_gguf(tmp_path / "g.gguf", "gemma3", layers=6)))
    layout = Layout(decoder, TARGETS, 3, 6.0, 4)
    batches, flats = rows_of(decoder), flats_of(layout, len(SIZES))
    losses, gradients = run(PaddedEngine(decoder, layout), batches, flats)
    theirs, expected = run(PackedEngine(decoder, layout), batches, flats)
    torch.testing.assert_close(losses, theirs, rtol=1e-4, atol=1e-5)
    assert max(map(distance, gradients, expected)) < 1e-4


def test_nll_is_that_of_the_packed_engine(decoder: Decoder) -> None:
    layout = Layout(decoder, TARGETS, 3, 6.0, 1)
    batches, flats = rows_of(decoder), flats_of(layout, len(SIZES))
    mine, theirs = PaddedEngine(decoder, layout, 150), PackedEngine(decoder, layout)
    for adapters in (flats, None):
        torch.testing.assert_close(mine.nll(batches, adapters), theirs.nll(batches, adapters), rtol=1e-4, atol=1e-5)
    assert (mine.nll(batches, flats) - mine.nll(batches, None)).abs().min() > 1e-3


def test_a_budget_cuts_the_longest_rows_first(llama: Decoder) -> None:
    batches = rows_of(llama)
    for budget in (1, 100, 150, 32768):
        found = list(blocks(batches, budget))
        shapes = [tuple(block.ids.shape) for block in found]
        assert all(tokens % 16 == 0 for _, _, tokens in shapes)
        assert all(rows == 1 or users * rows * tokens <= budget for users, rows, tokens in shapes)
        assert [tokens for *_, tokens in shapes] == sorted((tokens for *_, tokens in shapes), reverse=True)
        assert sum(len(block.targets) for block in found) == sum(len(row.targets) for rows in batches for row in rows)
        assert (len(found) == 1) == (budget == 32768)
    # A user whose rows are done takes no more part.
    assert [block.users for block in blocks(batches, 1)] == [[0, 1, 2], [0, 1], [0, 1], [1], [1]]


@pytest.mark.parametrize("what", ["parameters", "weights"])
@pytest.mark.parametrize("most_tokens", [32768, 100])
def test_nan_of_one_user_touches_nobody_else(decoder: Decoder, what: str, most_tokens: int) -> None:
    layout = Layout(decoder, TARGETS, 3, 6.0)
    for user in range(len(SIZES)):
        batches, flats = rows_of(decoder), flats_of(layout, len(SIZES))
        engine = PaddedEngine(decoder, layout, most_tokens)
        before, expected = run(engine, batches, flats)
        if what == "parameters":
            flats[user].fill_(torch.nan)
        else:
            batches[user] = [Row(row.ids, row.first, row.targets, float("nan")) for row in batches[user]]
        losses, gradients = run(engine, batches, flats)
        assert losses[user].isnan() and gradients[user].isnan().any()
        for other in {0, 1, 2} - {user}:
            assert torch.equal(losses[other], before[other]) and torch.equal(gradients[other], expected[other])


def test_other_users_rows_change_no_numbers(decoder: Decoder) -> None:
    layout = Layout(decoder, TARGETS, 3, 6.0)
    engine, batches, flats = PaddedEngine(decoder, layout), rows_of(decoder), flats_of(layout, len(SIZES))
    losses, gradients = run(engine, batches, flats)
    for user in range(len(SIZES)):
        alone, own = run(engine, [batches[user]], [flats[user]])
        torch.testing.assert_close(alone[0], losses[user], rtol=1e-5, atol=1e-6)
        assert distance(own[0], gradients[user]) < 1e-5


def test_users_without_rows_or_weight(llama: Decoder) -> None:
    layout = Layout(llama, TARGETS, 2, 4.0)
    engine, flats = PaddedEngine(llama, layout), flats_of(layout, 3)
    full, weightless = rows_of(llama, (2, 1))
    losses, gradients = run(engine, [full, [], [Row(row.ids, row.first, row.targets, 0.0) for row in weightless]], flats)
    assert losses[0] > 0 and losses[1] == 0 and losses[2] == 0
    assert gradients[0].isfinite().all() and not gradients[1].any() and not gradients[2].any()
    assert engine.nll([full, []], flats[:2]).isnan().tolist() == [False, True]


def test_products_in_bfloat16(decoder: Decoder) -> None:
    layout = Layout(decoder, TARGETS, 3, 6.0)
    batches, flats = rows_of(decoder), flats_of(layout, len(SIZES))
    losses, gradients = run(PaddedEngine(decoder, layout, dtype=torch.bfloat16), batches, flats)
    theirs, expected = run(PackedEngine(decoder, layout), batches, flats)
    torch.testing.assert_close(losses, theirs, rtol=0.01, atol=0.01)
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3
    assert max(map(distance, gradients, expected)) < 0.03


def test_nothing_on_the_host_depends_on_a_value_on_the_device(decoder: Decoder) -> None:
    layout, meta = Layout(decoder, TARGETS, 3, 6.0, 1), torch.device("meta")
    flats = [flat.to(meta) for flat in flats_of(layout, len(SIZES))]
    # Tensors of the meta device have no values: who asks for one fails.
    losses, gradients = run(PaddedEngine(decoder, layout, 200, meta, torch.bfloat16), rows_of(decoder), flats)
    assert losses.shape == (len(SIZES),) and gradients[0].is_meta


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_gradients_agree(decoder: Decoder) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU with CUDA")
    layout, cuda = Layout(decoder, TARGETS, 8, 16.0), torch.device("cuda")
    batches, flats = rows_of(decoder), flats_of(layout, len(SIZES))
    theirs, expected = run(PackedEngine(decoder, layout), batches, flats)
    for most_tokens in (32768, 200):
        engine = PaddedEngine(decoder, layout, most_tokens, cuda)
        ours = [flat.to(cuda) for flat in flats]
        run(engine, batches, ours)  # the first run sets up the libraries
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses, gradients = run(engine, batches, ours)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(losses.cpu(), theirs, rtol=0.01, atol=0.01)
        assert max(map(distance, gradients, expected)) < 0.03
        torch.testing.assert_close(engine.nll(batches, None).cpu(), PackedEngine(decoder, layout).nll(batches, None), rtol=0.01, atol=0.01)
