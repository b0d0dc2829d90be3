"""Phones that people own: the table ``phones.toml``, in which every fact names the page that it was read on."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Generic, TypeVar

from cdcda_export.errors import ConfigError, did_you_mean

T = TypeVar("T")

UNKNOWN = "unknown"
# Arm's efficiency cores of these generations: a thread on one of them makes all others wait at every layer.
_LITTLE = frozenset({"Cortex-A53", "Cortex-A55", "Cortex-A510", "Cortex-A520"})
SLOW = 0.7  # of the fastest cluster's clock: slower cores of the same type are left alone too
_FEW = 4  # cores used where all are little
_GIB, _GB = 2**30, 10**9


@dataclass(frozen=True)
class Fact(Generic[T]):
    """A value and where it was read; ``value`` is None where no page said it.

    Attributes:
        value: what was read.
        source: a key of ``sources()``, '' where the value is unknown.
        note: how it was computed, or who says otherwise.
    """

    value: T | None = None
    source: str = ""
    note: str = ""

    def __str__(self) -> str:
        return UNKNOWN if self.value is None else str(self.value)


@dataclass(frozen=True)
class Source:
    """A page."""

    title: str
    url: str


@dataclass(frozen=True)
class Cluster:
    """Cores of one kind."""

    core: str
    count: int
    mhz: int


@dataclass(frozen=True)
class Soc:
    """A chip.

    Attributes:
        key: its name in the table.
        name: as its maker calls it.
        clusters: its cores, the biggest first.
        dotprod: whether all cores have FEAT_DotProd.
        i8mm: whether all cores have FEAT_I8MM.
        bandwidth_gb_s: peak of the memory interface, 10^9 bytes a second.
    """

    key: str
    name: Fact[str]
    clusters: Fact[tuple[Cluster, ...]]
    dotprod: Fact[bool]
    i8mm: Fact[bool]
    bandwidth_gb_s: Fact[float]

    @property
    def cores(self) -> int:
        """How many cores there are."""
        return sum(cluster.count for cluster in self.clusters.value or ())

    @property
    def is_little(self) -> bool:
        """Whether all cores are little ones."""
        return all(cluster.core in _LITTLE for cluster in self.clusters.value or ())

    @property
    def big_cores(self) -> int:
        """How many cores should compute: those that do not make the others wait; where all are little, four of the fastest."""
        clusters = self.clusters.value or ()
        fastest = max((cluster.mhz for cluster in clusters), default=0)
        big = [c for c in clusters if c.core not in _LITTLE and c.mhz >= SLOW * fastest]
        return sum(c.count for c in big) or min(_FEW, self.cores)


@dataclass(frozen=True)
class Phone:
    """A phone, or a board.

    Attributes:
        key: its name in the table and on the command line.
        name: as people call it.
        soc: its chip.
        year: when it came out.
        ram_gb: of the smallest variant that is sold, GiB.
        android: the major version that it came with.
        memory_budget: bytes that an app may take.
    """

    key: str
    name: Fact[str]
    soc: Soc
    year: Fact[int]
    ram_gb: Fact[float]
    android: Fact[int]
    memory_budget: Fact[int]


@dataclass(frozen=True)
class _Table:
    phones: dict[str, Phone]
    sources: dict[str, Source]


def phones() -> dict[str, Phone]:
    """Return all phones by key, in the order of the table: from the smallest to the largest, boards last."""
    return _table().phones


def sources() -> dict[str, Source]:
    """Return the pages by key."""
    return _table().sources


def get_phone(key: str) -> Phone:
    """Return a phone by key.

    Raises:
        ConfigError: there is no such phone.
    """
    known = phones()
    if key not in known:
        raise ConfigError(f"There is no phone '{key}'.{did_you_mean(key, known)} `cdcda bench --list-phones` shows all.")
    return known[key]


@cache
def _table() -> _Table:
    rows = tomllib.loads(files(__package__).joinpath("phones.toml").read_text(encoding="utf-8"))
    socs = {key: _soc(key, row) for key, row in rows["socs"].items()}
    fraction, kept = _fact(rows["memory_budget"]["fraction"]), _fact(rows["memory_budget"]["kept_gb"])
    return _Table(
        {key: _phone(key, row, socs, fraction, kept) for key, row in rows["phones"].items()},
        {key: Source(**row) for key, row in rows["sources"].items()},
    )


def _fact(row: Any) -> Fact[Any]:
    return Fact() if row == UNKNOWN else Fact(**row)


def _soc(key: str, row: Mapping[str, Any]) -> Soc:
    facts = {name: _fact(value) for name, value in row.items()}
    clusters = facts.pop("clusters")
    found = None if clusters.value is None else tuple(Cluster(**one) for one in clusters.value)
    return Soc(key, clusters=Fact(found, clusters.source, clusters.note), **facts)


def _phone(key: str, row: Mapping[str, Any], socs: Mapping[str, Soc], fraction: Fact[float], kept: Fact[float]) -> Phone:
    facts = {name: _fact(value) for name, value in row.items()}
    soc, ram = socs[str(facts.pop("soc").value)], facts["ram_gb"]
    budget: Fact[int] = Fact()
    if ram.value is not None and fraction.value is not None and kept.value is not None:
        size = ram.value * _GIB
        budget = Fact(int(min(fraction.value * size, size - kept.value * _GB)), fraction.source, f"of the RAM in {ram.source}")
    return Phone(key, soc=soc, memory_budget=budget, **facts)
