"""``cdcda bench``: run, predict, print."""

from __future__ import annotations

import argparse
import json
from statistics import median

from cdcda_export.card_values import duration, percent, significant, size
from cdcda_export.errors import ConfigError
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import write_json
from cdcda_export.progress import choose_progress
from cdcda_mobile.chat import find_artifact, read_artifact
from cdcda_mobile.phone.bench import CROWDED, PROTOCOLS, Bench, bench, fit_of, predicted
from cdcda_mobile.phone.classes import Phone, get_phone, phones, sources
from cdcda_mobile.phone.predict import Prediction, Speed


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code: 1 where the model does not go into the memory.

    Raises:
        ConfigError: nothing is asked for.
        CdcdaError: the artifact cannot be used, or the run says nothing.
    """
    if arguments.list_phones:
        print(json.dumps(_as_json(), indent=2) if arguments.json else _list_phones())
        return 0
    if arguments.artifact is None:
        raise ConfigError("Name an artifact (runs/42) to measure, or give --list-phones.")
    phone = get_phone(arguments.phone) if arguments.phone else None
    directory = find_artifact(arguments.artifact)
    artifact = read_artifact(directory)
    progress = choose_progress(arguments.quiet or arguments.json)
    steps = arguments.repeats + 1 + round(arguments.sustained * 6)
    progress.start(f"measuring {directory}", steps, "tests")
    found = bench(
        artifact,
        arguments.protocol,
        arguments.repeats,
        arguments.sustained * 60,
        phone,
        arguments.threads,
        lambda step: progress.advance(note=step),
    )
    progress.done()
    out = directory.parent / "bench" / f"{directory.name}-{arguments.phone or 'host'}-{arguments.protocol}.json"
    out.parent.mkdir(mode=0o700, exist_ok=True)
    prediction = predicted(phone, artifact, arguments.protocol) if phone else None
    fit = fit_of(phone, GgufFile(artifact.files["model"]), found.bytes, arguments.context) if phone and artifact.format != "onnx" else None
    content = found.as_json() | {"predicted": _prediction_json(prediction), "fit": vars(fit) if fit else None}
    write_json(out, content)
    if arguments.json:
        print(json.dumps(content, indent=2))
    else:
        print(
            "\n".join(
                [
                    *_measured_lines(found, phone),
                    *(_predicted_lines(phone, prediction, fit.verdict if fit else None) if phone else []),
                    str(out),
                ]
            )
        )
    return 0 if found.measured else 1


def _measured_lines(found: Bench, phone: Phone | None) -> list[str]:
    tests = PROTOCOLS[found.protocol]
    like = ""
    if phone:
        memory = f"{size(found.memory)} of memory ({found.held_by})" if found.memory else "memory unlimited, its own is not known"
        like = f" within the limits of a {phone.name}: {memory}, {found.threads} of its {phone.soc.big_cores} fast cores"
    lines = [
        f"{found.artifact.name} ({found.format} {found.quant}, {size(found.bytes)}) on THIS MACHINE{like or f', {found.threads} threads'}"
    ]
    if found.measured is None:
        return [*lines, "  out of memory: the model does not load, or its cache has no room."]
    got = found.measured
    lines += [
        f"  load            {duration(got.load)}",
        f"  first token     {duration(got.first_token)} after a prompt of {tests.prompt} tokens",
        f"  prefill         {_spread(got.prefill)} (pp{tests.prompt})",
        f"  decode          {_spread(got.decode)} (tg{tests.answer}{' behind the prompt' if tests.chained else ''})",
        f"  slow tokens     one in ten takes more than {1000 * got.token_p90:.1f} ms",
    ]
    if got.sustained:
        lines.append(
            f"  sustained       {got.sustained[0]:.1f} tok/s at first, {got.sustained[-1]:.1f} at the end of {len(got.sustained) * 10} s"
        )
    lines.append(f"  peak memory     {size(got.peak_rss)}, Python's 40 MB included")
    if got.crowded > CROWDED:
        lines.append(
            f"  NOT TO BE USED: other processes had its cores for {percent(got.crowded)} of the time; run it again on a quiet machine."
        )
    return lines


def _spread(values: list[float]) -> str:
    return f"{median(values):.1f} tok/s ({min(values):.1f} to {max(values):.1f} in {len(values)} repeats)"


def _predicted_lines(phone: Phone, prediction: Prediction | None, verdict: str | None) -> list[str]:
    lines = [f"PREDICTED for a {phone.name} ({phone.soc.name})"]
    if verdict:
        lines.append(f"  memory          {verdict} (an app may take {size(phone.memory_budget.value)})")
    if prediction is None:
        return [*lines, "  speed           not calibrated for ONNX"]
    basis = "other models were measured on this chip" if prediction.measured else "nobody measured this chip: from its memory and clocks"
    return [
        *lines,
        f"  decode          {_range(prediction.decode)}",
        f"  prefill         {_range(prediction.prefill)}",
        f"  basis           {basis}",
    ]


def _range(speed: Speed | None) -> str:
    return (
        "unknown"
        if speed is None
        else f"{significant(speed.expected)} tok/s, 90 % between {significant(speed.low)} and {significant(speed.high)}"
    )


def _prediction_json(prediction: Prediction | None) -> dict[str, object] | None:
    if prediction is None:
        return None
    return {
        "decode": vars(prediction.decode) if prediction.decode else None,
        "prefill": vars(prediction.prefill) if prediction.prefill else None,
        "measured_chip": prediction.measured,
    }


def _list_phones() -> str:
    rows = [("PHONE", "NAME", "CHIP", "CORES", "ISA", "RAM", "FOR AN APP", "GB/S")]
    for phone in phones().values():
        soc = phone.soc
        isa = "?" if soc.dotprod.value is None else "i8mm" if soc.i8mm.value else "dotprod" if soc.dotprod.value else "v8.0"
        budget = size(phone.memory_budget.value) if phone.memory_budget.value else "unknown"
        cores = f"{soc.big_cores} of {soc.cores}"
        rows.append((phone.key, str(phone.name), str(soc.name), cores, isa, f"{phone.ram_gb} GB", budget, str(soc.bandwidth_gb_s)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _as_json() -> dict[str, object]:
    from dataclasses import asdict

    return {
        "phones": {key: asdict(phone) for key, phone in phones().items()},
        "sources": {key: vars(page) for key, page in sources().items()},
    }
