"""The table of phones: every fact names its page or is unknown, and what is read off it."""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files
from typing import Any

import pytest

from cdcda_export.errors import ConfigError
from cdcda_mobile.phone.classes import UNKNOWN, Cluster, Fact, Soc, get_phone, phones, sources

TABLE = tomllib.loads(files("cdcda_mobile.phone").joinpath("phones.toml").read_text(encoding="utf-8"))
FACTS = [
    (f"{kind}.{key}.{name}", value) for kind in ("phones", "socs") for key, row in TABLE[kind].items() for name, value in row.items()
] + [(f"memory_budget.{name}", value) for name, value in TABLE["memory_budget"].items()]


@pytest.mark.parametrize(("place", "value"), FACTS, ids=[place for place, _ in FACTS])
def test_every_fact_names_a_page_or_is_unknown(place: str, value: Any) -> None:
    assert value == UNKNOWN or (value["value"] not in ("", None, UNKNOWN) and value["source"] in TABLE["sources"])


def test_every_page_has_an_address_and_is_used() -> None:
    assert all(source.url.startswith("https://") and source.title for source in sources().values())
    said = [f"{value['source']} {value.get('note', '')}" for _, value in FACTS if value != UNKNOWN]
    assert [key for key in sources() if not any(re.search(rf"(?<![\w-]){key}(?![\w-])", text) for text in said)] == []


def test_there_are_phones_of_every_class_and_a_board() -> None:
    found = phones()
    assert len(found) >= 13 and {"galaxy-s23", "galaxy-a16", "raspberry-pi-5"} <= set(found)
    isa = {(phone.soc.dotprod.value, phone.soc.i8mm.value) for phone in found.values()}
    assert isa == {(False, False), (True, False), (True, True)}
    assert {phone.ram_gb.value for phone in found.values()} >= {2, 4, 6, 8, 12}


def test_the_cores_that_compute_are_those_that_nobody_waits_for() -> None:
    def big(*clusters: tuple[str, int, int]) -> int:
        given = Fact(tuple(Cluster(*one) for one in clusters), "page")
        return Soc("x", Fact(), given, Fact(), Fact(), Fact()).big_cores

    assert big(("Cortex-X3", 1, 3200), ("Cortex-A715", 4, 2800), ("Cortex-A510", 3, 2000)) == 5
    assert big(("Cortex-A725", 4, 3200), ("Cortex-A725", 4, 2200)) == 4  # the same type, much slower
    assert big(("Cortex-A55", 8, 2000)) == 4
    assert big() == 0


def test_an_app_has_less_than_the_memory_that_is_sold() -> None:
    small, large = get_phone("redmi-7a"), get_phone("oneplus-12")
    assert small.memory_budget.value == int(2 * 2**30 - 1.2e9)
    assert large.memory_budget.value == int(0.6 * 12 * 2**30)
    assert small.memory_budget.source == "pocketpal-memory"


def test_a_mistyped_phone_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"no phone 'galaxy-s32'\. Did you mean 'galaxy-s2\d'\?.*--list-phones"):
        get_phone("galaxy-s32")
