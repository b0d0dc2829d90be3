"""What the terminal card and the HTML report both say: the card's facts in words; what is missing is "not applicable"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cdcda_export.card_values import clean, counts, duration, finite, number, part, percent, rows, significant, size

NOT_APPLICABLE = "not applicable"
TEACHER_OPTIONS = "--teacher-base-url URL --teacher-model NAME"
TEACHER_ADVICE = f"A stronger endpoint gives better data: {TEACHER_OPTIONS}, or OPENAI_BASE_URL and OPENAI_API_KEY."
# Label and lines of each fact, the same in every rendering.
Facts = list[tuple[str, list[str]]]

_LOWER_IS_BETTER = {"MAE", "RMSE", "NLL"}


@dataclass(frozen=True)
class Verdict:
    """Whether the artifact may be trusted: ``state`` for colours, ``word`` for people."""

    state: Literal["good", "bad", "unknown"]
    word: str


@dataclass(frozen=True)
class Measure:
    """One number of base and personal model; NLL is in nats per token."""

    name: str
    base: float | None
    personal: float | None
    lower_is_better: bool

    @property
    def change(self) -> float | None:
        """Personal minus base, None where one is missing."""
        return None if self.base is None or self.personal is None else self.personal - self.base

    @property
    def better(self) -> bool | None:
        """Whether the personal model is the better one; None where they are equal or unknown."""
        return None if not self.change else (self.change < 0) == self.lower_is_better


@dataclass(frozen=True)
class TaskResult:
    """All measures of one task over ``n`` test records."""

    task: str
    n: str
    measures: list[Measure]


def headline(card: Mapping[str, Any]) -> str:
    """Return what the card is about."""
    if card.get("user") is not None:
        return f"The model of user {clean(card['user'])}"
    adapter = clean(card.get("adapter")).rstrip("/").rpartition("/")[2]
    return f"The adapter {adapter}, exported" if adapter else "An adapter, exported"


def verdict(card: Mapping[str, Any]) -> Verdict:
    """Return whether the artifact was verified."""
    verification = part(card, "verification")
    if verification.get("level") in (None, "off"):
        return Verdict("unknown", "not verified")
    if verification.get("passed") is not True:
        return Verdict("bad", "did not pass its gate")
    return Verdict("unknown", "checked quickly") if verification.get("level") == "quick" else Verdict("good", "verified")


def gain(card: Mapping[str, Any]) -> Measure | None:
    """Return the NLL of the user's held-out answers under base and artifact; None where there is no user."""
    found = part(card, "personal_gain")
    return Measure("NLL", finite(found.get("nll_base")), finite(found.get("nll_personal")), True) if found else None


def survived(card: Mapping[str, Any]) -> str:
    """Return in words how much of the gain quantization left; '' where there was none to begin with."""
    found = part(card, "personal_gain")
    base, exact = finite(found.get("nll_base")), finite(found.get("nll_personal_f32"))
    if base is None or exact is None or base <= exact or finite(found.get("survived")) is None:
        return ""
    return f"{percent(found['survived'])} of the gain survived quantization"


def cautions(card: Mapping[str, Any]) -> list[str]:
    """Return all that a user should know before trusting the artifact: derived from the numbers, then the card's own."""
    found = []
    failures = part(card, "verification").get("failures")
    found += [clean(text) for text in failures] if isinstance(failures, list | tuple) else []
    measure = gain(card)
    if measure is not None and measure.change is not None and measure.change >= 0:
        found.append(
            f"No personal gain: on this user's held-out answers the model has NLL {number(measure.personal)}, its base "
            f"{number(measure.base)}. More records, a stronger teacher or more bits (--quant q8_0) may help."
        )
    own = card.get("warnings")
    found += [clean(text) for text in own] if isinstance(own, list | tuple) else []
    return list(dict.fromkeys(text for text in found if text))


def embedded_teacher(card: Mapping[str, Any]) -> bool:
    """Say whether the small model that ships wrote the synthetic data."""
    return part(card, "augmentation").get("embedded") is True


def tasks(card: Mapping[str, Any]) -> list[TaskResult]:
    """Return every task with NLL first, then its main metric, then the others."""
    found = []
    for row in rows(card, "tasks"):
        name = clean(row.get("metric"))
        lower = row.get("lower_is_better")
        measures = [Measure("NLL", finite(row.get("nll_base")), finite(row.get("nll_personal")), True)]
        if name:
            down = lower if isinstance(lower, bool) else name in _LOWER_IS_BETTER
            measures.append(Measure(name, finite(row.get("base")), finite(row.get("personal")), down))
        for other, pair in part(row, "more").items():
            if isinstance(pair, list | tuple) and len(pair) == 2:
                measures.append(Measure(clean(other), finite(pair[0]), finite(pair[1]), clean(other) in _LOWER_IS_BETTER))
        found.append(TaskResult(clean(row.get("task")), number(row.get("n"), 0), measures))
    return found


def next_steps(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return purpose and command of what a user can do now."""
    value = card.get("next")
    pairs = value if isinstance(value, list | tuple) else []
    return [(clean(pair[0]), clean(pair[1])) for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2]


def facts(card: Mapping[str, Any]) -> Facts:
    """Return label and lines of each fact: three about the artifact, then three about how it was made."""
    return [
        ("file", _file_lines(card)),
        ("verified", _verified_lines(card)),
        ("personal", _gain_lines(card)),
        ("training", _training_lines(card)),
        ("teacher", _teacher_lines(card)),
        ("time", _time_lines(card)),
    ]


def _file_lines(card: Mapping[str, Any]) -> list[str]:
    artifact = part(card, "artifact")
    if not artifact:
        return [NOT_APPLICABLE]
    kind = " ".join(filter(None, (clean(artifact.get("format")), clean(artifact.get("quant")))))
    facts = [size(artifact.get("bytes")), kind, *(f"{name} x{n}" for name, n in counts(artifact.get("tensor_types")))]
    lines = [clean(artifact.get("file")), ", ".join(filter(None, facts))]
    if artifact.get("double_quantized"):
        lines.append(clean(artifact["double_quantized"]))
    base = clean(part(card, "base").get("name"))
    return [*lines, f"base {base}"] if base else lines


def _verified_lines(card: Mapping[str, Any]) -> list[str]:
    found = part(card, "verification")
    if found.get("level") in (None, "off"):
        return ["not verified: nothing is known of what this file answers"]
    ids = part(found, "token_ids")
    first = "quick checks, no comparison with the merged model (that is --verify full)"
    if found.get("level") != "quick":
        first = (
            f"KL {significant(found.get('kl_mean'))} (gate {significant(found.get('kl_gate'))})  "
            f"top-1 {percent(found.get('top1'))} (gate {percent(found.get('top1_gate'))})"
        )
    if found.get("passed") is not True:
        first += "  FAILED"
    lines = [first, f"token ids equal on {number(ids.get('equal'), 0)} of {number(ids.get('texts'), 0)} texts"]
    if finite(found.get("positions")) is not None:
        lines[-1] += f", {number(found['positions'], 0)} positions"
    if found.get("reference"):
        lines[-1] += f", against {clean(found['reference'])}"
    share = least_arrived(found)
    if share is not None:
        gate = finite(found.get("arrival_gate")) or 0.0
        lines.append(f"{percent(share)} of the adapter's change arrived in the file (gate {percent(1 - gate)} to {percent(1 + gate)})")
    worst = worst_tensor(found)
    if worst:
        lines.append(worst)
    return lines


def worst_tensor(verification: Mapping[str, Any]) -> str:
    """Return in words how far rewritten tensors are from their float32 weights; '' where they were not read back."""
    worst = part(verification, "worst_tensor")
    if finite(worst.get("error")) is None or finite(worst.get("bound")) is None:
        return ""
    return (
        f"{number(verification.get('tensors'), 0)} rewritten tensors read back, at most {percent(worst['error'])} from their float32 "
        f"weights ({clean(worst.get('name'))}; {percent(worst['bound'])} allowed for {clean(worst.get('type'))})"
    )


def least_arrived(verification: Mapping[str, Any]) -> float | None:
    """Return the arrived share of the kind of layer that is farthest from 1, None where it was not measured."""
    shares = [share for value in part(verification, "arrived").values() if (share := finite(value)) is not None]
    return max(shares, key=lambda share: abs(share - 1), default=None)


def _gain_lines(card: Mapping[str, Any]) -> list[str]:
    measure = gain(card)
    if measure is None:
        return [NOT_APPLICABLE]
    tokens = finite(part(card, "personal_gain").get("tokens"))
    over = f"{tokens:.0f} tokens" if tokens is not None else ""
    return [", ".join(filter(None, (compared(measure), over, survived(card))))]


def compared(measure: Measure) -> str:
    """Return a measure in one line."""
    return f"{measure.name} {number(measure.base)} -> {number(measure.personal)}"


def _training_lines(card: Mapping[str, Any]) -> list[str]:
    found = part(card, "training")
    if not found:
        return [NOT_APPLICABLE]
    records = [f"{n} {name}" for name, n in part(found, "records").items() if finite(n)]
    lines = ["records: " + ", ".join(map(clean, records))] if records else []
    templates = {
        "Rank": "rank {}",
        "Epochs": "{} epochs",
        "Steps": "{} steps",
        "Best step": "best {}",
        "Peak memory": "peak {}",
        "Synthetic records": "synthetic: {}",
        "CPU time": "{} of CPU",
    }
    lines.append(", ".join(templates.get(name, "{}").format(value) for name, value in training_facts(found)))
    return [line for line in lines if line]


def training_facts(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return name and value of what is known of a training run, its records and curve aside."""
    speed, mix = finite(training.get("tokens_per_second")), part(training, "synthetic")
    found = [
        *((name, number(training.get(key), 0)) for name, key in (("Rank", "rank"), ("Epochs", "epochs"), ("Steps", "steps"))),
        ("Best step", number(training.get("best_step"), 0)),
        ("Synthetic records", f"weight {number(mix.get('weight'), 2)}, {clean(mix.get('schedule'))}" if mix else "n/a"),
        ("Time", duration(training.get("seconds"))),
        ("CPU time", duration(training.get("cpu_seconds"))),
        ("Speed", "n/a" if speed is None else f"{speed:.0f} tokens/s"),
        ("Peak memory", size(training.get("peak_rss_bytes"))),
    ]
    return [(name, value) for name, value in found if value != "n/a"]


def _teacher_lines(card: Mapping[str, Any]) -> list[str]:
    found = part(card, "augmentation")
    if not found:
        return [NOT_APPLICABLE]
    kept, rejected = (number(found.get(key), 0) for key in ("kept", "rejected"))
    first = f"{clean(found.get('teacher')) or 'unnamed'}: {kept} kept, {rejected} rejected"
    reasons = counts(found.get("reasons"))
    if reasons:
        first += f" ({', '.join(f'{n} {reason}' for reason, n in reasons)})"
    return [first, TEACHER_ADVICE] if embedded_teacher(card) else [first]


def _time_lines(card: Mapping[str, Any]) -> list[str]:
    stages = rows(card, "stages")
    if not stages:
        return [NOT_APPLICABLE]
    return [", ".join(f"{clean(s.get('name'))} {'reused' if s.get('reused') else duration(s.get('seconds'))}" for s in stages)]
