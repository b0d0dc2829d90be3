"""How busy augmentation keeps the local teacher: its tokens per second against the same server's with every slot always taken.

Both sides put the same requests (of a sample user) to a fresh llama-server with the same slots. Ours is ``augment`` itself: it asks ahead,
judges, writes the answer log, and stops in the middle of what it has asked for; its tokens are those of answers that arrived between its
first request and its last judgement. The other side is a plain load generator, one connection for each slot and no work in between; its
tokens are those that arrived while every slot was taken. ``native_speedup`` compares that with llama-cpp-python's own server, which answers
one request at a time, on the first of the same requests. ``--sweep`` tries other numbers of slots.

    python benchmarks/teacher_throughput.py [--quick] [--model FILE] [--slots N] [--keep N] [--pairs N] [--sweep N ...]
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cdcda_export.base import default_base
from cdcda_export.errors import TeacherError
from cdcda_export.progress import Silent
from cdcda_mobile.augmentation.augment import augment
from cdcda_mobile.config import AugmentConfig, HistoryConfig, TeacherConfig
from cdcda_mobile.history import Record, read_history, split_by_time
from cdcda_mobile.teachers.local_teacher import LocalServer, LocalTeacher, local_server
from cdcda_mobile.teachers.native_server import BUILD_COMMAND, native_server
from cdcda_mobile.teachers.teacher import LOCAL_SAMPLING, NATIVE_SAMPLING, Answer, Request, slots_of
from laboratory import print_table, write_results

USER = "42"
SEED = 0
PYTHON_CONCURRENCY = 2  # what the pipeline uses there
Arrival = tuple[float, int]  # seconds, completion tokens


class Stopwatch(Silent):
    """Knows when the last answer was judged."""

    def __init__(self) -> None:
        super().__init__()
        self.judged, self.count = 0.0, 0

    def advance(self, n: int = 1, note: str = "") -> None:
        """Note the time; the first call, without a note, only opens the bar."""
        if note:
            self.judged, self.count = time.monotonic(), self.count + 1


class Watched:
    """A teacher of whom every question and answer is timed."""

    def __init__(self, teacher: LocalTeacher) -> None:
        self.name, self._teacher = teacher.name, teacher
        self.asked: list[tuple[float, Request]] = []
        self.arrivals: list[Arrival] = []

    def start(self) -> None:
        """Do nothing: the teacher runs already."""

    def complete(self, request: Request) -> Answer:
        """Pass the question on."""
        self.asked.append((time.monotonic(), request))
        answer = self._teacher.complete(request)
        self.arrivals.append((time.monotonic(), answer.completion_tokens))
        return answer


class Bench:
    """One model, one user, one server program."""

    def __init__(self, model: Path, server: Path, keep: int, most: int) -> None:
        self.model, self.server, self.config, self.most = model, server, AugmentConfig(keep=keep), most
        history = HistoryConfig()
        split = split_by_time(read_history(USER, history), history)
        self.train: tuple[Record, ...] = tuple(split.train)
        self.held_out: tuple[Record, ...] = (*split.validation, *split.test)
        self.requests: list[Request] = []  # those of the last ``pipeline``

    def pipeline(self, slots: int) -> dict[str, Any]:
        """Measure ``augment``, and keep its requests."""
        local = LocalTeacher(self.model, "bench", 600, Silent(), threading.Event(), self.server, slots)
        watch = Stopwatch()
        with tempfile.TemporaryDirectory() as folder:
            try:
                local.start()
                watched = Watched(local)
                teacher, place = TeacherConfig(concurrency=slots, max_requests=self.most), Path(folder)
                augment(
                    self.train, self.held_out, USER, self.config, teacher, self.model, SEED, place / "stage", place / "answers.jsonl",
                    watch, watched,
                )  # fmt: skip
            except TeacherError:
                if watch.count < self.most:  # else a small model wrote nothing that could be kept, which is not what is measured
                    raise
            finally:
                local.close()
        self.requests = [request for _, request in watched.asked]
        seconds = watch.judged - watched.asked[0][0]
        tokens = sum(count for moment, count in watched.arrivals if moment <= watch.judged)
        needless = len(watched.asked) - watch.count
        return {"tokens_per_s": tokens / seconds, "tokens": tokens, "seconds": seconds, "judged": watch.count, "needless": needless}

    def saturated(self, slots: int) -> dict[str, Any]:
        """Measure llama.cpp's server with every slot taken."""
        with local_server(self.model, "bench", native=self.server, slots=slots) as server:
            arrivals = load(server, self.requests, slots, "json_schema", NATIVE_SAMPLING)
        busy = arrivals[slots - 1 : len(arrivals) - slots + 1]  # with the last of these nothing is left to ask
        tokens, seconds = sum(count for _, count in busy[1:]), busy[-1][0] - busy[0][0]
        return {"slots": slots, "tokens_per_s": tokens / seconds, "tokens": tokens, "seconds": seconds}

    def python_server(self, answers: int) -> dict[str, Any]:
        """Measure llama-cpp-python's server."""
        with local_server(self.model, "bench") as server:
            began = time.monotonic()
            arrivals = load(server, self.requests[:answers], PYTHON_CONCURRENCY, "json_object", LOCAL_SAMPLING)
        tokens, seconds = sum(count for _, count in arrivals), arrivals[-1][0] - began
        return {"tokens_per_s": tokens / seconds, "tokens": tokens, "seconds": seconds}


def load(server: LocalServer, requests: Sequence[Request], connections: int, form: str, sampling: dict[str, Any]) -> list[Arrival]:
    """Put requests to a server over some connections at once, each as soon as the one before is answered; return the arrivals in order."""
    lock, waiting, arrivals, failures = threading.Lock(), iter(requests), list[Arrival](), list[Exception]()

    def work() -> None:
        connection = http.client.HTTPConnection(urlsplit(server.base_url).netloc)
        try:
            while True:
                with lock:
                    request = next(waiting, None)
                if request is None or failures:
                    return
                tokens = post(connection, server.key, request, form, sampling)
                with lock:
                    arrivals.append((time.monotonic(), tokens))
        except (OSError, http.client.HTTPException, KeyError, ValueError) as error:
            failures.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return arrivals


def post(connection: http.client.HTTPConnection, key: str, request: Request, form: str, sampling: dict[str, Any]) -> int:
    """Put one request and return the tokens of its answer."""
    schema = {"schema": request.schema} if form == "json_object" else {"json_schema": {"name": "record", "schema": request.schema}}
    body = {
        "messages": list(request.messages),
        "seed": request.seed,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": request.max_tokens,
        "response_format": {"type": form, **schema},
        **sampling,
    }
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    return int(json.loads(connection.getresponse().read())["usage"]["completion_tokens"])


def median(samples: Sequence[dict[str, Any]]) -> float:
    """Return the median tokens per second."""
    return statistics.median(sample["tokens_per_s"] for sample in samples)


def main() -> None:
    """Measure in pairs, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair, few answers")
    parser.add_argument("--model", type=Path, default=None, metavar="FILE", help="GGUF of the teacher (default: the base model)")
    parser.add_argument("--slots", type=int, default=0, metavar="N", help="default: what the pipeline takes")
    parser.add_argument("--keep", type=int, default=0, metavar="N", help="records to keep (default: 96, quick: 12)")
    parser.add_argument("--pairs", type=int, default=3, metavar="N")
    parser.add_argument("--sweep", type=int, nargs="+", default=[], metavar="N", help="also measure the server with these numbers of slots")
    arguments = parser.parse_args()
    server = native_server()
    if server is None:
        parser.exit(1, f"There is no llama-server here; run `{BUILD_COMMAND}`.\n")
    slots, pairs = arguments.slots or slots_of(TeacherConfig()), 1 if arguments.quick else arguments.pairs
    keep, most = (12, 16) if arguments.quick else (96, 200)
    bench = Bench(arguments.model or default_base(), server, arguments.keep or keep, most)
    load_before = os.getloadavg()[0]
    ours, saturated, python = [], [], []
    for _ in range(pairs):
        ours.append(bench.pipeline(slots))
        saturated.append(bench.saturated(slots))
        python.append(bench.python_server(min(16, bench.config.keep // 3)))
    sweep = [bench.saturated(number) for number in arguments.sweep]
    rows = [("augment", ours), ("saturated", saturated), ("llama-cpp-python's server", python)]
    print_table(["", "median tokens/s"], [[n, median(s)] for n, s in rows] + [[f"{n['slots']} slots", n["tokens_per_s"]] for n in sweep])
    figures = {
        "teacher_concurrency_share": statistics.median(o["tokens_per_s"] / s["tokens_per_s"] for o, s in zip(ours, saturated, strict=True)),
        "native_speedup": statistics.median(s["tokens_per_s"] / p["tokens_per_s"] for s, p in zip(saturated, python, strict=True)),
        "teacher_tokens_per_s": median(ours),
        "needless_requests": max(sample["needless"] for sample in ours),
    }
    raw = {"model": bench.model.name, "slots": slots, "keep": bench.config.keep, "load_before": load_before, "sweep": sweep}
    write_results("teacher_throughput", figures, raw | {"augment": ours, "saturated": saturated, "python_server": python})


if __name__ == "__main__":
    main()
