"""What of a person reaches the teacher: identifiers planted into records, looked for in the requests that a real endpoint receives.

The whole augmentation runs twice over HTTP on loopback: once without redaction, which shows that every record is sent and every
identifier would be seen, and once with it. Requests of the two runs are paired by their seed. A value counts as missed if a part of it that
gives it away alone is found in any request: either name of a person, street and number of an address, the password in a URL, a number with
any separators. ``structured_recall`` is over all kinds but persons; ``name_recall_extra`` needs the optional library.

python benchmarks/redaction.py [--quick] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from capture_endpoint import Body, Echo, Endpoint, pairs_of, plain, squeezed, stands_in, texts_of
from cdcda_export.progress import Silent
from cdcda_mobile.augmentation.augment import Synthetic, augment
from cdcda_mobile.config import AugmentConfig, HistoryConfig, TeacherConfig
from cdcda_mobile.history import list_users, read_history, split_by_time
from laboratory import print_table, write_results
from planted_identifiers import PER_KIND, QUICK_PER_KIND, Decoy, Planted, plant
from planted_values import Value

REQUESTS, QUICK_REQUESTS, SAMPLE_REQUESTS, MOST_REQUESTS, EXAMPLES = 240, 120, 40, 2000, 20
EXTRA = "spacy"
_FRAGMENT = 7  # letters or digits in a row that are left of a number


# Counting.


@dataclass
class Capture:
    """What an endpoint received in one run, what was kept of its answers, and how long it took."""

    bodies: dict[int, Body]
    raw: list[str]
    echoes: list[Echo]
    kept: tuple[Synthetic, ...]
    seconds: float

    @cached_property
    def haystack(self) -> str:
        """Every text that was sent, once, :func:`plain`, and the raw bodies' own spelling."""
        texts = {plain(text) for body in self.bodies.values() for text in texts_of(body)}
        return "\n".join([*sorted(texts), *map(plain, self.raw)])

    @cached_property
    def solid(self) -> str:
        """The same, :func:`squeezed` text by text."""
        return "\n".join(sorted({squeezed(text) for body in self.bodies.values() for text in texts_of(body)}))

    def pairs(self, control: Capture) -> tuple[list[tuple[str, str]], int]:
        """Return every shown text as it was and as it was sent, each pair once, and how many requests could not be paired."""
        found, lost = set[tuple[str, str]](), 0
        for seed, body in self.bodies.items():
            pairs = pairs_of(control.bodies[seed], body) if seed in control.bodies else None
            found.update(pairs or ())
            lost += pairs is None
        return sorted(found), lost


def seen(capture: Capture, value: Value) -> str:
    """Return what was seen of a value: ``whole``, a ``part`` that gives it away, or ''."""
    whole, parts = plain(value.text), [plain(core) for core in value.cores]
    if stands_in(capture.haystack, whole) or (value.numeric and squeezed(value.text) in capture.solid):
        return "whole"
    return "part" if any(stands_in(capture.haystack, part) for part in parts) else ""


def fragments(values: Sequence[Value], pairs: Sequence[tuple[str, str]]) -> list[Value]:
    """Return numbers of which seven letters or digits in a row are left where the number stood."""
    found = []
    for value in values:
        text = squeezed(value.text) if value.numeric else ""
        runs = {text[i : i + _FRAGMENT] for i in range(len(text) - _FRAGMENT + 1)}
        shown = [squeezed(after) for before, after in pairs if value.text in before]
        if any(run in after for run in runs for after in shown):
            found.append(value)
    return found


def survived(decoy: Decoy, planted: Planted, pairs: Sequence[tuple[str, str]]) -> bool | None:
    """Say whether a decoy was sent as often as its record was shown; None where it never was."""
    record, asked = planted.records[int(decoy.record)], re.compile(rf"(?<!\w){re.escape(decoy.text)}(?!\w)")
    sides = [text for text in (record.input, record.output) if asked.search(text)]
    shown = [pair for pair in pairs if any(side in pair[0] for side in sides)]
    return all(len(asked.findall(after)) >= len(asked.findall(without(before, planted))) for before, after in shown) if shown else None


def without(text: str, planted: Planted) -> str:
    """Return a text without the values in it."""
    for value in sorted(planted.values, key=lambda value: -len(value.text)):
        text = text.replace(value.text, " ")
    return text


def replaced_words(planted: Planted, pairs: Sequence[tuple[str, str]]) -> tuple[int, int]:
    """Return how many ordinary words, outside the values, did not arrive, and how many there are."""
    total = lost = 0
    for before, after in pairs:
        words, arrived = (Counter(re.findall(r"[^\W\d_]+", text.casefold())) for text in (without(before, planted), after))
        total += words.total()
        lost += (words - arrived).total()
    return lost, total


def restored(capture: Capture) -> dict[str, int]:
    """Count kept texts that repeat what stood for a value, those that hold the value again, and those that hold the stand-in."""
    counts = {"echoing": 0, "restored": 0, "with_stand_ins": 0}
    texts = [text for record in capture.kept for text in (record.input, record.output)]
    for echo in capture.echoes:
        for text in texts:
            if text.startswith(echo.mark):
                counts["echoing"] += 1
                counts["restored"] += plain(echo.value) in plain(text)
                counts["with_stand_ins"] += echo.stand_in in text
    return counts


# Running.


def run(planted: Planted, config: AugmentConfig, seed: int, control: Capture | None = None) -> Capture:
    """Augment over HTTP as the product does and return what the endpoint received."""
    with Endpoint(planted.values, control.bodies if control else {}) as endpoint, tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        result = augment(
            train=planted.records,
            held_out=planted.held_out,
            user="planted",
            config=config,
            teacher_config=TeacherConfig(base_url=endpoint.url, model="capture"),
            base_gguf=Path(folder) / "unused.gguf",
            seed=seed,
            directory=Path(folder),
            answers=Path(folder) / "answers.jsonl",
            progress=Silent(),
        )
        return Capture(endpoint.bodies, endpoint.raw, endpoint.echoes, result.kept, time.monotonic() - began)


def per_kind(planted: Planted, capture: Capture, pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Return for every kind how many values were planted and seen, and the forms of those seen; no value."""
    table: dict[str, dict[str, Any]] = {}
    left = fragments(planted.values, pairs)
    for value in planted.values:
        row = table.setdefault(value.kind, {"planted": 0, "whole": 0, "part": 0, "fragments": 0, "missed_forms": {}, "fragment_forms": {}})
        how = seen(capture, value)
        row["planted"] += 1
        row["whole"] += how == "whole"
        row["part"] += how == "part"
        if how:
            row["missed_forms"][value.form] = row["missed_forms"].get(value.form, 0) + 1
        elif value in left:
            row["fragments"] += 1
            row["fragment_forms"][value.form] = row["fragment_forms"].get(value.form, 0) + 1
    for row in table.values():
        row["recall"] = 1 - (row["whole"] + row["part"]) / row["planted"]
    return table


def measure(planted: Planted, control: Capture, capture: Capture) -> dict[str, Any]:
    """Return all counts of a run; numbers, kinds and forms only."""
    pairs, unpaired = capture.pairs(control)
    decoys: dict[str, list[int]] = {}
    for decoy in planted.decoys:
        kept = survived(decoy, planted, pairs)
        if kept is not None:
            row = decoys.setdefault(decoy.kind, [0, 0])
            row[0] += kept
            row[1] += 1
    replaced, words = replaced_words(planted, pairs)
    shown = [record for record in planted.records if plain(record.input) in control.haystack and plain(record.output) in control.haystack]
    return {
        "kinds": per_kind(planted, capture, pairs),
        "decoys": {kind: {"kept": kept, "shown": total} for kind, (kept, total) in sorted(decoys.items())},
        "words": {"ordinary": words, "replaced": replaced},
        "records": {"all": len(planted.records), "shown": len(shown)},
        "requests": {"all": len(capture.bodies), "unpaired": unpaired},
        "kept": {"all": len(capture.kept), **restored(capture)},
        "seconds": round(capture.seconds, 3),
    }


def recall(measured: dict[str, Any], kinds: Sequence[str]) -> float:
    """Return the recall over all values of some kinds together."""
    rows = [measured["kinds"][kind] for kind in kinds]
    return 1 - sum(row["whole"] + row["part"] for row in rows) / sum(row["planted"] for row in rows)


def share(rows: Sequence[dict[str, int]], part: str, whole: str) -> float | None:
    """Return one sum as a share of the other, None where there is nothing."""
    total = sum(row[whole] for row in rows)
    return sum(row[part] for row in rows) / total if total else None


def figures_of(planted: Planted, measured: dict[str, Any], extra: dict[str, Any] | None) -> dict[str, float | None]:
    """Return the figures of the redaction without the optional library, and of names with it."""
    kinds = list(measured["kinds"])
    return {
        "structured_recall": recall(measured, [kind for kind in kinds if kind != "person"]),
        "structured_recall_without_addresses": recall(measured, [kind for kind in kinds if kind not in ("person", "address")]),
        "name_recall_plain": recall(measured, ["person"]),
        "name_recall_extra": recall(extra, ["person"]) if extra else None,
        "decoys_kept": share(list(measured["decoys"].values()), "kept", "shown"),
        "decoys_kept_extra": share(list(extra["decoys"].values()), "kept", "shown") if extra else None,
        "words_replaced_share": share([measured["words"]], "replaced", "ordinary"),
        "words_replaced_share_extra": share([extra["words"]], "replaced", "ordinary") if extra else None,
        "restored_share": share([measured["kept"]], "restored", "echoing"),
        "identifiers": len(planted.values),
        "kinds": len(kinds),
    }


def arms(config: AugmentConfig) -> dict[str, AugmentConfig]:
    """Return how redaction is measured: ``plain``, and ``extra`` where the optional library is installed."""
    found = {"plain": replace(config, redact=True, redact_names="plain")}
    return found | ({"extra": replace(config, redact=True)} if find_spec(EXTRA) else {})


def main() -> None:
    """Measure without redaction, with it, and with the optional library where it is installed; print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PER_KIND} identifiers of a kind instead of {PER_KIND}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    planted = plant(args.seed, QUICK_PER_KIND if args.quick else PER_KIND)
    config = AugmentConfig(without=["language"], keep=QUICK_REQUESTS if args.quick else REQUESTS, max_attempts=1, examples=EXAMPLES)
    off, on = config, arms(config)
    control = run(planted, off, args.seed)
    while any(not seen(control, value) for value in planted.values):
        if off.keep >= MOST_REQUESTS:
            raise SystemExit("Not every value was sent without redaction, so nothing can be measured; raise MOST_REQUESTS.")
        off, on = replace(off, keep=2 * off.keep), {name: replace(arm, keep=2 * off.keep) for name, arm in on.items()}
        control = run(planted, off, args.seed)
    runs = {"off": measure(planted, control, control)}
    runs |= {name: measure(planted, control, run(planted, arm, args.seed, control)) for name, arm in on.items()}
    show(runs)
    words = samples(replace(off, keep=SAMPLE_REQUESTS), {name: replace(arm, keep=SAMPLE_REQUESTS) for name, arm in on.items()}, args.seed)
    print(f"\nwords of the sample users replaced: {words}")
    figures = figures_of(planted, runs["plain"], runs.get("extra")) | {
        "sample_words_replaced_share": share([words["plain"]], "replaced", "ordinary")
    }
    write_results("redaction", figures, {"seed": args.seed, "quick": args.quick, "runs": runs, "sample_words": words})


def samples(config: AugmentConfig, arms: dict[str, AugmentConfig], seed: int) -> dict[str, dict[str, int]]:
    """Return for every arm how many words of the shipped sample users did not arrive; they name few people, so hardly any should go."""
    counts = {name: {"ordinary": 0, "replaced": 0} for name in arms}
    for user in sorted(list_users(HistoryConfig())):
        split = split_by_time(read_history(user, HistoryConfig()), HistoryConfig())
        records = Planted(split.train, (*split.validation, *split.test), (), ())
        control = run(records, config, seed)
        for name, arm in arms.items():
            replaced, words = replaced_words(records, run(records, arm, seed, control).pairs(control)[0])
            counts[name]["ordinary"] += words
            counts[name]["replaced"] += replaced
    return counts


def show(runs: dict[str, dict[str, Any]]) -> None:
    """Print one table of kinds and one of what must stay."""
    rows = []
    for name, measured in runs.items():
        for kind, row in measured["kinds"].items():
            rows.append(
                [name, kind, *(row[key] for key in ("planted", "whole", "part", "fragments", "recall")), " ".join(row["missed_forms"])[:60]]
            )
    print_table(["redaction", "kind", "planted", "seen whole", "seen in part", "rest of it left", "recall", "forms seen"], rows)
    print()
    stay = []
    for name, measured in runs.items():
        decoys, words, kept = measured["decoys"], measured["words"], measured["kept"]
        lost = {kind: row["shown"] - row["kept"] for kind, row in decoys.items() if row["kept"] < row["shown"]}
        stay.append([name, share(list(decoys.values()), "kept", "shown"), json.dumps(lost), words["replaced"] / words["ordinary"],
                     f"{kept['restored']}/{kept['echoing']}", measured["requests"]["unpaired"], measured["seconds"]])  # fmt: skip
    print_table(["redaction", "decoys kept", "decoys lost", "words replaced", "restored", "unpaired", "seconds"], stay)


if __name__ == "__main__":
    main()
