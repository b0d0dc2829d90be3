"""Many texts at once give what each gives alone: common beginnings, unequal lengths, streams that are used again, run-time adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cdcda_export.adapter import read_adapter
from cdcda_export.batched import common_prefix
from cdcda_export.errors import ExportError
from cdcda_export.gguf import GgufFile
from cdcda_export.lora_gguf import write_lora_gguf
from cdcda_export.runtime import LlamaCpp
from cdcda_export.verify import Probe, nll_of

PREFIX = list(range(20, 44))  # longer than the sliding window of the tiny gemma3
CONTEXT = 96


def texts(count: int, prefix: list[int] = PREFIX) -> list[list[int]]:
    """Prompts of unequal lengths with a common beginning."""
    chance = np.random.default_rng(3)
    return [[*prefix, *chance.integers(3, 250, 3 + 5 * i % 17).tolist()] for i in range(count)]


def probes(count: int) -> list[Probe]:
    chance = np.random.default_rng(5)
    return [Probe("", "", tuple(prompt), tuple(chance.integers(3, 250, 1 + i % 4).tolist())) for i, prompt in enumerate(texts(count))]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads of a model of two layers mostly wait for each other."""
    monkeypatch.setattr("cdcda_export.runtime.cpu_threads", lambda: 1)


@pytest.fixture
def model(tiny_base: Path) -> Iterator[LlamaCpp]:
    with LlamaCpp(tiny_base, n_ctx=CONTEXT) as loaded:
        yield loaded


def alone(runtime: LlamaCpp, probe: Probe) -> float:
    return float(nll_of(runtime.logits(probe.ids)[probe.answer_positions()], probe.answer).sum())


@pytest.mark.parametrize(
    ("found", "length"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[1], [1, 2]], 0),
        ([[5, 1, 9], [5, 2, 9], [5, 1, 9]], 1),
        ([[7, 8, 9]], 2),
    ],
)
def test_the_common_beginning_leaves_every_text_its_last_token(found: list[list[int]], length: int) -> None:
    assert common_prefix(found) == length


def test_answers_and_likelihoods_are_those_of_one_text_alone(model: LlamaCpp) -> None:
    prompts, asked, finished = texts(11), probes(11), []
    assert model.greedy_many(prompts, 6, lambda: finished.append(1)) == [model.greedy(prompt, 6) for prompt in prompts]
    assert len(finished) == 11
    assert model.nll_many(asked) == pytest.approx([alone(model, probe) for probe in asked], abs=1e-3)


def test_answers_to_one_prompt_share_their_beginnings_too(model: LlamaCpp) -> None:
    prompt, opening = tuple(PREFIX), (90, 91, 92)
    asked = [Probe("", "", prompt, (*opening, *rest)) for rest in ((100,), (101, 102), (103, 104, 105))]
    asked.append(Probe("", "", (*prompt, *opening[:2]), (92, 110)))  # a longer prompt that begins alike
    for probes_ in (asked, asked[:3], asked[:1], [asked[0], asked[0]]):
        assert model.nll_many(probes_) == pytest.approx([alone(model, probe) for probe in probes_], abs=1e-3)


def test_asked_for_both_at_once_it_gives_the_same(model: LlamaCpp) -> None:
    for asked in (probes(11), probes(1), [Probe("", "", tuple(PREFIX), (90, 91, 92)), Probe("", "", tuple(PREFIX), (90,))], []):
        nll, answers = model.nll_and_greedy_many(asked, 6)
        assert nll == pytest.approx(model.nll_many(asked), abs=1e-3)
        assert answers == model.greedy_many([list(probe.prompt) for probe in asked], 6)


def test_a_text_ends_with_its_turn_and_its_stream_is_used_again(llama_base: Path) -> None:
    with LlamaCpp(llama_base, n_ctx=CONTEXT) as model:
        prompts = texts(20, [])
        plain = [model.greedy(prompt, 8) for prompt in prompts]
        ends = {answer[at] for at, answer in zip([0, 1, 3, 5] * 5, plain, strict=True)}
        model._ends_turn = lambda token: token in ends  # type: ignore[method-assign]
        cut = [model.greedy(prompt, 8) for prompt in prompts]
        assert len({len(answer) for answer in cut} - {8}) >= 3
        assert model.greedy_many(prompts, 8) == cut


def test_nothing_asked_nothing_answered_and_no_room_no_tokens(llama_base: Path) -> None:
    with LlamaCpp(llama_base, n_ctx=CONTEXT) as model:
        assert model.greedy_many([], 4) == []
        assert model.nll_many([]) == []
        full = [list(range(20, 20 + CONTEXT - 1)), list(range(30, 36))]
        assert [len(answer) for answer in model.greedy_many(full, 4)] == [0, 4]
        with pytest.raises(ExportError, match="A text takes 97 tokens, the limit is 96"):
            model.greedy_many([list(range(97))], 4)


def test_an_adapter_at_run_time_speaks_in_every_stream(llama_base: Path, llama_adapter: Path, tmp_path: Path) -> None:
    file = GgufFile(llama_base)
    lora = write_lora_gguf(file, read_adapter(llama_adapter, file), tmp_path / "lora.gguf").path
    with LlamaCpp(llama_base, n_ctx=CONTEXT, adapter=lora) as model, LlamaCpp(llama_base, n_ctx=CONTEXT) as plain:
        asked = probes(3)
        assert model.nll_many(asked) == pytest.approx([alone(model, probe) for probe in asked], abs=1e-3)
        assert model.nll_many(asked) != pytest.approx(plain.nll_many(asked), abs=1e-2)
        assert model.greedy_many(texts(3), 6) == [model.greedy(prompt, 6) for prompt in texts(3)]
