"""How good beside how fast: everything that was exported for a user, or for many, on the phones that are asked about."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

from cdcda_export.artifact import Artifact
from cdcda_export.bundle import BUNDLE, read_bundle
from cdcda_export.card_values import finite, part, rows
from cdcda_export.errors import FileError
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import MANIFEST, read_manifest
from cdcda_export.report_plot import ticks
from cdcda_mobile.chat import read_artifact
from cdcda_mobile.phone.bench import Fit, fit_of
from cdcda_mobile.phone.classes import Phone
from cdcda_mobile.phone.predict import Speed, predict, work_of

PROMPT = 256  # tokens before the first one
KEPT = 0.9  # of the personal gain: what keeps so much is as good as the rest for us
PROTOCOL = "llama-bench"  # whose decode is shown
_MIDDLE = 288


@dataclass(frozen=True)
class Quality:
    """What an artifact is worth to its users; means over them, None where it was not verified in full.

    Attributes:
        kl: divergence from the merged model in float32, in nats.
        kept: the share of the personal gain that is left.
        metrics: "task metric" -> value.
    """

    kl: float | None
    kept: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One kind of artifact on one phone.

    Attributes:
        name: the folder that such an artifact lies in.
        format: gguf, gguf-lora or onnx.
        quant: its quantization.
        users: how many it was exported for.
        bytes: of all its files; a mean over users.
        quality: see ``Quality``.
        phone: key of the phone.
        decode: predicted tokens a second; None where nothing was calibrated.
        prefill: the same.
        first_token: predicted seconds from a prompt of ``PROMPT`` tokens to the first one.
        fit: memory and verdict; None for ONNX.
        host: decode that ``cdcda bench --phone`` measured here since it was exported, tokens a second; a mean over users of
            the median over repeats; None where it did not.
        device: the same on a real phone, which was said to be this one (``--device --phone``).
        front: no other row of this phone is both faster and closer to the float32 model.
    """

    name: str
    format: str
    quant: str
    users: int
    bytes: float
    quality: Quality
    phone: str
    decode: Speed | None
    prefill: Speed | None
    first_token: float | None
    fit: Fit | None
    host: float | None
    device: float | None
    front: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return everything."""
        return asdict(self)


def artifacts_in(path: Path) -> list[Path]:
    """Return the finished artifacts of a user's run, or of every run of a workspace.

    Raises:
        FileError: there are none.
    """
    found = sorted({bundle.parent for pattern in (f"*/{BUNDLE}", f"*/*/{BUNDLE}") for bundle in path.glob(pattern)})
    kept = [one for one in found if not one.name.endswith((".partial", ".old")) and read_manifest(one) is not None]
    if not kept:
        raise FileError(f"{path} holds no finished artifact; make some with `cdcda-export --user ID --quant q4_0` and other --quant.")
    return kept


def table(path: Path, phones: Sequence[Phone], context: int) -> list[Row]:
    """Return a row for every phone and kind of artifact.

    Args:
        path: a user's run, or a workspace.
        phones: which ones.
        context: tokens that have to go into memory.

    Raises:
        FileError: there are no artifacts, or one was changed.
    """
    kinds: dict[str, list[tuple[Path, Artifact]]] = defaultdict(list)
    for directory in artifacts_in(path):
        kinds[directory.name].append((directory, read_artifact(directory)))
    found = []
    for phone in phones:
        mine = [_row(phone, name, members, context) for name, members in kinds.items()]
        found += sorted(_with_front(mine), key=lambda row: -(row.decode.expected if row.decode else 0.0))
    return found


def _row(phone: Phone, name: str, members: Sequence[tuple[Path, Artifact]], context: int) -> Row:
    sizes = [sum(path.stat().st_size for path in artifact.files.values()) for _, artifact in members]
    decode = prefill = fit = first = None
    first_of_all = members[0][1]
    if first_of_all.format != "onnx":
        # All users' artifacts of a kind hold the same tensors: one of them says how fast all are.
        file = GgufFile(first_of_all.files["model"])
        fit = fit_of(phone, file, max(sizes), context)
        if first_of_all.format == "gguf":  # an adapter at run time was never measured on a phone
            prediction = predict(phone, work_of(file), _MIDDLE)
            decode, prefill = prediction.decode, prediction.prefill
        if decode and prefill:
            first = PROMPT / prefill.expected + 1 / decode.expected
    directories = [directory for directory, _ in members]
    return Row(
        name,
        first_of_all.format,
        first_of_all.quant,
        len(members),
        fmean(sizes),
        _quality([_card(directory) for directory in directories]),
        phone.key,
        decode,
        prefill,
        first,
        fit,
        _measured(directories, phone, phone.key),
        _measured(directories, phone, "device-*"),
    )


def _card(directory: Path) -> dict[str, Any]:
    manifest = read_manifest(directory)
    card = manifest.metrics.get("card") if manifest else None
    # An adapter from elsewhere has no user's card, but what was verified stands in every bundle.
    return {**(card if isinstance(card, dict) else {}), "verification": read_bundle(directory)["verification"]}


def _quality(cards: Sequence[dict[str, Any]]) -> Quality:
    def mean(values: Iterator[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    metrics: dict[str, list[float]] = defaultdict(list)
    for card in cards:
        for row in rows(card, "tasks"):
            value = finite(row.get("personal"))
            if value is not None:
                metrics[f"{row.get('task')} {row.get('metric')}"].append(value)
    return Quality(
        kl=mean(finite(part(card, "verification").get("kl_mean")) for card in cards),
        kept=mean(finite(part(card, "personal_gain").get("survived")) for card in cards),
        metrics={name: fmean(values) for name, values in metrics.items()},
    )


def _measured(directories: Sequence[Path], phone: Phone, where: str) -> float | None:
    """Return the decode that ``cdcda bench`` measured for artifacts as they are, tokens a second; None for no run that is to be used.

    Args:
        directories: of the artifacts.
        phone: that was named.
        where: the part of the result's name that says where it ran; ``*`` for anything.
    """
    found = [
        median(speeds)
        for directory in directories
        for path in (directory.parent / "bench").glob(f"{directory.name}-{where}-{PROTOCOL}.json")
        if path.stat().st_mtime >= (directory / MANIFEST).stat().st_mtime and (speeds := _decode(path, phone))
    ]
    return fmean(found) if found else None


def _decode(path: Path, phone: Phone) -> list[float]:
    """Return the repeats of a result's decode; none where it is another phone's, is not to be used, or cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(content, dict) or content.get("class") != phone.key or content.get("unusable") != "":
        return []
    speeds = part(content, "measured").get("decode")
    return [value for value in map(finite, speeds) if value is not None] if isinstance(speeds, list) else []


def _with_front(found: Sequence[Row]) -> list[Row]:
    """Mark what nothing beats: another row that is faster and closer to the float32 model."""

    def beaten(row: Row) -> bool:
        if row.decode is None or row.quality.kl is None:
            return True
        return any(
            other.decode is not None
            and other.quality.kl is not None
            and other.decode.expected >= row.decode.expected
            and other.quality.kl <= row.quality.kl
            and (other.decode.expected, other.quality.kl) != (row.decode.expected, row.quality.kl)
            for other in found
        )

    return [replace(row, front=not beaten(row)) for row in found]


@dataclass(frozen=True)
class Recommendation:
    """What to put on a phone.

    Attributes:
        row: None where nothing will do.
        why: one sentence.
        refused: name -> what speaks against it.
    """

    row: Row | None
    why: str
    refused: dict[str, str]


def recommend(found: Sequence[Row], least: float) -> Recommendation:
    """Pick an artifact for one phone: of those that go into its memory, are fast enough and keep the person, the fastest.

    Args:
        found: the rows of that phone.
        least: tokens a second that the lower end of the predicted decode has to reach.
    """
    against = {row.name: _against(row, least) for row in found}
    able = [row for row in found if not against[row.name]]
    refused = {name: reason for name, reason in against.items() if reason}
    if not able:
        return Recommendation(None, "No exported artifact will do on this phone.", refused)
    keeping = [row for row in able if (row.quality.kept or 0.0) >= KEPT]
    if keeping:
        # Where nothing is known of the phone's speed: memory is what a token waits for.
        best = max(keeping, key=lambda row: (row.decode.expected if row.decode else 0.0, -row.bytes))
        superlative, comparative = ("fastest", "slower") if best.decode else ("smallest", "larger")
        lost = {
            row.name: f"keeps the person too, but is {comparative}" if row in keeping else _lost(row) for row in able if row is not best
        }
        return Recommendation(best, f"The {superlative} of those that keep at least {KEPT:.0%} of the personal gain.", refused | lost)
    best = min(able, key=lambda row: (math.inf if row.quality.kl is None else row.quality.kl, row.bytes))
    further = {row.name: "further from the float32 model" for row in able if row is not best}
    why = f"Closest to the float32 model; none is known to keep {KEPT:.0%} of the personal gain."
    return Recommendation(best, why, refused | further)


def _against(row: Row, least: float) -> str:
    """Return what speaks against an artifact on its phone, '' for nothing."""
    if row.format != "gguf":
        return "its speed was not calibrated"
    if row.fit is not None and row.fit.verdict == "does not fit":
        return "does not fit into the memory that an app may take"
    if row.decode is None:
        return "nothing is known of this phone's speed" if least else ""
    return f"may decode at {row.decode.low:.1f} tok/s only" if row.decode.low < least else ""


def _lost(row: Row) -> str:
    kept = row.quality.kept
    return "how much of the person it keeps was not measured" if kept is None else f"keeps {kept:.1%} of the personal gain"


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 720, 420, 64, 40, 56
_COLOURS = ("#0b6b66", "#b4551f", "#5b4bb0", "#3d6b1c", "#8a2f5f", "#5f6f8a")


def front_svg(found: Sequence[Row]) -> str:
    """Return the plot: predicted decode against KL divergence, the front of each phone as a line; '' where there is nothing to draw."""
    shown = [(row, row.decode, row.quality.kl) for row in found if row.decode is not None and row.quality.kl is not None]
    if not shown:
        return ""
    xs, ys = ticks(0.0, max(speed.high for _, speed, _ in shown)), ticks(0.0, max(kl for *_, kl in shown))

    def px(value: float) -> float:
        return round(_LEFT + (value - xs[0]) / (xs[-1] - xs[0]) * (_WIDTH - _LEFT - 24), 1)

    def py(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - (value - ys[0]) / (ys[-1] - ys[0]) * (_HEIGHT - _TOP - _BOTTOM), 1)

    drawn = ['<text x="8" y="18" class="title">KL divergence over predicted decode speed; lower and further right is better</text>']
    drawn += [f'<line class="grid" x1="{px(x)}" x2="{px(x)}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>' for x in xs]
    drawn += [f'<text x="{px(x)}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{x:g}</text>' for x in xs]
    drawn += [f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 24}" y1="{py(y)}" y2="{py(y)}"/>' for y in ys]
    drawn += [f'<text x="{_LEFT - 6}" y="{py(y) + 4}" text-anchor="end">{y:g}</text>' for y in ys]
    drawn.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 22}" text-anchor="middle">tokens a second (bars: 90 % interval)</text>')
    for number, phone in enumerate(dict.fromkeys(row.phone for row, *_ in shown)):
        colour = _COLOURS[number % len(_COLOURS)]
        mine = sorted(((row, speed, kl) for row, speed, kl in shown if row.phone == phone), key=lambda one: one[1].expected)
        line = " ".join(f"{px(speed.expected)},{py(kl)}" for row, speed, kl in mine if row.front)
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for row, speed, kl in mine:
            y = py(kl)
            drawn.append(f'<line x1="{px(speed.low)}" x2="{px(speed.high)}" y1="{y}" y2="{y}" stroke="{colour}" opacity="0.5"/>')
            drawn.append(f'<circle cx="{px(speed.expected)}" cy="{y}" r="4" fill="{colour}"/>')
            drawn.append(f'<text x="{px(speed.expected)}" y="{y - 8}" text-anchor="middle">{escape(row.quant)}</text>')
        drawn.append(f'<text x="{_LEFT + number * 130}" y="{_HEIGHT - 6}" style="fill:{colour}">{escape(phone)}</text>')
    spoken = "; ".join(f"{row.name} on {row.phone}: {speed.expected:.1f} tokens a second, KL {kl:.4f}" for row, speed, kl in shown)
    style = (
        "svg{font:12px system-ui,sans-serif;background:#fff}text{fill:#1f2328}.title{font-weight:600}.grid{stroke:#dedbd3}"
        "@media(prefers-color-scheme:dark){svg{background:#14171a}text{fill:#e5e3de}.grid{stroke:#343a41}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" '
        f'aria-label="{escape(spoken)}"><style>{style}</style>{"".join(drawn)}</svg>\n'
    )
