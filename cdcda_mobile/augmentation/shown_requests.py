"""``--show-requests``: what a run would still send to the teacher, and nothing is sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdcda_export.manifest import sha256_file
from cdcda_export.progress import Progress
from cdcda_mobile.augmentation.augment import candidates_of, planned, wanted_of
from cdcda_mobile.augmentation.veil import Veil
from cdcda_mobile.config import AugmentConfig, TeacherConfig
from cdcda_mobile.history import Record
from cdcda_mobile.teachers.endpoint import FORMATS, request_body
from cdcda_mobile.teachers.native_server import native_server
from cdcda_mobile.teachers.teacher import Answer, AnswerLog, Budget, Request, endpoint_of, local_form

# Stands where the teacher's part of the style card will be, as long as it has not been asked for.
_UNWRITTEN = '{"habits": ["(the teacher\'s answer to the first request)"]}'
_UNNAMED = "(the first that the endpoint lists)"


@dataclass(frozen=True)
class _Address:
    """Where requests go, the model's name there, and how it is asked."""

    to: str
    model: str
    embedded: bool
    form: str
    extra: dict[str, Any]

    def request(self, request: Request) -> dict[str, Any]:
        return {"to": self.to, "body": request_body(request, self.model, self.form, self.extra)}


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
    """Yield ``{"to", "body"}`` of every request that a run would still send if none of the answers were rejected.

    Args:
        train: training records.
        held_out: validation and test records.
        config: how it is asked.
        teacher: whom it would go to, and the budget; requests that are not answered yet have no tokens.
        base_gguf: the base model, which teaches itself where no teacher is named.
        seed: of all choices.
        answers: the log of earlier answers. It goes by the model's name, so it says nothing where the endpoint chooses the model.
        progress: told what is hidden from the teacher.
    """
    if not config.keep:
        return
    address, budget = _address(teacher, base_gguf), Budget(teacher.max_requests, teacher.token_budget)
    log = AnswerLog(answers) if answers.exists() and address.model != _UNNAMED else None
    cards: list[Request] = []

    def known(request: Request) -> Answer | None:
        answer = log.get(request.key(address.model)) if log else None
        budget.spend(answer.tokens if answer else 0)
        return answer

    def card(request: Request) -> str:
        if not budget.admit():
            return ""
        answer = known(request)
        if answer is None:
            cards.append(request)
        return answer.text if answer else _UNWRITTEN

    try:
        planner = planned(train, held_out, Veil(train, config, progress), config, seed, address.embedded, card)
    finally:
        if log:
            log.close()
    yield from map(address.request, cards)
    wanted = wanted_of(config, len(train))
    for k in range(min(candidates_of(config, wanted, address.embedded), wanted * config.max_attempts)):
        if not budget.admit():
            return
        request = planner.ask(k).request
        if known(request) is None:
            yield address.request(request)


def _address(teacher: TeacherConfig, base_gguf: Path) -> _Address:
    url = endpoint_of(teacher)
    if url:
        return _Address(f"{url.rstrip('/')}/chat/completions", teacher.model or _UNNAMED, False, FORMATS[0], {})
    gguf = Path(teacher.gguf) if teacher.gguf else base_gguf
    return _Address("this machine", f"{gguf.name}@{sha256_file(gguf)[:12]}", not teacher.gguf, *local_form(native_server()))
