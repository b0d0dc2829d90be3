"""Threads for requests under way. Daemons, unlike those of concurrent.futures: Ctrl-C must not wait for a slow endpoint."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from cdcda_mobile.teachers.teacher import Answer


class Pool:
    """Threads that answer by number; only the thread that made the pool may call it.

    Args:
        size: threads at most.
        work: called with a number in one of them; what it raises is an outcome too.
    """

    def __init__(self, size: int, work: Callable[[int], Answer]) -> None:
        self._work, self._size = work, size
        self._todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[int, Answer | Exception]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.busy = 0

    def submit(self, k: int) -> None:
        """Let a thread work on k."""
        if len(self._threads) < self._size:
            thread = threading.Thread(target=self._serve, name=f"teacher-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self.busy += 1
        self._todo.put(k)

    def next(self, timeout: float | None = None) -> tuple[int, Answer | Exception]:
        """Return the next outcome, in the order of arrival.

        Raises:
            queue.Empty: none came in time.
        """
        item = self._done.get(timeout=timeout)
        self.busy -= 1
        return item

    def cancel(self) -> None:
        """Forget what no thread has begun, and let the threads end."""
        while True:
            try:
                self._todo.get_nowait()
            except queue.Empty:
                break
            self.busy -= 1
        for _ in self._threads:
            self._todo.put(None)

    def _serve(self) -> None:
        while (k := self._todo.get()) is not None:
            try:
                outcome: Answer | Exception = self._work(k)
            except Exception as error:  # noqa: BLE001 - raised again where it is received
                outcome = error
            self._done.put((k, outcome))
