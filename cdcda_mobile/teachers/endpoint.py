"""The ``openai`` client against any OpenAI-compatible endpoint: retries, structured output, and errors that say what to do."""

from __future__ import annotations

import email.utils
import functools
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from cdcda_export.errors import ConfigError, MissingDependency, TeacherError, did_you_mean
from cdcda_mobile.teachers.teacher import Answer, Request

FORMATS = ("json_schema", "json_object", "none")
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 60.0
_RETRIES_OF_UNREACHABLE = 2  # of a host that never answered: probably a wrong address, so the user should not wait long
_RENAMED = {"max_tokens": "max_completion_tokens"}
_OPTIONAL = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed")
_BAD_REQUEST = (400, 422)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def request_body(request: Request, model: str, form: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON body of a request.

    Args:
        request: what is asked.
        model: its name at the endpoint.
        form: of structured output, one of :data:`FORMATS`.
        extra: fields that only this endpoint knows.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": list(request.messages),
        "seed": request.seed,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": request.max_tokens,
        **extra,
    }
    if form == "json_schema":
        described = {"name": "record", "schema": request.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": described}
    elif form == "json_object":
        body["response_format"] = {"type": "json_object", "schema": request.schema}
    return body


class _Refused(Exception):
    """The endpoint understood the request and does not take it: another form of it may do."""

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class OpenAITeacher:
    """A :class:`cdcda_mobile.teachers.teacher.Teacher` behind HTTP; one object serves several threads.

    The key comes from ``OPENAI_API_KEY`` and from nowhere else, unless the caller made it (our own local server). It never
    stands in a message.

    Args:
        base_url: ends in ``/v1`` as a rule.
        model: '' for the first that the endpoint lists.
        timeout_s: of one try.
        retries: after the first try, on 429, 5xx, timeouts and lost connections.
        seed: of the jitter between tries.
        stop: once set, no further try is made.
        sleep: waits, and may return early.
        key: overrides the environment.
        first_format: where the negotiation of structured output starts, one of :data:`FORMATS`.
        extra: fields of the request body that only this endpoint knows.

    Raises:
        ConfigError: ``base_url`` is no http(s) URL.
        MissingDependency: openai is not installed.
        TeacherError: ``model`` is '' and the endpoint lists none.
    """

    def __init__(
        self,
        base_url: str,
        model: str = "",
        timeout_s: float = 120.0,
        retries: int = 5,
        seed: int = 0,
        stop: threading.Event | None = None,
        sleep: Callable[[float], object] | None = None,
        key: str | None = None,
        first_format: str = FORMATS[0],
        extra: dict[str, Any] | None = None,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("The teacher's endpoint must be an http(s) URL such as https://host/v1; see --teacher-base-url.")
        try:
            import openai
        except ImportError:
            raise MissingDependency("openai", "train") from None
        host = parts.hostname + (f":{parts.port}" if parts.port else "")
        self.url = urlunsplit((parts.scheme, host, parts.path, "", ""))  # for messages: without a password
        self._key = os.environ.get("OPENAI_API_KEY", "") if key is None else key
        self._timeout_s, self._retries = timeout_s, retries
        self._stop = stop or threading.Event()
        self._sleep = self._stop.wait if sleep is None else sleep
        self._format, self._extra = first_format, dict(extra or {})
        self._without: tuple[str, ...] = ()
        self._reached = False
        self._jitter = random.Random(seed)
        # A proxy of the environment has no business between us and this very machine; and what is sent goes to the endpoint that was named,
        # not to another that it points to.
        client = openai.DefaultHttpxClient(trust_env=parts.hostname not in _LOOPBACK, follow_redirects=False)
        self._client = openai.OpenAI(base_url=base_url, api_key=self._key or "none", timeout=timeout_s, max_retries=0, http_client=client)
        self.name = model or self._first_model()

    def start(self) -> None:
        """Do nothing: the endpoint runs already."""

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def complete(self, request: Request) -> Answer:
        """Answer one request.

        Raises:
            TeacherError: unreachable, unauthorized, rate-limited, no such model, or no sensible answer.
        """
        refusal = ""
        for form in FORMATS[FORMATS.index(self._format) :]:
            try:
                reply = self._create(self._body(request, form))
            except _Refused as error:
                refusal = str(error)
                continue
            self._format = form  # only an answer proves that the endpoint knows this form
            return self._answer(reply, request)
        raise TeacherError(f"The teacher at {self.url} refuses the request: {refusal}")

    def _body(self, request: Request, form: str) -> dict[str, Any]:
        return request_body(request, self.name, form, self._extra)

    def _create(self, body: dict[str, Any]) -> dict[str, Any]:
        """Post a chat completion, leaving out what newer models do not take."""
        for _ in range(len(_OPTIONAL) + 1):
            sent = {self._spelling(k): v for k, v in body.items() if self._spelling(k) not in self._without}
            try:
                return self._with_retries(functools.partial(self._post, sent))
            except _Refused as error:
                if error.parameter not in sent or error.parameter not in _OPTIONAL:
                    raise
                self._without = (*self._without, error.parameter)
        raise TeacherError(f"The teacher at {self.url} refuses every form of the request.")

    def _post(self, body: dict[str, Any]) -> Any:
        chat = self._client.chat.completions.with_raw_response
        fields = {name: value for name, value in body.items() if name not in ("model", "messages")}
        return chat.create(model=body["model"], messages=body["messages"], extra_body=fields).http_response

    def _spelling(self, name: str) -> str:
        return _RENAMED[name] if name in _RENAMED and name in self._without else name

    def _first_model(self) -> str:
        listed = self._models()
        if not listed:
            raise TeacherError(f"The teacher at {self.url} lists no model; name one with --teacher-model.")
        return listed[0]

    def _models(self) -> list[str]:
        reply = self._with_retries(lambda: self._client.models.with_raw_response.list().http_response)
        data = reply.get("data")
        rows = data if isinstance(data, list) else []
        return [str(row["id"]) for row in rows if isinstance(row, dict) and row.get("id")]

    def _answer(self, reply: dict[str, Any], request: Request) -> Answer:
        try:
            text = reply["choices"][0]["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError("content")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise TeacherError(
                f"The teacher at {self.url} answers JSON that is no chat completion; check --teacher-base-url (it usually ends in /v1)."
            ) from None
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # no file takes half of a character, and some send it
        usage = reply.get("usage")
        counted = usage if isinstance(usage, dict) else {}
        asked = sum(len(message["content"]) for message in request.messages)
        # Where the endpoint does not count, four characters a token keep the budget honest.
        return Answer(text, _count(counted.get("prompt_tokens"), asked // 4), _count(counted.get("completion_tokens"), len(text) // 4))

    # Retries.

    def _with_retries(self, call: Callable[[], Any]) -> dict[str, Any]:
        import openai

        for attempt in range(self._retries + 1):
            try:
                reply = call()
                self._reached = True
                return self._decoded(reply)
            except openai.APIStatusError as error:
                self._reached = True
                wait, failure = self._judge_status(error)
            except openai.APIConnectionError as error:
                wait, failure = None, self._connection_failure(error)
                if not self._reached and attempt >= _RETRIES_OF_UNREACHABLE:
                    raise failure from None
            # Who asks for more patience than that is better asked by a later run.
            if attempt == self._retries or self._stop.is_set() or (wait or 0.0) > 2 * _LONGEST_WAIT_S:
                raise failure from None
            self._sleep(self._backoff(attempt) if wait is None else wait)
        raise AssertionError("unreachable: the loop returns or raises")

    def _backoff(self, attempt: int) -> float:
        return float(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt) * (0.5 + self._jitter.random()))

    def _connection_failure(self, error: Exception) -> TeacherError:
        import openai

        if isinstance(error, openai.APITimeoutError):
            return TeacherError(
                f"The teacher at {self.url} did not answer within {self._timeout_s:g} s; try again later, or raise timeout_s under "
                "[teacher] in a recipe. Answers that arrived are kept."
            )
        return TeacherError(
            f"The teacher at {self.url} cannot be reached; check --teacher-base-url (or OPENAI_BASE_URL) and that it is running."
        )

    def _judge_status(self, error: Any) -> tuple[float | None, TeacherError]:
        """Return how long to wait and what to raise after the last try; raise where another try is of no use."""
        status, said = error.status_code, _said(error)
        if status in (401, 403):
            key = "the key in OPENAI_API_KEY" if self._key else "requests without a key; set OPENAI_API_KEY"
            raise TeacherError(f"The teacher at {self.url} does not accept {key} (HTTP {status}).") from None
        if status == 404:
            raise self._not_found() from None
        if status < 400:
            where = self._clean(error.response.headers.get("location", "nowhere").partition("?")[0])
            raise TeacherError(
                f"The teacher at {self.url} redirects to {where} (HTTP {status}), and records go to no address that you did not name; "
                "see --teacher-base-url."
            ) from None
        if status == 429:
            if said.get("code") == "insufficient_quota":
                raise TeacherError(f"The account at {self.url} has no quota left; top it up or name another endpoint.") from None
            return _retry_after(error.response.headers), TeacherError(
                f"The teacher at {self.url} limits the rate of requests, also after {self._retries} retries; run the same command again "
                "later: answers that arrived are kept and not paid again."
            )
        if status in (408, 409) or status >= 500:
            failing = f"The teacher at {self.url} keeps failing (HTTP {status}); try again later, or name another --teacher-base-url."
            return _retry_after(error.response.headers), TeacherError(failing)
        if status in _BAD_REQUEST:
            raise _Refused(self._clean(said.get("message") or f"HTTP {status}"), str(said.get("param") or "")) from None
        raise TeacherError(f"The teacher at {self.url} answers HTTP {status}: {self._clean(said.get('message') or 'no reason')}.") from None

    def _not_found(self) -> TeacherError:
        name = getattr(self, "name", "")
        wrong_path = f"There is no OpenAI-compatible endpoint at {self.url}; check --teacher-base-url (it usually ends in /v1)."
        if not name:
            return TeacherError(wrong_path)
        try:
            listed = self._client.models.with_raw_response.list().http_response
            names = [str(row["id"]) for row in json.loads(listed.text)["data"]]
        except (ValueError, KeyError, TypeError, OSError, _api_error()):
            return TeacherError(
                f"The teacher at {self.url} knows no model '{name}' (HTTP 404); check --teacher-model and --teacher-base-url."
            )
        if name in names:
            return TeacherError(wrong_path)
        return TeacherError(f"The teacher at {self.url} has no model '{name}'; see --teacher-model.{did_you_mean(name, names[:50])}")

    def _decoded(self, response: Any) -> dict[str, Any]:
        try:
            value = json.loads(response.text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            kind = "a web page" if response.text.lstrip()[:1] == "<" else "something else than JSON"
            raise TeacherError(
                f"{self.url} answers with {kind}, so it is no OpenAI-compatible endpoint; "
                "check --teacher-base-url (it usually ends in /v1)."
            )
        return value

    def _clean(self, text: object) -> str:
        """Return somebody else's words in one short line, without our key."""
        line = " ".join(str(text).split())
        return (line.replace(self._key, "***") if self._key else line)[:200].rstrip(".")


def _api_error() -> type[Exception]:
    import openai

    return openai.APIError


def _said(error: Any) -> dict[str, Any]:
    """Return the ``error`` object of an OpenAI-style reply, or what can be made of another one."""
    body = error.body
    if isinstance(body, dict):
        inner = body.get("error", body)
        if isinstance(inner, dict):
            return {"message": inner.get("message") or inner.get("detail"), "param": inner.get("param"), "code": inner.get("code")}
        return {"message": inner}
    return {}


def _count(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and value >= 0 else otherwise


def _retry_after(headers: Any) -> float | None:
    """Return the seconds of a Retry-After header, which is a number or a date."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:  # neither
        return None
