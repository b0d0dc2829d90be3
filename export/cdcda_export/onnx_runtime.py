"""The real runtime of an ONNX directory: ONNX Runtime on the CPU, asked for token ids, logits and greedy answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cdcda_export.errors import FileError, MissingDependency
from cdcda_export.runtime import cpu_threads
from cdcda_export.verify import Probe, nll_of


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise FileError(f"{path} is truncated or no JSON; export it again.") from error
    if not isinstance(value, dict):
        raise FileError(f"{path} does not hold a JSON object; export it again.")
    return value


class OnnxModel:
    """A loaded ONNX directory; use as a context manager.

    Args:
        directory: holds ``model.onnx``, ``tokenizer.json``, ``config.json`` and ``generation_config.json``.

    Raises:
        FileError: a file is missing, truncated or not what it should be.
        MissingDependency: onnxruntime is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            import onnxruntime
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingDependency("optimum and onnxruntime", "onnx") from error
        self.path = directory / "model.onnx"
        config, generation = _read_json(directory / "config.json"), _read_json(directory / "generation_config.json")
        tokenizer = _read_json(directory / "tokenizer.json")
        if "model" not in tokenizer or "max_position_embeddings" not in config:
            raise FileError(f"{directory} does not hold a model exported with --format onnx; export it again.")
        self._tokenizer: Any = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.n_ctx, self.vocabulary = int(config["max_position_embeddings"]), int(self._tokenizer.get_vocab_size())
        ends = generation.get("eos_token_id", [])
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        self._ort = onnxruntime
        self._session: Any = self._open()
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._past = [name for name in inputs if name.startswith("past_key_values.")]
        self._takes_positions = "position_ids" in inputs
        self._shapes = {name: (1, inputs[name].shape[1], 0, inputs[name].shape[3]) for name in self._past}
        self._present = [name.replace("past_key_values", "present") for name in self._past]

    def _open(self) -> Any:
        if not self.path.is_file():
            raise FileError(f"{self.path} does not exist; export it with --format onnx.")
        state = self._ort.capi.onnxruntime_pybind11_state
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = cpu_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        known = (state.InvalidProtobuf, state.InvalidGraph, state.Fail, state.RuntimeException, state.NoSuchFile, state.InvalidArgument)
        try:
            return self._ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except (*known, state.NotImplemented) as error:
            raise FileError(f"ONNX Runtime cannot load {self.path}; it is truncated or damaged, export it again.") from error

    def __enter__(self) -> OnnxModel:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Free the model."""
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._session = None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a rendered text, nothing added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def empty(self) -> list[Any]:
        """Return the cache before the first token."""
        return [self._ort.OrtValue.ortvalue_from_numpy(np.zeros(self._shapes[name], np.float32)) for name in self._past]

    def step(self, ids: list[int], past: list[Any], seen: int) -> tuple[np.ndarray, list[Any]]:
        """Run ``ids`` after ``seen`` tokens; return logits, float32 (len(ids), vocabulary), and the cache, which ONNX Runtime owns."""
        value = self._ort.OrtValue.ortvalue_from_numpy
        feed = {"input_ids": value(np.array([ids], np.int64)), "attention_mask": value(np.ones((1, seen + len(ids)), np.int64))}
        if self._takes_positions:
            feed["position_ids"] = value(np.arange(seen, seen + len(ids), dtype=np.int64)[None])
        feed |= dict(zip(self._past, past, strict=True))
        logits, *present = self._session.run_with_ort_values(["logits", *self._present], feed)
        return logits.numpy()[0], present

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return the next-token logits after every position: float32, shape (len(ids), vocabulary)."""
        return self.step(ids, self.empty(), 0)[0]

    def stream(self, prompt: list[int], max_tokens: int) -> Iterator[int]:
        """Yield the most likely continuation token by token, up to the end of the turn (which is left out)."""
        logits, past = self.step(prompt, self.empty(), 0)
        seen = len(prompt)
        for _ in range(min(max_tokens, self.n_ctx - len(prompt) - 1)):
            token = int(np.argmax(logits[-1]))
            if token in self.ends:
                return
            yield token
            logits, past = self.step([token], past, seen)
            seen += 1

    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Return the whole greedy continuation without the end marker."""
        return list(self.stream(prompt, max_tokens))

    def nll_many(self, probes: Sequence[Probe]) -> list[float]:
        """Return the summed negative log likelihood of every probe's answer, in nats, one after another."""
        return [float(nll_of(self.logits(probe.ids)[probe.answer_positions()], probe.answer).sum()) for probe in probes]

    def greedy_many(self, prompts: Sequence[list[int]], max_tokens: int, advance: Callable[[], object] = lambda: None) -> list[list[int]]:
        """Return the greedy continuation of every prompt, one after another; ``advance`` is called after each."""
        answers = []
        for prompt in prompts:
            answers.append(self.greedy(prompt, max_tokens))
            advance()
        return answers
