"""Many texts in one llama.cpp context: what all of them begin with is computed once, and their answers grow side by side.

Every text has a stream of the cache of its own (``kv_unified`` off): a text then meets the same numbers in the same order as it does
alone, so that the answers are the same, and it pays no attention to the others' cells. A prompt is read by itself, because llama.cpp cuts
batches of unequal streams into small pieces; the steps after it, one token for each text, are taken together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cdcda_export.errors import ExportError

# More streams cost memory and were no faster on two cores.
_STREAMS = 8
_BATCH = 512
_CELLS = 256  # llama.cpp rounds a stream up to this

Ids = Sequence[int]


def common_prefix(texts: Sequence[Ids]) -> int:
    """Return how many tokens all texts begin with, less than the shortest has: what follows its last token is wanted of every text."""
    ordered = sorted(map(tuple, texts))
    limit = max(0, min(map(len, texts)) - 1)
    # Of texts in order, the first and the last agree least.
    return next((at for at in range(limit) if ordered[0][at] != ordered[-1][at]), limit)


@dataclass
class _Streams:
    """An open context; stream 0 holds the common prefix, the others are copies of it that go on."""

    context: Any
    batch: Any
    vocabulary: int
    prefix: Ids

    def begin(self, wanted: int = 0) -> np.ndarray:
        """Read the prefix; return the logits after its last ``wanted`` tokens, (wanted, vocabulary)."""
        return self.read(0, self.prefix, 0, wanted)

    def restart(self, stream: int) -> None:
        """Let a stream begin again behind the prefix."""
        import llama_cpp

        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_seq_rm(memory, stream, -1, -1)
        if self.prefix:
            llama_cpp.llama_memory_seq_cp(memory, 0, stream, -1, -1)

    def forget(self, stream: int, position: int) -> None:
        """Let a stream forget what stands from a position on."""
        import llama_cpp

        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), stream, position, -1)

    def read(self, stream: int, ids: Ids, at: int, wanted: int) -> np.ndarray:
        """Read a text on one stream from position ``at``; return the logits after its last ``wanted`` tokens, (wanted, vocabulary)."""
        first = len(ids) - wanted
        parts = [np.empty((0, self.vocabulary), np.float32)]
        for begin in range(0, len(ids), _BATCH):
            end = min(begin + _BATCH, len(ids))
            parts.append(self.decode([(stream, ids[i], at + i, i >= first) for i in range(begin, end)]))
        return np.concatenate(parts)

    def decode(self, tokens: Sequence[tuple[int, int, int, bool]]) -> np.ndarray:
        """Decode (stream, id, position, wanted) in one batch; return the logits after the wanted ones: float32, (wanted, vocabulary)."""
        import llama_cpp

        self.batch.n_tokens = len(tokens)
        for at, (stream, token, position, wanted) in enumerate(tokens):
            self.batch.token[at], self.batch.pos[at], self.batch.logits[at] = token, position, wanted
            self.batch.n_seq_id[at], self.batch.seq_id[at][0] = 1, stream
        code = llama_cpp.llama_decode(self.context, self.batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        rows = [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, at), shape=(self.vocabulary,))
            for at, (*_, wanted) in enumerate(tokens)
            if wanted
        ]
        return np.array(rows, dtype=np.float32).reshape(-1, self.vocabulary)


@contextmanager
def _streams(llm: Any, prefix: Ids, count: int, cells: int) -> Iterator[_Streams]:
    """Open a context of ``count`` streams of ``cells`` tokens beside the model's own, with its settings and its adapter."""
    import llama_cpp

    settings = type(llm.context_params).from_buffer_copy(llm.context_params)
    settings.n_seq_max, settings.kv_unified = count + 1, False
    settings.n_ctx = (count + 1) * _CELLS * -(-cells // _CELLS)
    settings.n_batch = settings.n_ubatch = _BATCH
    context = llama_cpp.llama_init_from_model(llm._model.model, settings)
    if context is None:
        raise ExportError(f"llama.cpp finds no room for {count} texts of {cells} tokens side by side; free some memory.")
    batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
    try:
        if llm._lora_adapter is not None:
            import ctypes

            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(llm._lora_adapter)
            llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(llm.lora_scale))
        yield _Streams(context, batch, llm.n_vocab(), prefix)
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)


def answer_logits(llm: Any, texts: Sequence[tuple[Ids, Ids]]) -> Iterator[np.ndarray]:
    """Yield the logits that predict every answer, in order: float32, shape (answer tokens, vocabulary).

    Args:
        llm: a loaded ``llama_cpp.Llama``.
        texts: (prompt, answer) as ids, neither of them empty.
    """
    if not texts:
        return
    read = [(*prompt, *answer[:-1]) for prompt, answer in texts]
    shared = common_prefix(read)
    # Where all prompts are the same, the prefix reaches into the answers and predicts the first of their tokens.
    first = min(len(prompt) for prompt, _ in texts) - 1
    with _streams(llm, read[0][:shared], 1, max(map(len, read))) as streams:
        predicted = streams.begin(max(0, shared - first))
        for ids, (prompt, answer) in zip(read, texts, strict=True):
            head = predicted[len(prompt) - 1 - first :]
            streams.restart(1)
            yield np.concatenate([head, streams.read(1, ids[shared:], shared, len(answer) - len(head))])


@dataclass
class _Growing:
    """One answer on its way."""

    index: int
    limit: int
    position: int
    ids: list[int] = field(default_factory=list)


def continuations(
    llm: Any,
    prompts: Sequence[Ids],
    limits: Sequence[int],
    ends_turn: Callable[[int], bool],
    advance: Callable[[], object],
    expected: Sequence[Ids] = (),
    predicted: Callable[[int, np.ndarray], object] = lambda index, logits: None,
) -> list[list[int]]:
    """Return the greedy continuation of every prompt, in order, without the end marker.

    An answer that is expected is read with its prompt, for the logits that predict it, and forgotten before the model's own begins.

    Args:
        llm: a loaded ``llama_cpp.Llama``.
        prompts: ids, none of them empty.
        limits: the most tokens of each continuation.
        ends_turn: says whether an id is an end marker.
        advance: called once for every continuation that is finished.
        expected: an answer to each prompt as ids, none of them empty; or no answers at all.
        predicted: told the number of a prompt and the logits that predict its expected answer, (answer tokens, vocabulary).
    """
    answers: list[list[int]] = [[] for _ in prompts]
    waiting = deque(range(len(prompts)))
    if not waiting:
        return answers
    shared, count = common_prefix(prompts), min(_STREAMS, len(prompts))
    follows = [tuple(answer[:-1]) for answer in expected] or [()] * len(prompts)
    cells = max(len(prompt) + max(limit, len(follow)) for prompt, limit, follow in zip(prompts, limits, follows, strict=True))
    growing: dict[int, _Growing] = {}

    def take(stream: int, text: _Growing, logits: np.ndarray) -> None:
        token = int(np.argmax(logits))
        ended = text.limit == 0 or ends_turn(token)
        if not ended:
            text.ids.append(token)
        if ended or len(text.ids) == text.limit:
            answers[text.index] = text.ids
            growing.pop(stream)
            advance()

    with _streams(llm, prompts[0][:shared], count, cells) as streams:
        streams.begin()
        while waiting or growing:
            for stream in range(1, count + 1):
                if waiting and stream not in growing:
                    index = waiting.popleft()
                    prompt, follow = prompts[index], follows[index]
                    text = growing[stream] = _Growing(index, max(0, limits[index]), len(prompt))
                    streams.restart(stream)
                    logits = streams.read(stream, (*prompt[shared:], *follow), shared, 1 + len(follow))
                    if expected:
                        predicted(index, logits)
                        streams.forget(stream, len(prompt))
                    take(stream, text, logits[0])
            # Read in the order of the streams: llama.cpp takes neighbours together.
            step = sorted(growing.items())
            if not step:
                continue
            rows = streams.decode([(stream, text.ids[-1], text.position + len(text.ids) - 1, True) for stream, text in step])
            for (stream, text), logits in zip(step, rows, strict=True):
                take(stream, text, logits)
    return answers
