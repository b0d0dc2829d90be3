"""The real runtime: a GGUF in llama.cpp, asked for token ids, logits and greedy answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cdcda_export.errors import FileError, MissingDependency

_log: list[str] = []


@cache
def _keep_log_to_ourselves() -> Any:
    """Route llama.cpp's log into a short list: it says why a load failed, and never speaks on the user's screen."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def remember(_level: int, text: bytes, _data: object) -> None:
        if text.strip():
            _log.append(text.decode(errors="replace").strip())
            del _log[:-20]

    llama_cpp.llama_log_set(remember, None)
    return remember  # kept alive by the cache: llama.cpp holds only a pointer


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
        _keep_log_to_ourselves()
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
        for _ in range(min(max_tokens, self.n_ctx - len(prompt) - 1)):
            token = int(np.argmax(self._llm.scores[self._llm.n_tokens - 1]))
            if self._ends_turn(token):
                return
            yield token
            self._llm.eval([token])

    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Return the whole greedy continuation without the end marker."""
        return list(self.stream(prompt, max_tokens))
