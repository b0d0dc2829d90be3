"""The card as one HTML page: self-contained, without a script, readable in light and dark, on a phone and on paper."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from cdcda_export.card_facts import (
    NOT_APPLICABLE,
    TEACHER_ADVICE,
    TEACHER_OPTIONS,
    Measure,
    cautions,
    embedded_teacher,
    gain,
    headline,
    least_arrived,
    next_steps,
    survived,
    tasks,
    training_facts,
    verdict,
    worst_tensor,
)
from cdcda_export.card_values import clean, counts, duration, finite, number, part, percent, rows, significant, size
from cdcda_export.manifest import write_atomic
from cdcda_export.report_elements import bars, definitions, escaped, quoted, section, table
from cdcda_export.report_plot import curve_svg, gate_svg

_COLOURS = 6  # of tensor types in report.css


def write_report(card: Mapping[str, Any], path: Path) -> None:
    """Write the card as one HTML page, atomically and private: it quotes the user.

    Args:
        card: the card as JSON holds it.
        path: the HTML file.

    Raises:
        FileError: it cannot be written.
    """
    write_atomic(path, report_html(card))


def report_html(card: Mapping[str, Any]) -> str:
    """Return the page."""
    style = resources.files("cdcda_export").joinpath("report.css").read_text(encoding="utf-8")
    # The page quotes text that models wrote: even if escaping failed somewhere, nothing would be loaded or run.
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    parts = (
        _head(card),
        _cautions(card),
        _samples(card),
        _tasks(card),
        _artifact(card),
        _verification(card),
        _training(card),
        _augmentation(card),
        _stages(card),
        _next(card),
        _provenance(card),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escaped(headline(card))}: {escaped(verdict(card).word)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(filter(None, parts))}\n</main>\n</body>\n</html>\n"
    )


def _head(card: Mapping[str, Any]) -> str:
    found, artifact, verification = verdict(card), part(card, "artifact"), part(card, "verification")
    measure = gain(card)
    personal, explained = NOT_APPLICABLE.capitalize(), "there is no user to measure on"
    if measure is not None:
        personal = f"{number(measure.base)} → {number(measure.personal)}"
        explained = survived(card) or "no gain to quantize"
        tokens = finite(part(card, "personal_gain").get("tokens"))
        explained += f"; {tokens:.0f} tokens" if tokens is not None else ""
    key = [
        ("Size", f"{size(artifact.get('bytes'))}<small>{_format(artifact) or NOT_APPLICABLE}</small>"),
        ("Test NLL, base → personal", f"{personal}<small>{explained}</small>"),
        (
            "KL to the merged model",
            f"{significant(verification.get('kl_mean'))}<small>gate {significant(verification.get('kl_gate'))}</small>",
        ),
        ("Same first choice", f"{percent(verification.get('top1'))}<small>gate {percent(verification.get('top1_gate'))}</small>"),
    ]
    tiles = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>\n" for name, value in key)
    return (
        f"<header>\n<h1>{escaped(headline(card))}</h1>\n"
        f'<span class="badge {found.state}">{found.word.capitalize()}</span>\n'
        f'<p class="lead"><code>{escaped(artifact.get("file")) or NOT_APPLICABLE}</code></p>\n'
        f'<dl class="key">\n{tiles}</dl>\n</header>'
    )


def _format(artifact: Mapping[str, Any]) -> str:
    return escaped(f"{clean(artifact.get('format'))} {clean(artifact.get('quant'))}")


def _cautions(card: Mapping[str, Any]) -> str:
    found = cautions(card)
    if not found:
        return ""
    items = "".join(f"<li>{escaped(caution)}</li>\n" for caution in found)
    return f'<section class="alert">\n<h2>Before you trust it</h2>\n<ul>\n{items}</ul>\n</section>'


# What it writes.


def _samples(card: Mapping[str, Any]) -> str:
    found = rows(card, "samples")
    if not found:
        return section("Samples")
    if card.get("user") is None:
        note = '<p class="note">The first texts it was verified on, not chosen.</p>'
        return section("Samples", note, *(_sample(s, "The original") for s in found))
    note = '<p class="note">The first held-out records in order of date, not chosen; the model never saw them.</p>'
    return section("Three voices", note, *(_sample(s, "The user’s own") for s in found))


def _sample(sample: Mapping[str, Any], own: str) -> str:
    meta = ", ".join(filter(None, (escaped(sample.get("task")), escaped(sample.get("date")))))
    roles = (("base", "Base model"), ("personal", "Personal model"), ("user", own))
    said = "".join(f'<div class="said {role}"><h4>{name}</h4>{quoted(sample.get(role))}</div>\n' for role, name in roles)
    return (
        f'<article class="sample">\n<div class="asked"><h3 class="meta">{meta or "Prompt"}</h3>'
        f"{quoted(sample.get('input'))}</div>\n"
        f'<div class="answers">\n{said}</div>\n</article>'
    )


def _tasks(card: Mapping[str, Any]) -> str:
    found = tasks(card)
    if not found:
        return section("Test results by task")
    bodies = []
    for result in found:
        title = f'<th scope="rowgroup" rowspan="{len(result.measures)}">{escaped(result.task)}</th>'
        title += f'<td class="n" rowspan="{len(result.measures)}">{result.n}</td>'
        lines = [f"<tr>{title if i == 0 else ''}{_measure(m)}</tr>" for i, m in enumerate(result.measures)]
        bodies.append("<tbody>\n" + "\n".join(lines) + "\n</tbody>")
    caption = (
        "Records the model never saw; NLL is in nats per token. ↓ less is better, ↑ more is better. "
        "With few records (n), small differences mean little."
    )
    columns = (("Task", "task"), ("n", "n"), ("Measure", "measure"), ("Base", "n"), ("Personal", "n"), ("Change", "n"))
    return section("Test results by task", table(caption, columns, bodies))


def _measure(measure: Measure) -> str:
    arrow = '<span title="less is better">↓</span>' if measure.lower_is_better else '<span title="more is better">↑</span>'
    word = {True: "better", False: "worse", None: ""}[measure.better]
    change = "n/a" if measure.change is None else f"{measure.change:+.3f}".replace("-", "−")
    if measure.change == 0:
        change = "equal"
    return (
        f'<td class="measure">{arrow} {escaped(measure.name)}</td>'
        f'<td class="n">{number(measure.base)}</td><td class="n">{number(measure.personal)}</td>'
        f'<td class="n {word}">{change}{" " + word if word else ""}</td>'
    )


# What it is.


def _artifact(card: Mapping[str, Any]) -> str:
    artifact = part(card, "artifact")
    if not artifact:
        return section("The file")
    weight, types = artifact.get("bytes"), counts(artifact.get("tensor_types"))
    bar = ""
    if types:
        total = sum(n for _, n in types) or 1
        pieces = [(f"c{min(i, _COLOURS - 1)}", name, n) for i, (name, n) in enumerate(types)]
        bar = '<h3>Tensors by type</h3>\n<div class="parts" aria-hidden="true">'
        bar += "".join(f'<div class="{css}" style="width:{100 * n / total:.2f}%"></div>' for css, _, n in pieces)
        bar += '</div>\n<ul class="legend">'
        bar += "".join(f'<li><i class="{css}"></i>{escaped(name)}: {n} tensors</li>' for css, name, n in pieces) + "</ul>"
    pairs = [
        ("File", f"<code>{escaped(artifact.get('file')) or NOT_APPLICABLE}</code>"),
        ("Size", f"{size(weight)} ({number(weight, 0)} bytes)" if (finite(weight) or 0) >= 1000 else size(weight)),
        ("Format", _format(artifact) or NOT_APPLICABLE),
        ("SHA-256", f"<code>{escaped(artifact.get('sha256')) or 'n/a'}</code>"),
    ]
    twice = escaped(artifact.get("double_quantized"))
    if twice:
        pairs.append(("Note", twice[:1].upper() + twice[1:]))
    return section("The file", f'<div class="panel">{definitions("facts", pairs)}\n{bar}</div>')


def _verification(card: Mapping[str, Any]) -> str:
    found = part(card, "verification")
    if found.get("level") in (None, "off"):
        return section("Verification", '<p class="none">Not verified: nothing is known of what this file answers.</p>')
    ids = part(found, "token_ids")
    equal, texts = ids.get("equal"), ids.get("texts")
    share = (finite(equal) or 0.0) / (finite(texts) or 1.0)
    kl, top1 = found.get("kl_mean"), found.get("top1")
    quick = found.get("level") == "quick"
    graphs: list[tuple[str, str, str]] = []
    if not quick:
        graphs = [
            ("KL divergence", significant(kl), gate_svg(kl, found.get("kl_gate"), "KL divergence", significant, True)),
            ("Top-1 agreement", percent(top1), gate_svg(top1, found.get("top1_gate"), "Top-1 agreement", percent, False)),
        ]
    same = f"{number(equal, 0)} of {number(texts, 0)} texts"
    graphs.append(("Equal token ids", same, gate_svg(share, 1.0, "Equal token ids", percent, False)))
    arrived = least_arrived(found)
    if arrived is not None:
        floor = 1 - (finite(found.get("arrival_gate")) or 0.0)
        graphs.append(("Change that arrived", percent(arrived), gate_svg(arrived, floor, "Change that arrived", percent, False)))
    panels = "".join(f'<div class="panel"><h3>{n}</h3><p class="value">{v}</p>{svg}</div>\n' for n, v, svg in graphs)
    reference = escaped(found.get("reference")) or "merged model"
    positions = number(found.get("positions"), 0)
    note = f"The shipped file in its real runtime, against the {reference}, at {positions} answer positions. "
    note += f"NLL per token: file {number(found.get('nll'))}, reference {number(found.get('nll_reference'))}."
    if quick:
        note = f"Quick checks only: the file loads and one forward pass over {positions} answer positions gives numbers."
    worst = worst_tensor(found)
    note += f" {escaped(worst[0].upper() + worst[1:])}." if worst else ""
    return section("Verification", f'<p class="note">{note}</p>', f'<div class="gates">\n{panels}</div>')


# How it came about.


def _training(card: Mapping[str, Any]) -> str:
    found = part(card, "training")
    if not found:
        return section("Training")
    curve = rows(found, "curve")
    plots = [
        (css, curve_svg(curve, found.get("best_step"), width, height)) for css, width, height in (("wide", 860, 320), ("narrow", 360, 280))
    ]
    figure = "".join(f'<div class="{css}">{svg}</div>\n' for css, svg in plots if svg)
    records = ", ".join(f"{n} {escaped(name)}" for name, n in part(found, "records").items() if finite(n) is not None)
    pairs = [*([("Records", records)] if records else []), *((name, escaped(value)) for name, value in training_facts(found))]
    return section(
        "Training",
        f"<figure>\n{figure}</figure>" if figure else '<p class="none">No curve was recorded.</p>',
        _curve_table(curve),
        definitions("facts", pairs) if pairs else "",
    )


def _curve_table(curve: list[Mapping[str, Any]]) -> str:
    if not curve:
        return ""
    columns = (
        ("step", "Step", 0),
        ("epoch", "Epoch", 2),
        ("train_loss", "Training loss", 3),
        ("validation_nll", "Validation NLL", 3),
    )
    lines = ("".join(f'<td class="n">{number(point.get(key), digits)}</td>' for key, _, digits in columns) for point in curve)
    body = "<tbody>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</tbody>"
    content = table("Loss over the evaluations, in nats per token", [(name, "n") for _, name, _ in columns], [body])
    return f"<details><summary>The curve in numbers</summary>{content}</details>"


def _augmentation(card: Mapping[str, Any]) -> str:
    found = part(card, "augmentation")
    if not found:
        return section("Synthetic data")
    facts = [f"Written by <strong>{escaped(found.get('teacher')) or 'an unnamed teacher'}</strong>"]
    facts += [f"{number(found['requests'], 0)} requests"] if finite(found.get("requests")) is not None else []
    facts += [duration(found["seconds"])] if finite(found.get("seconds")) is not None else []
    kept, reasons = finite(found.get("kept")) or 0.0, counts(found.get("reasons"))
    rejected = number(found.get("rejected"), 0)
    entries = [("Kept", kept, number(found.get("kept"), 0), True)]
    entries += [(f"Rejected: {reason}", n, str(n), False) for reason, n in reasons] or [
        ("Rejected", finite(found.get("rejected")) or 0.0, rejected, False)
    ]
    advice = ""
    if embedded_teacher(card):
        words = TEACHER_ADVICE.replace(TEACHER_OPTIONS, f"<code>{TEACHER_OPTIONS}</code>")
        advice = f'<div class="alert"><p>The teacher was the small model that ships. {words}</p></div>'
    note = f'<p class="note">{", ".join(facts)}; {number(found.get("kept"), 0)} kept, {rejected} rejected.</p>'
    return section("Synthetic data", note, f'<div class="panel">{bars(entries)}</div>', advice)


def _stages(card: Mapping[str, Any]) -> str:
    found = rows(card, "stages")
    if not found:
        return section("Time by stage")
    seconds = [0.0 if s.get("reused") else finite(s.get("seconds")) or 0.0 for s in found]
    shown = ["reused" if s.get("reused") else duration(s.get("seconds")) for s in found]
    stages = bars((clean(s.get("name")), length, words, True) for s, length, words in zip(found, seconds, shown, strict=True))
    return section("Time by stage", f'<div class="panel">{stages}</div>', f'<p class="note">{duration(sum(seconds))} in all.</p>')


def _next(card: Mapping[str, Any]) -> str:
    steps = next_steps(card)
    return section(
        "What now",
        definitions("next", ((escaped(name), f"<code>{escaped(command)}</code>") for name, command in steps)) if steps else "",
    )


def _provenance(card: Mapping[str, Any]) -> str:
    base = part(card, "base")
    pairs = [
        ("Base", escaped(base.get("name")) or NOT_APPLICABLE),
        ("Base SHA-256", f"<code>{escaped(base.get('sha256')) or 'n/a'}</code>"),
    ]
    if card.get("adapter"):
        pairs.append(("Adapter", f"<code>{escaped(card['adapter'])}</code>"))
    pairs += [(escaped(name), escaped(version)) for name, version in part(card, "versions").items()]
    made = escaped(card.get("created"))
    footer = f"<footer>{'Made ' + made + '. ' if made else ''}This page quotes the user and loads nothing from anywhere.</footer>"
    return section("Base and versions", definitions("facts", pairs)) + "\n" + footer
