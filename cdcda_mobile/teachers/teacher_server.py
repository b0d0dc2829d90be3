"""The local teacher's process: ``python -m cdcda_mobile.teachers.teacher_server MODEL.gguf --alias NAME``.

llama-cpp-python's own OpenAI-compatible server with three changes. The answer to a request depends on the request alone, not on
what was asked before. The grammar of structured output is checked on the token that was drawn, as llama.cpp's own tools do, instead
of on all 49,152 at every step, which took half the time. And the process ends when its parent does, however that ends.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from cdcda_mobile.teachers.bound import end_with_parent

KEY_VARIABLE = "CDCDA_LOCAL_TEACHER_KEY"
CONTEXT_TOKENS = 2048


def die_with_parent(parent: int) -> None:
    """Arrange that this process ends when the process ``parent`` does, SIGKILL included.

    Linux sends a signal; the pipe on standard input, which closes with the parent, covers other systems and the moment before.
    """
    end_with_parent(parent)
    threading.Thread(target=_exit_at_end_of_input, daemon=True).start()


def _exit_at_end_of_input() -> None:
    while os.read(0, 64):
        pass
    os._exit(1)


class CheckedSampler:
    """Draws a token from a sampler chain and asks the grammar about that token only; draws again under the grammar if it refuses.

    Args:
        chain: a ``LlamaSampler`` without a grammar.
        rules: a ``LlamaSampler`` that holds the grammar alone.
        n_vocab: size of the vocabulary.
    """

    def __init__(self, chain: Any, rules: Any, n_vocab: int) -> None:
        import numpy as np

        self._chain, self._rules = chain, rules
        layout = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._candidates = np.zeros(n_vocab, layout)
        self._ids = np.arange(n_vocab, dtype=np.int32)

    def sample(self, context: Any, index: int) -> int:
        """Return the next token; ``index`` is the row of logits, as in ``LlamaSampler.sample``."""
        import llama_cpp
        import numpy as np

        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context.ctx, index), shape=self._candidates.shape)
        token = self._draw(self._fill(logits))
        if not self._allows(token):
            everything = self._fill(logits)
            llama_cpp.llama_sampler_apply(self._rules.sampler, ctypes.byref(everything))
            token = self._draw(everything)
        self._rules.accept(token)
        self._chain.accept(token)
        return token

    def close(self) -> None:
        """Free both samplers."""
        self._chain.close()
        self._rules.close()

    def _fill(self, logits: Any) -> Any:
        self._candidates["id"] = self._ids  # samplers sort in place
        self._candidates["logit"] = logits
        self._candidates["p"] = 0
        return self._array(self._candidates)

    @staticmethod
    def _array(candidates: Any) -> Any:
        import llama_cpp

        array = llama_cpp.llama_token_data_array()
        array.data = candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        array.size, array.selected, array.sorted = len(candidates), -1, False
        return array

    def _draw(self, array: Any) -> int:
        import llama_cpp

        llama_cpp.llama_sampler_apply(self._chain.sampler, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _allows(self, token: int) -> bool:
        import llama_cpp
        import numpy as np

        one = np.array([(token, 1.0, 0.0)], self._candidates.dtype)
        llama_cpp.llama_sampler_apply(self._rules.sampler, ctypes.byref(self._array(one)))
        return bool(np.isfinite(one["logit"][0]))


def stateless_llama() -> type:
    """Return a ``llama_cpp.Llama`` whose completions depend on nothing but their arguments."""
    import llama_cpp
    from llama_cpp._internals import LlamaSampler

    class StatelessLlama(llama_cpp.Llama):
        """``generate`` would keep the longest common prefix of the last prompt, which changes how later sums are rounded."""

        def generate(self, tokens: Any, **settings: Any) -> Any:
            self.reset()
            self._ctx.kv_cache_clear()
            return super().generate(tokens, **settings)

        def _init_sampler(self, **settings: Any) -> Any:
            grammar = settings.pop("grammar", None)
            chain = super()._init_sampler(**settings)
            if grammar is None:
                return chain
            rules = LlamaSampler()
            rules.add_grammar(self._model, grammar)
            return CheckedSampler(chain, rules, self.n_vocab())

    return StatelessLlama


def build_app(gguf: Path, alias: str, key: str, threads: int, context: int) -> Any:
    """Load the model and return the FastAPI application."""
    import llama_cpp
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    os.environ.pop("CONFIG_FILE", None)
    for settings in (ModelSettings, ServerSettings):
        for name in settings.model_fields:  # both would read SEED, LORA_PATH and the like from the environment
            for variable in (name, name.upper()):
                os.environ.pop(variable, None)
    from llama_cpp.server.app import create_app

    llama_cpp.Llama = stateless_llama()
    model = ModelSettings(
        model=str(gguf),
        model_alias=alias,
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    return create_app(server_settings=ServerSettings(api_key=key, host="127.0.0.1"), model_settings=[model])


def main(arguments: list[str] | None = None) -> None:
    """Serve one GGUF on a free loopback port, which is written to standard output as one JSON line once it listens."""
    parser = argparse.ArgumentParser(prog="python -m cdcda_mobile.teachers.teacher_server", description="Serve a local teacher.")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--context", type=int, default=CONTEXT_TOKENS)
    options = parser.parse_args(arguments)
    die_with_parent(options.parent)
    key = os.environ.pop(KEY_VARIABLE)

    import uvicorn

    app = build_app(options.gguf, options.alias, key, options.threads, options.context)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        sys.stdout.write(json.dumps({"port": listener.getsockname()[1]}) + "\n")
        sys.stdout.flush()
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


if __name__ == "__main__":
    main()
