"""What a training computes and where its time goes: steps, floating-point operations, exclusive times, the limit of the products.

For ``train_speed.py``. Nothing in the package knows of it: functions are wrapped from the outside, by name, and a name that is gone is
reported instead of counted.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cdcda_export.decoder import Decoder
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.training import packed, packed_pass, packing
from cdcda_mobile.training import schedule as schedules
from cdcda_mobile.training.attention import Attention
from cdcda_mobile.training.learner import Learner
from cdcda_mobile.training.lora import Layout
from cdcda_mobile.training.packed_pass import PackedPass
from cdcda_mobile.training.packing import Pack, Row
from cdcda_mobile.training.schedule import Order

_EVALUATION = "evaluation"
# Owner, function, what the time is called that is spent in it and not in another of the list.
_PARTS: tuple[tuple[Any, str, str], ...] = (
    (PackedPass, "losses", _EVALUATION),
    (PackedPass, "backward", "elementwise"),
    (PackedPass, "_affine", "adapter products"),
    (PackedPass, "_affine_backward", "adapter products"),
    (PackedPass, "_adapter_backward", "adapter products"),
    (Attention, "forward", "attention"),
    (Attention, "backward", "attention"),
    (PackedPass, "_rotate", "attention"),
    (PackedPass, "_rotate_backward", "attention"),
    (PackedPass, "_cross_entropy", "loss without its products"),
    (packed, "pack", "packing"),
    (packed, "split", "packing"),
    (packing.Pack, "mask", "packing"),
    (Learner, "batch", "packing"),
    (packed.PackedEngine, "gradients", "engine"),
    (Learner, "update", "optimizer"),
    (Learner, "judge", "optimizer"),
    (Learner, "save", "checkpoints"),
)
_ROWS_OF_A_PRODUCT, _ROWS_OF_LOGITS = (64, 128, 256, 512, 1024), 256


@dataclass(frozen=True)
class Schedule:
    """What our trainer does for one order if nothing stops it early.

    Attributes:
        rows: of every step, in order.
        rates: learning rate of every step.
        initial: the adapter's first parameters.
        evaluate_every: steps between two evaluations.
        validation: the rows that are asked.
    """

    rows: list[list[Row]]
    rates: list[float]
    initial: torch.Tensor
    evaluate_every: int
    validation: list[Row]


def schedule_of(order: Order, config: TrainConfig, layout: Layout) -> Schedule:
    """Return the steps of an order."""
    ours = schedules.Schedule(order, config)
    steps = range(ours.total_steps)
    rows, rates = [ours.batch(step) for step in steps], [ours.learning_rate(step) for step in steps]
    return Schedule(rows, rates, layout.initial(order.seed), ours.evaluate_every, [schedules.row_of(probe) for probe in order.validation])


class Counter:
    """Counts the tokens and operations of every pass from now on.

    Args:
        decoder: the frozen base.
        config: rank, targets.
    """

    def __init__(self, decoder: Decoder, config: TrainConfig) -> None:
        self.decoder, self.config = decoder, config
        self.layout = Layout(decoder, config.targets, config.rank, config.alpha)
        self.passes: list[tuple[bool, int, int, int]] = []
        for name, trains in (("backward", True), ("losses", False)):
            original = getattr(PackedPass, name)
            setattr(PackedPass, name, self._noting(original, trains))

    def _noting(self, original: Callable[..., Any], trains: bool) -> Callable[..., Any]:
        @functools.wraps(original)
        def noting(this: Any, *args: Any, **kwargs: Any) -> Any:
            self.passes.append((trains, *_sizes(this.pack)))
            return original(this, *args, **kwargs)

        return noting

    def counts(self, orders: Sequence[Order], metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return tokens and operations: computed, and what rows one by one would take without padding.

        Nothing of the recipe that trains upper layers only: what it computes is not what ``operations`` says.
        """
        if self.config.first_layer:
            return {}
        rows = []
        for order, found in zip(orders, metrics, strict=True):
            schedule = schedule_of(order, self.config, self.layout)
            rows += [(True, *_row_sizes(step)) for step in schedule.rows[: found["steps"]]]
            rows += [(False, *_row_sizes(schedule.validation))] * len(found["curve"])
        return {
            "computed_tokens": sum(tokens for _, tokens, _, _ in self.passes),
            "computed_gflop": sum(self.operations(*one) for one in self.passes) / 1e9,
            "row_tokens": sum(tokens for _, tokens, _, _ in rows),
            "row_gflop": sum(self.operations(*one) for one in rows) / 1e9,
        }

    def operations(self, trains: bool, tokens: int, answers: int, pairs: int) -> float:
        """Return the useful operations of a pass: products only, recomputation and elementwise work not counted.

        Args:
            trains: backward too; weights are frozen, so a base product has one backward product and an adapter's has two.
            tokens: that were computed.
            answers: positions with logits.
            pairs: of a token and one that it may see.
        """
        shape = self.decoder.shape
        base = sum(weight.numel() for weight in self.decoder.fused.values())
        lowest = self.decoder.fused[0, "qkv"].numel()  # nobody below wants a gradient
        linear = 2.0 * tokens * (2 * base - lowest if trains else base)
        adapters = 2.0 * tokens * self.layout.size * (3 if trains else 1)
        head = 2.0 * answers * self.decoder.weights["lm_head.weight"].numel() * (2 if trains else 1)
        attention = 4.0 * pairs * shape.heads * shape.head_dim * shape.layers * (3 if trains else 1)
        return linear + adapters + head + attention


def _sizes(pack: Pack) -> tuple[int, int, int]:
    pairs = 0
    for segment in pack.segments:
        own = segment.stop - segment.start
        pairs += own * sum(stop - start for start, stop in segment.before) + own * (own + 1) // 2
    return len(pack.ids), len(pack.targets), pairs


def _row_sizes(rows: Sequence[Row]) -> tuple[int, int, int]:
    lengths = [len(row.ids) for row in rows]
    return sum(lengths), sum(len(row.targets) for row in rows), sum(n * (n + 1) // 2 for n in lengths)


class ExclusiveClock:
    """Measures, thread by thread, how long each part of a training takes without the parts that it calls."""

    def __init__(self, decoder: Decoder) -> None:
        self.frozen = {weight.data_ptr() for weight in decoder.fused.values()}
        self.head = decoder.weights["lm_head.weight"].data_ptr()
        self.local = threading.local()
        self.lock = threading.Lock()
        self.found: dict[str, float] = defaultdict(float)
        self.missing: list[str] = []
        for owner, name, part in _PARTS:
            self._wrap(owner, name, lambda *_, part=part: part)
        self._wrap(packed_pass, "matmul", self._product)

    def shares(self, thread_seconds: float) -> dict[str, Any]:
        """Return the share of each part in all threads' time; what is left waited, or was in none of the parts."""
        shares = {part: seconds / thread_seconds for part, seconds in sorted(self.found.items(), key=lambda item: -item[1])}
        return {"shares": shares | {"waiting and the rest": 1 - sum(shares.values())}, "missing": self.missing}

    def _product(self, _: torch.Tensor, b: torch.Tensor, *__: Any, **___: Any) -> str:
        at = b.data_ptr()
        return (
            "products of the frozen base" if at in self.frozen else "products of the output head" if at == self.head else "adapter products"
        )

    def _wrap(self, owner: Any, name: str, part_of: Callable[..., str]) -> None:
        original = getattr(owner, name, None)
        if original is None:
            self.missing.append(name)
            return

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            part, local = part_of(*args, **kwargs), self.local
            inner = getattr(local, "inner", None)
            evaluates = part == _EVALUATION or getattr(local, "evaluates", False)
            outside, local.evaluates, local.inner = getattr(local, "evaluates", False), evaluates, 0.0
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                taken = time.perf_counter() - began
                with self.lock:
                    self.found[_EVALUATION if evaluates else part] += taken - local.inner
                local.evaluates, local.inner = outside, None if inner is None else inner + taken

        setattr(owner, name, timed)


def product_limits(decoder: Decoder, quick: bool) -> dict[str, Any]:
    """Return GFLOP/s of the base's products, by two libraries, forward and backward, two single-threaded threads at once.

    Returns:
        ``limit``, the most of all, and ``samples``: library and direction -> rows x outputs x inputs -> GFLOP/s.
    """
    shapes = sorted({tuple(weight.shape) for weight in decoder.fused.values()} | {tuple(decoder.weights["lm_head.weight"].shape)})
    sizes = (64, 512) if quick else _ROWS_OF_A_PRODUCT
    samples: dict[str, dict[str, float]] = defaultdict(dict)
    for rows in sizes:
        for outputs, inputs in shapes:
            if outputs == decoder.vocabulary and rows > _ROWS_OF_LOGITS:
                continue  # logits of more rows than these exist at no time
            for name, make in (("numpy", _numpy_product), ("torch", _torch_product)):
                for direction, (inner, outer) in (("forward", (inputs, outputs)), ("backward", (outputs, inputs))):
                    rate = _rate(functools.partial(make, rows, outer, inner, direction), 0.1 if quick else 0.3)
                    samples[f"{name} {direction}"][f"{rows}x{outputs}x{inputs}"] = 2e-9 * rows * outputs * inputs * rate
    return {"limit": max(max(found.values()) for found in samples.values()), "samples": samples}


def _numpy_product(rows: int, outer: int, inner: int, direction: str) -> Callable[[], Any]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, inner), dtype=np.float32)
    weight = rng.standard_normal((outer, inner) if direction == "forward" else (inner, outer), dtype=np.float32)
    out = np.empty((rows, outer), dtype=np.float32)
    right = weight.T if direction == "forward" else weight
    return lambda: np.matmul(x, right, out=out)


def _torch_product(rows: int, outer: int, inner: int, direction: str) -> Callable[[], Any]:
    x, weight = torch.randn(rows, inner), torch.randn((outer, inner) if direction == "forward" else (inner, outer))
    out = torch.empty(rows, outer)
    right = weight.t() if direction == "forward" else weight
    return lambda: torch.mm(x, right, out=out)


def _rate(make: Callable[[], Callable[[], Any]], seconds: float) -> float:
    """Return the calls per second of two threads together."""
    from threadpoolctl import threadpool_limits

    rates = [0.0, 0.0]
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        torch.set_num_threads(1)
        call, count = make(), 0
        call()
        barrier.wait()
        began = time.perf_counter()
        while time.perf_counter() < began + seconds:
            call()
            count += 1
        rates[index] = count / (time.perf_counter() - began)

    with threadpool_limits(limits=1, user_api="blas"):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return sum(rates)
