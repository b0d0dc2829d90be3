"""The app's own Java client, driven from Python: commands go in as JSON lines, what happens comes back the same way."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

_WAIT_S = 240.0


class Talk:
    """A running client.

    Args:
        process: of the JVM.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._said: Queue[dict[str, Any]] = Queue()
        Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self._said.put(json.loads(line))

    def do(self, what: str, **more: object) -> None:
        """Give a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self.process.stdin.flush()

    def until(self, key: str, value: object = None) -> dict[str, Any]:
        """Wait for a line that has a key (with a value), and return it."""
        while True:
            line = self._said.get(timeout=_WAIT_S)
            if key in line and value in (None, line[key]):
                return line

    def answer(self, text: str, tokens: int, personal: float = 1.0) -> tuple[str, str]:
        """Ask, and return the whole answer and how it ended."""
        self.do("ask", text=text, tokens=tokens, personal=personal)
        found = ""
        while True:
            line = self._said.get(timeout=_WAIT_S)
            if "piece" in line:
                found += line["piece"]
            elif "end" in line:
                return found, line["end"]


@contextmanager
def talking(classpath: str, folder: Path, program: Sequence[str | Path], context: int = 512) -> Iterator[Talk]:
    """Start the client on a folder of models with an engine, and end it afterwards."""
    command = ["java", "-cp", classpath, "org.cdcda.app.Talk", str(folder), str(context), *map(str, program)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Talk(process)
        finally:
            process.kill()
