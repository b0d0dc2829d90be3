"""The teacher over HTTP: retries, structured output, errors, budgets, the answer log, and the local server."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cdcda_export.base import default_base
from cdcda_export.errors import ConfigError, FileError, TeacherError
from cdcda_export.progress import Silent
from cdcda_mobile.config import TeacherConfig
from cdcda_mobile.teachers.endpoint import OpenAITeacher
from cdcda_mobile.teachers.local_teacher import LocalTeacher, local_server
from cdcda_mobile.teachers.teacher import LOCAL_SAMPLING, Answer, AnswerLog, Budget, Request, endpoint_of, hire
from cdcda_mobile.teachers.teacher_server import stateless_llama
from fake_endpoint import FakeEndpoint, Reply, chat, failure, serving

SECRET = "sk-very-secret-0123456789"
SCHEMA = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"], "additionalProperties": False}


def request(text: str = "Write a word.", seed: int = 1, max_tokens: int = 40) -> Request:
    return Request(({"role": "user", "content": text},), SCHEMA, seed, 0.9, 0.95, max_tokens)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


class Waits(list[float]):
    """A sleep that only notes how long it was asked to."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def teacher_of(endpoint: FakeEndpoint, waits: Waits | None = None, **options: Any) -> OpenAITeacher:
    return OpenAITeacher(endpoint.url, **{"model": "fake-1", "retries": 3, "sleep": waits if waits is not None else Waits(), **options})


def test_a_request_is_sent_whole_and_its_answer_comes_back() -> None:
    with serving(lambda body: chat('{"input": "hello"}', 7, 3)) as endpoint:
        teacher = teacher_of(endpoint, model="")
        assert teacher.name == "fake-1"  # the first that the endpoint lists
        assert teacher.complete(request(seed=5)) == Answer('{"input": "hello"}', 7, 3)
    (sent,) = endpoint.requests
    assert (sent["model"], sent["seed"], sent["max_tokens"], sent["temperature"], sent["top_p"]) == ("fake-1", 5, 40, 0.9, 0.95)
    assert sent["messages"] == [{"role": "user", "content": "Write a word."}]
    assert sent["response_format"]["json_schema"] == {"name": "record", "schema": SCHEMA, "strict": True}
    assert endpoint.authorizations == [f"Bearer {SECRET}"]


def test_no_key_is_sent_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "")
    with serving(lambda body: chat("{}")) as endpoint:
        teacher_of(endpoint).complete(request())
    assert endpoint.authorizations == ["Bearer none"]


def test_the_key_of_a_request_changes_with_all_that_decides_the_answer() -> None:
    keys = {request().key("a"), request().key("b"), request("other").key("a"), request(seed=2).key("a"), request(max_tokens=9).key("a")}
    assert len(keys) == 5
    assert request().key("a") == request().key("a")


@pytest.mark.parametrize(("accepted", "tries"), [("json_schema", 1), ("json_object", 2), ("none", 3)])
def test_structured_output_is_negotiated_once(accepted: str, tries: int) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        form = body.get("response_format", {"type": "none"})["type"]
        return chat('{"input": "x"}') if form == accepted else failure(422 if form == "json_object" else 400, "unknown response_format")

    with serving(answer) as endpoint:
        teacher = teacher_of(endpoint)
        teacher.complete(request())
        assert len(endpoint.requests) == tries
        teacher.complete(request(seed=2))
        assert len(endpoint.requests) == tries + 1
    if accepted == "json_object":
        assert endpoint.requests[-1]["response_format"] == {"type": "json_object", "schema": SCHEMA}


def test_parameters_that_newer_models_refuse_are_left_out() -> None:
    def answer(body: dict[str, Any]) -> Reply:
        for name in ("max_tokens", "temperature"):
            if name in body:
                return failure(400, f"Unsupported parameter: {name}", param=name)
        return chat("{}")

    with serving(answer) as endpoint:
        teacher = teacher_of(endpoint)
        teacher.complete(request())
        teacher.complete(request())
    assert len(endpoint.requests) == 4
    assert endpoint.requests[-1]["max_completion_tokens"] == 40
    assert endpoint.requests[-1]["response_format"]["type"] == "json_schema"


def test_a_request_that_is_refused_in_every_form_says_why() -> None:
    with serving(lambda body: failure(400, f"context too long for {SECRET}")) as endpoint:
        with pytest.raises(TeacherError, match="refuses the request: context too long") as caught:
            teacher_of(endpoint).complete(request())
    assert SECRET not in str(caught.value)


def test_retry_after_is_honoured_and_backoff_grows() -> None:
    waits = Waits()
    script = [failure(429, headers={"Retry-After": "7"}), failure(500), failure(503)]
    with serving(lambda body: chat("{}"), *script) as endpoint:
        teacher_of(endpoint, waits).complete(request())
    assert len(endpoint.requests) == 4
    assert waits[0] == 7.0
    assert 0.5 <= waits[1] <= 1.5 <= 2 * waits[2] and waits[2] <= 3.0


def test_retry_after_may_be_a_date() -> None:
    import email.utils

    waits = Waits()
    script = failure(429, headers={"Retry-After": email.utils.formatdate(time.time() + 20, usegmt=True)})
    with serving(lambda body: chat("{}"), script) as endpoint:
        teacher_of(endpoint, waits).complete(request())
    assert 15 < waits[0] <= 20


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("header", ["86400", "inf", "Fri, 31 Dec 2100 00:00:00 GMT"])
def test_nobody_waits_for_hours(status: int, header: str) -> None:
    waits = Waits()
    with serving(lambda body: chat("{}"), failure(status, headers={"Retry-After": header})) as endpoint:
        with pytest.raises(TeacherError, match="later"):
            teacher_of(endpoint, waits).complete(request())
    assert waits == []


@pytest.mark.parametrize("header", ["soon", "Mon, 31 Feb 99999999 00:00:00"])
def test_a_retry_after_that_says_nothing_is_passed_over(header: str) -> None:
    waits = Waits()
    with serving(lambda body: chat("{}"), failure(503, headers={"Retry-After": header})) as endpoint:
        teacher_of(endpoint, waits).complete(request())
    assert len(waits) == 1 and waits[0] < 1


def test_nothing_is_sent_to_where_an_endpoint_points() -> None:
    with serving() as other, serving(lambda body: Reply(307, headers={"Location": f"{other.url}/chat/completions?x=1"})) as endpoint:
        with pytest.raises(TeacherError, match=f"redirects to {other.url}/chat/completions .HTTP 307.*--teacher-base-url"):
            teacher_of(endpoint).complete(request())
    assert len(endpoint.requests) == 1 and other.requests == []


def test_jitter_follows_the_seed() -> None:
    runs = []
    for seed in (1, 1, 2):
        waits = Waits()
        with serving(lambda body: chat("{}"), failure(500), failure(502)) as endpoint:
            teacher_of(endpoint, waits, seed=seed).complete(request())
        runs.append(list(waits))
    assert runs[0] == runs[1] != runs[2]


HTML = Reply(body="<!DOCTYPE html><html>Welcome</html>", headers={"Content-Type": "text/html"})


@pytest.mark.parametrize(
    ("reply", "says", "tries"),
    [
        (failure(401, f"Incorrect API key provided: {SECRET}"), "does not accept the key in OPENAI_API_KEY", 1),
        (failure(403), "does not accept the key in OPENAI_API_KEY", 1),
        (failure(429), "limits the rate of requests, also after 3 retries", 4),
        (failure(429, headers={"Retry-After": "86400"}), "limits the rate", 1),
        (failure(429, code="insufficient_quota"), "no quota left", 1),
        (failure(500), "keeps failing .HTTP 500.", 4),
        (failure(404), "no model 'fake-2'; see --teacher-model. Did you mean 'fake-1'", 1),
        (failure(418, f"teapot {SECRET}"), "answers HTTP 418: teapot", 1),
        (HTML, "answers with a web page", 1),
        (Reply(body="gibberish"), "something else than JSON", 1),
        (Reply(body='{"hello": 1}'), "is no chat completion", 1),
        (Reply(body='{"choices": []}'), "is no chat completion", 1),
        (Reply(body='{"choices": [{"message": {"content": 3}}]}'), "is no chat completion", 1),
    ],
)
def test_every_failure_is_a_sentence_with_a_fix(reply: Reply, says: str, tries: int) -> None:
    with serving(lambda body: reply) as endpoint:
        with pytest.raises(TeacherError, match=says) as caught:
            teacher_of(endpoint, model="fake-2").complete(request())
    assert len(endpoint.requests) == tries
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_endpoint_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://user:{SECRET}@127.0.0.1:{taken.getsockname()[1]}/v1"
    waits = Waits()
    with pytest.raises(TeacherError, match="cannot be reached; check --teacher-base-url") as caught:
        OpenAITeacher(url, "m", sleep=waits, retries=9).complete(request())
    assert SECRET not in str(caught.value)
    assert len(waits) == 2  # a host that never answered is not waited for at length
    with pytest.raises(ConfigError, match=r"http\(s\) URL"):
        OpenAITeacher("example.org/v1", "m")


def test_a_slow_endpoint_times_out() -> None:
    with serving(lambda body: Reply(body="{}", delay_s=1.0)) as endpoint:
        with pytest.raises(TeacherError, match="did not answer within 0.1 s"):
            teacher_of(endpoint, timeout_s=0.1, retries=1).complete(request())
    assert len(endpoint.requests) == 2


def test_models_that_are_no_list_or_an_empty_one() -> None:
    with FakeEndpoint(models=Reply(body='{"data": []}')) as endpoint, pytest.raises(TeacherError, match="lists no model"):
        teacher_of(endpoint, model="")
    with FakeEndpoint(models=HTML) as endpoint, pytest.raises(TeacherError, match="web page"):
        teacher_of(endpoint, model="")
    with FakeEndpoint(models=failure(401)) as endpoint, pytest.raises(TeacherError, match="does not accept"):
        teacher_of(endpoint, model="")


def test_an_empty_message_is_an_answer_and_tokens_are_estimated_where_not_counted() -> None:
    with serving(lambda body: Reply(body='{"choices": [{"message": {"content": null}}]}')) as endpoint:
        assert teacher_of(endpoint).complete(request("x" * 40)) == Answer("", 10, 0)


def test_who_names_a_gguf_means_it_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere.invalid/v1")
    assert endpoint_of(TeacherConfig()) == "http://elsewhere.invalid/v1" and endpoint_of(TeacherConfig(gguf="teacher.gguf")) == ""
    with pytest.raises(ConfigError, match="two teachers"):
        TeacherConfig(base_url="http://elsewhere.invalid/v1", gguf="teacher.gguf")


def test_a_model_without_an_endpoint_is_not_passed_over() -> None:
    for config in (TeacherConfig(model="large"), TeacherConfig(model="large", gguf="teacher.gguf")):
        with pytest.raises(ConfigError, match="--teacher-model large is a model of an endpoint, and none is named"):
            endpoint_of(config)


@pytest.mark.parametrize("wrong", [{"retries": -1}, {"timeout_s": 0.0}, {"concurrency": 0}, {"max_requests": -1}, {"token_budget": -5}])
def test_settings_that_ask_nobody(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="teacher.timeout_s"):
        TeacherConfig(**wrong)


def test_hire_takes_the_endpoint_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serving() as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        with hire(TeacherConfig(concurrency=7), tmp_path / "none.gguf", 0, Silent(), threading.Event()) as hired:
            assert (hired.teacher.name, hired.concurrency, hired.local, hired.embedded) == ("fake-1", 7, False, False)


def test_budgets_are_shared_by_threads() -> None:
    budget, admitted = Budget(max_requests=50), []
    threads = [threading.Thread(target=lambda: admitted.extend(budget.admit() for _ in range(20))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(admitted) == 50
    assert budget.exhausted() == "--max-requests 50"
    tokens = Budget(token_budget=10)
    assert tokens.admit()
    tokens.spend(10)
    assert not tokens.admit()
    assert tokens.exhausted() == "--token-budget 10"
    assert all(Budget().admit() for _ in range(100))


def test_the_log_survives_a_torn_line_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "user" / "answers.jsonl"
    log = AnswerLog(path)
    log.append("k1", "m", Answer("one\nü", 5, 6), 0.5)
    log.append("k2", "m", Answer("two", 1, 2), 0.5)
    log.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "k3", "text": "to')
    again = AnswerLog(path)
    assert (again.get("k1"), again.get("k2"), again.get("k3")) == (Answer("one\nü", 5, 6), Answer("two", 1, 2), None)
    assert path.read_bytes() == whole
    again.append("k3", "m", Answer("three", 0, 0), 0.1)
    again.close()
    third = AnswerLog(path)
    assert len(third) == 3
    third.close()
    assert set(json.loads(whole.splitlines()[0])) == {"key", "model", "text", "prompt_tokens", "completion_tokens", "seconds"}


def test_the_log_skips_a_damaged_line_and_refuses_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('nonsense\n{"key": "k"}\n[]\n{"key": "k1", "text": "t", "prompt_tokens": 1, "completion_tokens": 1}\n')
    log = AnswerLog(path)
    assert len(log) == 1
    log.close()
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="Cannot open the teacher's answers"):
        AnswerLog(tmp_path / "folder")


# The local server.


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def gone(pid: int, within_s: float = 10.0) -> bool:
    until = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pid)


def test_a_server_that_cannot_start_says_why_and_is_gone(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 50)
    with pytest.raises(TeacherError, match=r"did not start: .*broken\.gguf"), local_server(broken):
        pass
    with pytest.raises(FileError, match="see --teacher-gguf"), local_server(tmp_path / "absent.gguf"):
        pass


def test_a_local_teacher_must_be_started(tmp_path: Path) -> None:
    teacher = LocalTeacher(tmp_path / "m.gguf", "m", 5, Silent(), threading.Event())
    with pytest.raises(TeacherError, match="was not started"):
        teacher.complete(request())
    teacher.close()


@pytest.mark.model
def test_the_local_answer_depends_on_the_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED", "7")  # llama-cpp-python's settings would read it
    wanted = request("Write a sentence about the sea as JSON with the field input.", seed=11)
    same_start = request("Write a sentence about the sea and the sky as JSON with the field input.", seed=3)
    texts = []
    for before in ((), (same_start, request("Count to ten.", seed=4), wanted)):
        with local_server(default_base(), "base") as server:
            teacher = OpenAITeacher(server.base_url, "base", 120, 1, key=server.key, first_format="json_object", extra=LOCAL_SAMPLING)
            for other in before:
                teacher.complete(other)
            texts.append(teacher.complete(wanted).text)
            if before:
                assert teacher.complete(request(wanted.messages[0]["content"], seed=12)).text != texts[0]  # the seed is used
                with pytest.raises(TeacherError, match="does not accept"):
                    OpenAITeacher(server.base_url, "base", key="wrong").complete(wanted)
            teacher.close()
        assert server.process.poll() is not None
    assert texts[0] == texts[1]
    assert texts[0].startswith('{"input": "')


@pytest.mark.model
def test_every_prompt_is_computed_whole_and_leaves_the_same_logits() -> None:
    import llama_cpp
    import numpy as np

    def after(*prompts: str) -> tuple[bytes, bool]:
        evaluated: list[int] = []

        class Counting(stateless_llama()):  # type: ignore[misc]
            def eval(self, tokens: Any) -> None:
                evaluated.append(len(tokens))
                super().eval(tokens)

        model = Counting(str(default_base()), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
        lengths = []
        for prompt in prompts:
            tokens = model.tokenize(prompt.encode())
            lengths.append(len(tokens))
            next(model.generate(tokens, temp=0.0))
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),)).tobytes()
        model.close()
        return logits, evaluated == lengths

    start = "The lighthouse keeper counted the ships that passed " * 4
    wanted = start + "and wrote their names into a book."
    # llama-cpp-python itself would keep what two prompts have in common; whether that changes a bit depends on the processor's kernels.
    assert after(start + "until it was dark.", wanted, wanted) == after(wanted) == (after(wanted)[0], True)


@pytest.mark.model
def test_the_grammar_holds_where_the_model_would_not_write_json() -> None:
    with local_server(default_base(), "base") as server:
        teacher = OpenAITeacher(server.base_url, "base", 120, 1, key=server.key, first_format="json_object", extra=LOCAL_SAMPLING)
        for seed in range(3):
            text = teacher.complete(request("Say good morning.", seed, max_tokens=120)).text
            assert text.startswith("{")
            assert '"input"' in text
        teacher.close()


PARENT = """
import os, sys, time
from pathlib import Path
from cdcda_mobile.teachers.local_teacher import local_server
with local_server(Path(sys.argv[1])) as server:
    print(server.process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.model
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_orphan_is_left_however_the_parent_ends(how: signal.Signals) -> None:
    command = [sys.executable, "-c", PARENT, str(default_base())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.send_signal(how)
        parent.wait(20)
    assert gone(child)


@pytest.mark.model
def test_a_local_teacher_that_dies_says_so() -> None:
    teacher = LocalTeacher(default_base(), "base", 60, Silent(), threading.Event())
    try:
        teacher.start()
        server = teacher._server
        assert server is not None
        server.process.kill()
        server.process.wait()
        with pytest.raises(TeacherError, match="local teacher died: signal 9 and not a word; `cdcda doctor` may know why"):
            teacher.complete(request())
    finally:
        teacher.close()
