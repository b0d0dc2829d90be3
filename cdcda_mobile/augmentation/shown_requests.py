"""``--show-requests``: exactly what would be sent to the teacher, and nothing is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cdcda_export.manifest import sha256_file
from cdcda_export.progress import Progress
from cdcda_mobile.augmentation.augment import candidates_of, planned, wanted_of
from cdcda_mobile.augmentation.veil import Veil
from cdcda_mobile.config import AugmentConfig, TeacherConfig
from cdcda_mobile.history import Record
from cdcda_mobile.teachers.endpoint import FORMATS, request_body
from cdcda_mobile.teachers.teacher import AnswerLog, Request, endpoint_of

# Stands where the teacher's part of the style card will be, as long as it has not been asked for.
_UNWRITTEN = '{"habits": ["(the teacher\'s answer to the first request)"]}'


def shown_requests(
    train: Sequence[Record],
    held_out: Sequence[Record],
    config: AugmentConfig,
    teacher: TeacherConfig,
    base_gguf: Path,
    seed: int,
    answers: Path,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Yield ``{"to", "body"}`` of every request that a run without a rejected answer would make; more of them follow where some are.

    Args:
        train: training records.
        held_out: validation and test records.
        config: how it is asked.
        teacher: whom it would go to.
        base_gguf: the base model, which teaches itself where no teacher is named.
        seed: of all choices.
        answers: the log of earlier answers; a style card that is in it is shown as it is.
        progress: told what is hidden from the teacher.
    """
    url, name, embedded = _address(teacher, base_gguf)
    cards: list[Request] = []
    veil, log = Veil(train, config, progress), AnswerLog(answers) if answers.exists() else None

    def answered(request: Request) -> str:
        known = log.get(request.key(name)) if log else None
        cards.append(request)
        return known.text if known else _UNWRITTEN

    try:
        planner = planned(train, held_out, veil, config, seed, embedded, answered)
    finally:
        if log:
            log.close()
    for request in cards:
        yield {"to": url, "body": request_body(request, name, FORMATS[0], {})}
    for k in range(candidates_of(config, wanted_of(config, len(train)), embedded)):
        yield {"to": url, "body": request_body(planner.ask(k).request, name, FORMATS[0], {})}


def _address(teacher: TeacherConfig, base_gguf: Path) -> tuple[str, str, bool]:
    """Return where requests go, the model's name there, and whether the base teaches itself."""
    url = endpoint_of(teacher)
    if url:
        return f"{url.rstrip('/')}/chat/completions", teacher.model or "(the first that the endpoint lists)", False
    gguf = Path(teacher.gguf) if teacher.gguf else base_gguf
    return "this machine", f"{gguf.name}@{sha256_file(gguf)[:12]}", not teacher.gguf
