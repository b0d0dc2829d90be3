"""The cells of an experiment as tables: one arm over users, arms against each other user by user."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from cdcda_export.errors import DataError, FileError
from cdcda_export.manifest import sha256_json
from cdcda_mobile.evaluation.statistics import Difference, Estimate, compare, estimate, holm
from cdcda_mobile.history import Record

NLL = "NLL"
LOWER_IS_BETTER = frozenset({NLL, "MAE", "RMSE"})


class Arm(NamedTuple):
    """A way to make a model, and the precision its artifact was measured in (``f32``, ``q4_0``)."""

    name: str
    precision: str

    def __str__(self) -> str:
        return f"{self.name} ({self.precision})"


@dataclass(frozen=True)
class Cell:
    """One measurement: numbers and hashes, no text.

    Attributes:
        task: of the records.
        user: whose; a pseudonym where results are published.
        arm: how the model was made.
        seed: of its training.
        precision: of the artifact.
        nll: summed over all answer tokens, in nats; None for a rule, which gives no probabilities.
        tokens: how many answer tokens.
        metrics: name -> value over the user's test records.
        n: how many test records.
        test_sha256: :func:`hash_of` the test records.
    """

    task: str
    user: str
    arm: str
    seed: int
    precision: str
    nll: float | None
    tokens: int
    metrics: dict[str, float]
    n: int
    test_sha256: str

    @property
    def place(self) -> Arm:
        """The column this cell belongs to."""
        return Arm(self.arm, self.precision)

    def value(self, metric: str) -> float | None:
        """Return a metric's value, ``NLL`` per token in nats, or None where the cell does not have it."""
        if metric == NLL:
            return None if self.nll is None else self.nll / self.tokens
        return self.metrics.get(metric)


@dataclass(frozen=True)
class ArmRow:
    """One arm on one task: the mean over users with its interval."""

    task: str
    arm: Arm
    metric: str
    estimate: Estimate


@dataclass(frozen=True)
class Comparison:
    """Two arms on one task: ``a`` minus ``b`` over the same users."""

    task: str
    a: Arm
    b: Arm
    metric: str
    difference: Difference


def hash_of(records: Iterable[Record]) -> str:
    """Return the SHA-256 of records, what says that two cells were measured on the same ones."""
    return sha256_json([asdict(record) for record in records])


def cells_of(rows: Sequence[Any]) -> list[Cell]:
    """Return the cells that were written to JSON as ``asdict`` gives them.

    Raises:
        FileError: a row is no cell.
    """
    names = {field.name for field in fields(Cell)}
    for row in rows:
        if not isinstance(row, dict) or row.keys() != names:
            raise FileError(f"A row of the results is no cell: it must have exactly {', '.join(sorted(names))}.")
    return [Cell(**row) for row in rows]


_Values = dict[str, list[float]]


def _values(cells: Iterable[Cell], task: str, arm: Arm, metric: str) -> _Values:
    """Return user -> one value per seed."""
    found: _Values = {}
    for cell in cells:
        value = cell.value(metric)
        if (cell.task, cell.place) == (task, arm) and value is not None:
            found.setdefault(cell.user, []).append(value)
    return found


def _check(cells: Sequence[Cell]) -> None:
    """Hold every user of a task to one set of test records, and every cell to one measurement."""
    tests: dict[tuple[str, str], str] = {}
    seen: set[tuple[Any, ...]] = set()
    for cell in cells:
        if tests.setdefault((cell.task, cell.user), cell.test_sha256) != cell.test_sha256:
            raise DataError(f"User {cell.user} was measured on different {cell.task} records in different cells; measure them again.")
        key = (cell.task, cell.user, cell.place, cell.seed)
        if key in seen:
            raise DataError(f"User {cell.user} was measured twice in {cell.place} with seed {cell.seed} on {cell.task}; keep one cell.")
        seen.add(key)


def _distinct(cells: Sequence[Cell], part: Callable[[Cell], Any]) -> list[Any]:
    return list(dict.fromkeys(map(part, cells)))


def arm_rows(cells: Sequence[Cell], metrics: Sequence[str], seed: int = 0) -> list[ArmRow]:
    """Return every arm on every task that has the metric, in the order of the cells.

    Raises:
        DataError: a cell stands twice, or a user was measured on different records.
    """
    _check(cells)
    rows = []
    for task in _distinct(cells, lambda cell: cell.task):
        for metric in metrics:
            for arm in _distinct(cells, lambda cell: cell.place):
                values = _values(cells, task, arm, metric)
                if values:
                    rows.append(ArmRow(task, arm, metric, estimate(values, seed)))
    return rows


def compare_arms(cells: Sequence[Cell], pairs: Sequence[tuple[Arm, Arm]], metrics: Sequence[str], seed: int = 0) -> list[Comparison]:
    """Compare arms user by user; all comparisons of one call are one family, for which Holm corrects the p-values.

    Args:
        cells: of the experiment.
        pairs: (A, B), read as A minus B; a task or a metric that one of them lacks for everybody (a rule has no likelihood) is passed over.
        metrics: what is compared.
        seed: of bootstrap and sign patterns.

    Raises:
        DataError: a cell stands twice, a user was measured on different records, or in one arm only.
    """
    _check(cells)
    found = []
    for task in _distinct(cells, lambda cell: cell.task):
        for metric in metrics:
            for a, b in pairs:
                one, other = _values(cells, task, a, metric), _values(cells, task, b, metric)
                if one and other:
                    found.append(Comparison(task, a, b, metric, compare(one, other, seed)))
    corrected = holm([comparison.difference.p for comparison in found])
    return [replace(c, difference=replace(c.difference, p_holm=p)) for c, p in zip(found, corrected, strict=True)]


def _number(value: float | None, digits: int = 3, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.{digits}f}"


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    return "–" if low is None else f"{_number(low, sign=sign)} to {_number(high, sign=sign)}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def arms_markdown(rows: Sequence[ArmRow]) -> str:
    """Return the table of arms."""
    header = ["task", "arm", "precision", "metric", "mean", "95 % interval", "users"]
    cells = (
        [r.task, *r.arm, r.metric, _number(r.estimate.mean), _interval(r.estimate.low, r.estimate.high), str(r.estimate.n)] for r in rows
    )
    return _table(header, cells)


def comparisons_markdown(comparisons: Sequence[Comparison]) -> str:
    """Return the table of comparisons; differences keep their sign, and an arrow says which way is better."""
    rows = []
    for c in comparisons:
        d = c.difference
        metric = f"{c.metric} {'↓' if c.metric in LOWER_IS_BETTER else '↑'}"
        interval = _interval(d.low, d.high, "+")
        p = [_number(d.p, 4), _number(d.p_holm, 4), _number(d.effect, 2, "+")]
        rows.append([c.task, f"{c.a} − {c.b}", metric, _number(d.mean, sign="+"), interval, *p, str(d.n)])
    return _table(["task", "arms", "metric", "difference", "95 % interval", "p", "p (Holm)", "effect", "users"], rows)


def overview(cells: Sequence[Cell]) -> str:
    """Return what fits a terminal: for each task one line an arm, the means of NLL and the main metric in every precision."""
    lines = []
    for task in _distinct(cells, lambda cell: cell.task):
        mine = [cell for cell in cells if cell.task == task]
        kinds = [
            kind for kind in _distinct(mine, lambda cell: cell.precision) if any(c.nll is not None for c in mine if c.precision == kind)
        ]
        columns = [(metric, kind) for metric in (NLL, next(iter(mine[0].metrics))) for kind in kinds]
        users = len(_distinct(mine, lambda cell: cell.user))
        records = sum(c.n for c in mine if (c.place, c.seed) == (mine[0].place, mine[0].seed))
        lines += ["", f"{task}: {records} held-out records of {users} {'user' if users == 1 else 'users'}"]
        lines.append(f"  {'':<18}" + "".join(f"{f'{metric} {kind}':>16}" for metric, kind in columns))
        for arm in _distinct(mine, lambda cell: cell.arm):
            shown = (_mean_of(mine, arm, metric, kind) for metric, kind in columns)
            lines.append(f"  {arm:<18}" + "".join(f"{_number(value):>16}" for value in shown))
    return "\n".join(lines[1:])


def _mean_of(cells: Sequence[Cell], arm: str, metric: str, kind: str) -> float | None:
    # A rule has one answer, whatever the precision of the others.
    values = _values(cells, cells[0].task, Arm(arm, kind), metric) or _values(cells, cells[0].task, Arm(arm, "none"), metric)
    return estimate(values).mean if values else None


def as_json(cells: Sequence[Cell], rows: Sequence[ArmRow], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return everything for a results file: metrics and hashes, never a text."""
    return {
        "cells": [asdict(cell) for cell in cells],
        "arms": [{**asdict(row), "arm": row.arm._asdict()} for row in rows],
        "comparisons": [{**asdict(c), "a": c.a._asdict(), "b": c.b._asdict()} for c in comparisons],
    }
