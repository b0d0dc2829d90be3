"""A real endpoint on loopback that keeps what it is sent and answers with records that repeat what stands for a person's values."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from planted_values import Value

_ALIKE, _FEW_WORDS = 0.4, 15  # share of words that two spellings of a message have in common; of few words none need be
_LETTERS = str.maketrans("0123456789abcdef", "bdfgklmnprstaeio")

Body = dict[str, Any]


# Texts.


def plain(text: str) -> str:
    """Return a text without case, and with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def squeezed(text: str) -> str:
    """Return the letters and digits of a text alone."""
    return re.sub(r"[\W_]", "", plain(text))


def stands_in(text: str, part: str) -> bool:
    """Say whether a part stands in a text, both :func:`plain`, as a whole: not as the beginning of a longer word or number."""
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


def texts_of(value: Any) -> Iterator[str]:
    """Give every text in a request's body; those that are JSON themselves opened too."""
    if isinstance(value, dict):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)
    elif isinstance(value, str):
        yield value
        if value.startswith("{"):
            try:
                yield from texts_of(json.loads(value))
            except ValueError:
                pass


def pairs_of(before: Body, after: Body) -> list[tuple[str, str]] | None:
    """Return every message as it was and as it was sent; None where the two requests are not about the same records."""
    old, new = ([(m["role"], _opened(m["content"])) for m in body["messages"]] for body in (before, after))
    if [role for role, _ in old] != [role for role, _ in new]:
        return None
    pairs = [(a, b) for (_, a), (_, b) in zip(old, new, strict=True)]
    return pairs if all(_alike(*pair) for pair in pairs) else None


def _opened(content: str) -> str:
    """Return a message; one that is JSON as the texts in it."""
    texts = list(texts_of(content))
    return " \n ".join(texts[1:] or texts)


def _alike(before: str, after: str) -> bool:
    old, new = (Counter(re.findall(r"[^\W\d_]{3,}", text.casefold())) for text in (before, after))
    return old.total() < _FEW_WORDS or (old & new).total() >= _ALIKE * old.total()


# The endpoint.


@dataclass(frozen=True)
class Echo:
    """A text that the endpoint wrote: its first words, and the value whose stand-in follows them."""

    mark: str
    value: str
    stand_in: str


@dataclass
class Endpoint:
    """An OpenAI-compatible server on loopback that keeps every body; it answers in made-up words and repeats what stands for values.

    Args:
        values: what was planted.
        known: the bodies of the run without redaction by their seed, empty in that run.
    """

    values: Sequence[Value]
    known: dict[int, Body] = field(default_factory=dict)
    bodies: dict[int, Body] = field(default_factory=dict)
    raw: list[str] = field(default_factory=list)
    echoes: list[Echo] = field(default_factory=list)

    def answer(self, body: Body) -> str:
        """Return a valid record for a request, as JSON."""
        state = hashlib.sha512(json.dumps([body["messages"], body["seed"]]).encode()).hexdigest()
        made = [state[i : i + 5].translate(_LETTERS) for i in range(0, 120, 5)]
        asked = list(body["response_format"]["json_schema"]["schema"]["properties"])
        sides = {name: {"input": made[:16], "output": made[16:20]}.get(name, made[20:]) for name in asked}
        repeated = dict(zip([name for name in asked if name in ("input", "output")], self._stand_ins(body).items(), strict=False))
        self.echoes += [Echo(" ".join(sides[name]), value, stand_in) for name, (value, stand_in) in repeated.items()]
        written = {name: [*words, repeated[name][1]] if name in repeated else words for name, words in sides.items()}
        return json.dumps({name: " ".join(words) for name, words in written.items()}, ensure_ascii=False)

    def _stand_ins(self, body: Body) -> dict[str, str]:
        """Return up to two values of this request with the words that were sent instead."""
        found: dict[str, str] = {}
        for before, after in pairs_of(self.known[body["seed"]], body) or () if body["seed"] in self.known else ():
            for was, now in changes(before, after):
                value = next((v.text for v in self.values if v.text in was and v.text not in now), None)
                if value and now and len(found) < 2 and now not in found.values():
                    found.setdefault(value, now)
        return found

    def __enter__(self) -> Endpoint:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def changes(before: str, after: str) -> list[tuple[str, str]]:
    """Return the runs of words that differ."""
    old, new = before.split(" "), after.split(" ")
    codes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if before != after else []
    return [(" ".join(old[a:b]), " ".join(new[c:d])) for tag, a, b, c, d in codes if tag != "equal"]


def _handler(endpoint: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def do_POST(self) -> None:
            """Keep the body, answer it."""
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            body = json.loads(text)
            endpoint.raw.append(text)
            endpoint.bodies[body["seed"]] = body
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": endpoint.answer(body)}}
            usage = {"prompt_tokens": len(text) // 4, "completion_tokens": 20, "total_tokens": len(text) // 4 + 20}
            reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "capture", "choices": [choice], "usage": usage}
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler
