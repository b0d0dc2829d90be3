"""An OpenAI-compatible endpoint in a thread, with manners good and bad, that remembers every request."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Headers = dict[str, str]


@dataclass(frozen=True)
class Reply:
    """What the endpoint sends; ``delay_s`` before it does."""

    status: int = 200
    body: str = ""
    headers: Headers = field(default_factory=dict)
    delay_s: float = 0.0


def chat(text: str, prompt_tokens: int = 100, completion_tokens: int = 20) -> Reply:
    """A proper chat completion."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens}
    message = {"role": "assistant", "content": text}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "fake", "usage": usage}
    return Reply(body=json.dumps(body | {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}))


def failure(status: int, message: str = "no", headers: Headers | None = None, **more: str) -> Reply:
    """An OpenAI-style error."""
    return Reply(status, json.dumps({"error": {"message": message, "type": "error", **more}}), headers or {})


def invent(body: dict[str, Any]) -> Reply:
    """Answer any request of ours with a valid record whose words depend on the request alone."""
    state = hashlib.sha256(json.dumps([body["messages"], body["seed"]]).encode()).hexdigest()
    wanted = body["response_format"]
    properties = wanted.get("json_schema", wanted)["schema"]["properties"]
    letters = str.maketrans("0123456789abcdef", "bdfgklmnprstaeio")
    pieces = [state[i : i + 5].translate(letters) for i in range(0, 60, 5)]
    texts = {"input": " ".join(pieces), "plain": " ".join(pieces[3:7])}
    made: dict[str, Any] = {name: texts.get(name, " ".join(reversed(pieces[:4]))) for name in properties}
    for name, kind in properties.items():
        if kind["type"] == "array":
            made[name] = pieces[:2]
        elif "enum" in kind:
            made[name] = kind["enum"][int(state[:4], 16) % len(kind["enum"])]
    return chat(json.dumps(made))


class FakeEndpoint:
    """Serves on loopback; ``script`` replies come first, then ``answer`` replies to every chat completion."""

    def __init__(self, answer: Callable[[dict[str, Any]], Reply] = invent, models: Reply | None = None) -> None:
        self.answer, self.script = answer, list[Reply]()
        self.models = models or Reply(body=json.dumps({"object": "list", "data": [{"id": "fake-1", "object": "model"}]}))
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str] = []
        self.running = self.most_running = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def reply_to(self, body: dict[str, Any], authorization: str) -> Reply:
        with self._lock:
            self.requests.append(body)
            self.authorizations.append(authorization)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            scripted = self.script.pop(0) if self.script else None
        reply = scripted or self.answer(body)
        time.sleep(reply.delay_s)
        with self._lock:
            self.running -= 1
        return reply

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def send(self, reply: Reply) -> None:
                data = reply.body.encode()
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.send(endpoint.models if self.path == "/v1/models" else Reply(404, "<html>not here</html>"))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                found = self.path == "/v1/chat/completions"
                try:
                    self.send(endpoint.reply_to(body, self.headers["Authorization"] or "") if found else failure(404))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client gave up waiting

        return Handler

    def __enter__(self) -> FakeEndpoint:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Reply] = invent, *script: Reply) -> Iterator[FakeEndpoint]:
    """A running endpoint."""
    with FakeEndpoint(answer) as endpoint:
        endpoint.script.extend(script)
        yield endpoint
