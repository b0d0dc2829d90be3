"""The laboratory's planted identifiers: enough of every kind, valid, where they should stand; and the count finds what is left of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from cdcda_mobile.config import AugmentConfig
from planted_identifiers import Planted, plant
from planted_values import Value, luhn
from redaction import Capture, measure, run

CONFIG = AugmentConfig(keep=30, max_attempts=1, examples=20)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return plant(0, per_kind=2)


@pytest.fixture(scope="module")
def control(planted: Planted) -> Capture:
    return run(planted, CONFIG, 0)


def test_there_are_enough_of_every_kind_and_the_seed_decides_them() -> None:
    planted = plant(3)
    counts = Counter(value.kind for value in planted.values)
    assert len(counts) == 12 and min(counts.values()) >= 20
    assert len({value.text for value in planted.values}) == len(planted.values) and len({d.text for d in planted.decoys}) >= 100
    assert planted == plant(3) and planted != plant(4)
    texts = [f"{r.input}\n{r.output}" for r in planted.records]
    times = [sum(value.text in text for text in texts) for value in planted.values]
    assert min(times) >= 1 and times.count(2) >= 20
    assert sum(value.text in r.input and value.text in r.output for value in planted.values for r in planted.records) >= 20
    sides = [side for r in planted.records for side in (r.input, r.output)]
    for place in (str.startswith, str.endswith):
        assert sum(any(place(side, value.text) for side in sides) for value in planted.values) >= 20
    assert sum(any(f'"{value.text}"' in side or f"({value.text})" in side for side in sides) for value in planted.values) >= 20


def test_numbers_have_the_check_digits_of_their_kind() -> None:
    values = plant(1).values
    for value in values:
        solid = re.sub(r"\W", "", value.text).upper()
        if value.kind == "card":
            assert luhn(solid[:-1]) == solid
        if value.kind == "iban":
            assert int("".join(str(int(char, 36)) for char in solid[4:] + solid[:4])) % 97 == 1
    assert luhn("7992739871") == "79927398713"


def sent_as(planted: Planted, control: Capture, change: Callable[[str], str]) -> dict[str, dict[str, dict[str, int]]]:
    """What is measured where every text is changed like this before it is sent."""
    records = tuple(replace(r, input=change(r.input), output=change(r.output)) for r in planted.records)
    return measure(planted, control, run(replace(planted, records=records), CONFIG, 0, control))


def hide(planted: Planted, left_of: Callable[[Value], str]) -> Callable[[str], str]:
    """Replace every value by what is to be left of it."""
    values = sorted(planted.values, key=lambda value: -len(value.text))

    def change(text: str) -> str:
        for value in values:
            text = text.replace(value.text, left_of(value))
        return text

    return change


def test_without_redaction_everything_is_seen(planted: Planted, control: Capture) -> None:
    found = measure(planted, control, control)
    assert {row["recall"] for row in found["kinds"].values()} == {0.0}
    assert found["records"]["shown"] == len(planted.records) and found["requests"]["unpaired"] == 0
    assert found["words"]["replaced"] == 0 and all(row["kept"] == row["shown"] for row in found["decoys"].values())


def test_a_perfect_redaction_is_perfect(planted: Planted, control: Capture) -> None:
    found = sent_as(planted, control, hide(planted, lambda value: f"[{value.kind.upper()}_{planted.values.index(value)}]"))
    assert {row["recall"] for row in found["kinds"].values()} == {1.0} and sum(row["fragments"] for row in found["kinds"].values()) == 0
    assert found["words"]["replaced"] == 0 and all(row["kept"] == row["shown"] for row in found["decoys"].values())
    assert found["kept"]["echoing"] > 5 and found["kept"]["restored"] == 0  # nobody put the values back


def test_parts_other_separators_and_rests_are_found(planted: Planted, control: Capture) -> None:
    def left_of(value: Value) -> str:
        if value.kind == "card":
            return re.sub(r"\W", "", value.text)  # the same number
        return value.text[:-4] + "****" if value.kind == "iban" else value.cores[-1]

    found = sent_as(planted, control, hide(planted, left_of))["kinds"]
    assert found["card"]["whole"] == 2 and found["iban"]["recall"] == 1 and found["iban"]["fragments"] == 2
    assert found["person"]["recall"] == found["url_credentials"]["recall"] == 0 and found["url_credentials"]["part"] == 2


def test_lost_decoys_and_words_are_counted(planted: Planted, control: Capture) -> None:
    found = sent_as(planted, control, lambda text: text.replace("Monday", "[NAME_1]").replace("umbrella", "[NAME_2]"))
    lost = {kind for kind, row in found["decoys"].items() if row["kept"] < row["shown"]}
    assert lost == {"capitalised"} and found["words"]["replaced"] > 0
