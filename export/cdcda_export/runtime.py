"""The real runtime: a GGUF in llama.cpp, asked for token ids, logits and greedy answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from cdcda_export.batched import answer_logits, continuations
from cdcda_export.errors import ExportError, FileError, MissingDependency

if TYPE_CHECKING:
    from cdcda_export.verify import Probe

_log: list[str] = []
_WARNING, _ERROR = 3, 4  # levels of ggml's log


def keep_log_to_ourselves(aloud: bool = False) -> None:
    """Route llama.cpp's log into a short list: it says why a load failed, and never speaks on the user's screen.

    Args:
        aloud: repeat warnings and errors on standard error, for a child whose parent reads them: where it crashes, they tell why.
    """
    import llama_cpp

    llama_cpp.llama_log_set(_listener(aloud), None)


@cache
def _listener(aloud: bool) -> Any:
    """Return the callback; the cache keeps it alive, for llama.cpp holds only a pointer."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def remember(level: int, text: bytes, _data: object) -> None:
        if text.strip():
            _log.append(text.decode(errors="replace").strip())
            del _log[:-20]
            if aloud and level in (_WARNING, _ERROR):
                sys.stderr.write(f"{_log[-1]}\n")

    return remember


def last_words() -> list[str]:
    """Return the last lines of llama.cpp's log, for which ``keep_log_to_ourselves`` was called."""
    return [*_log]


def _reason(error: Exception) -> str:
    """Return llama.cpp's own last complaint, or the exception's text."""
    said = [line for line in _log if "error" in line.lower() or "failed" in line.lower()]
    return (said[0] if said else str(error)).rstrip(".")


def cpu_threads() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class LlamaCpp:
    """A loaded GGUF; use as a context manager.

    Args:
        path: the model file.
        n_ctx: longest text in tokens.
        adapter: an adapter GGUF applied at run time (``--lora``), None for none.
        vocab_only: load the tokenizer alone.

    Raises:
        FileError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, n_ctx: int = 1024, adapter: Path | None = None, vocab_only: bool = False) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise MissingDependency("llama-cpp-python", "export") from error
        keep_log_to_ourselves()
        _log.clear()
        self.path = path
        lora = None if adapter is None else str(adapter)
        try:
            self._llm: Any = llama_cpp.Llama(
                str(path),
                n_ctx=n_ctx,
                n_batch=min(n_ctx, 512),
                n_ubatch=min(n_ctx, 512),
                n_threads=cpu_threads(),
                n_threads_batch=cpu_threads(),
                logits_all=not vocab_only,
                vocab_only=vocab_only,
                lora_path=lora,
                verbose=False,
            )
        except (ValueError, RuntimeError, AssertionError) as error:
            raise FileError(f"llama.cpp cannot load {path}{' with ' + lora if lora else ''}: {_reason(error)}.") from error
        self.n_ctx = n_ctx

    def __enter__(self) -> LlamaCpp:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Free the model."""
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._llm.close()

    @property
    def eos(self) -> int:
        """The id that ends a turn."""
        return int(self._llm.token_eos())

    def encode(self, text: str) -> list[int]:
        """Return the ids of a rendered text, nothing added."""
        return list(self._llm.tokenize(text.encode(), add_bos=False, special=True))

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return str(self._llm.detokenize(ids).decode(errors="replace"))

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return the next-token logits after every position: float32, shape (len(ids), vocabulary)."""
        self._llm.reset()
        self._llm.eval(ids)
        return np.array(self._llm.scores[: len(ids)], dtype=np.float32)

    def _ends_turn(self, token: int) -> bool:
        import llama_cpp

        return bool(llama_cpp.llama_vocab_is_eog(self._llm._model.vocab, token))

    def stream(self, prompt: list[int], max_tokens: int) -> Iterator[int]:
        """Yield the most likely continuation token by token, up to the end of the turn (which is left out)."""
        self._llm.reset()
        self._llm.eval(prompt)
        for _ in range(self._room(prompt, max_tokens)):
            token = int(np.argmax(self._llm.scores[self._llm.n_tokens - 1]))
            if self._ends_turn(token):
                return
            yield token
            self._llm.eval([token])

    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Return the whole greedy continuation without the end marker."""
        return list(self.stream(prompt, max_tokens))

    def _room(self, prompt: Sequence[int], max_tokens: int) -> int:
        """Return how many tokens may follow a prompt."""
        return min(max_tokens, self.n_ctx - len(prompt) - 1)

    def _check_length(self, texts: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, texts), default=0)
        if longest > self.n_ctx:
            raise ExportError(f"A text takes {longest} tokens, the limit is {self.n_ctx}; shorten it or raise train.max_tokens.")

    def nll_many(self, probes: Sequence[Probe]) -> list[float]:
        """Return the summed negative log likelihood of every probe's answer, in nats; a common beginning of the prompts is read once.

        Raises:
            ExportError: a probe is longer than the context.
        """
        from cdcda_export.verify import nll_of

        self._check_length([probe.ids for probe in probes])
        found = answer_logits(self._llm, [(probe.prompt, probe.answer) for probe in probes])
        return [float(nll_of(logits, probe.answer).sum()) for logits, probe in zip(found, probes, strict=True)]

    def greedy_many(self, prompts: Sequence[list[int]], max_tokens: int, advance: Callable[[], object] = lambda: None) -> list[list[int]]:
        """Return the greedy continuation of every prompt, as ``greedy`` gives it, several at a time.

        Args:
            prompts: ids; a common beginning is read once.
            max_tokens: of each continuation.
            advance: called once for every continuation that is finished.

        Raises:
            ExportError: a prompt is longer than the context.
        """
        self._check_length(prompts)
        return continuations(self._llm, prompts, [self._room(p, max_tokens) for p in prompts], self._ends_turn, advance)

    def nll_and_greedy_many(self, probes: Sequence[Probe], max_tokens: int) -> tuple[list[float], list[list[int]]]:
        """Return what ``nll_many`` and ``greedy_many`` give, reading every prompt once; last bits of sums may differ.

        Raises:
            ExportError: a probe is longer than the context.
        """
        from cdcda_export.verify import nll_of

        self._check_length([probe.ids for probe in probes])
        nll = [0.0] * len(probes)

        def predicted(index: int, logits: np.ndarray) -> None:
            nll[index] = float(nll_of(logits, probes[index].answer).sum())

        prompts, answers = [probe.prompt for probe in probes], [probe.answer for probe in probes]
        limits = [self._room(prompt, max_tokens) for prompt in prompts]
        return nll, continuations(self._llm, prompts, limits, self._ends_turn, lambda: None, answers, predicted)
