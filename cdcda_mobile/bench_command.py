"""``cdcda bench``: run, predict, print."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdcda_export.artifact import Artifact
from cdcda_export.card_values import duration, size
from cdcda_export.errors import ConfigError
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import write_json
from cdcda_export.progress import choose_progress, progress_of_bytes
from cdcda_export.runtime import cpu_threads
from cdcda_mobile.chat import find_artifact, read_artifact
from cdcda_mobile.phone.bench import PROTOCOLS, Bench, Fit, Measured, Tests, bench, fit_of, get_protocol, predicted, spread_of
from cdcda_mobile.phone.classes import Phone, get_phone, phones, sources
from cdcda_mobile.phone.measure import windows_of
from cdcda_mobile.phone.predict import Prediction, Speed

if TYPE_CHECKING:
    from cdcda_mobile.phone.on_device import OnDevice


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code: 1 where the model does not go into the memory.

    Raises:
        ConfigError: nothing is asked for.
        CdcdaError: the artifact cannot be used, or the run says nothing.
    """
    if arguments.list_phones:
        print(json.dumps(_as_json(), indent=2) if arguments.json else _list_phones())
        return 0
    _check_flags(arguments)
    if arguments.table or arguments.recommend:
        from cdcda_mobile.tradeoff_command import show_recommendation, show_table

        return show_recommendation(arguments) if arguments.recommend else show_table(arguments)
    phone = get_phone(arguments.phone) if arguments.phone else None
    # Phones run llama.cpp: of a run's artifacts the newest that they can.
    directory = find_artifact(arguments.artifact, () if arguments.device is None and not arguments.arm else ("gguf",))
    artifact = read_artifact(directory)
    if arguments.arm:
        from cdcda_mobile.emulated_command import show_emulated

        return show_emulated(arguments, artifact, directory)
    measure = _on_host if arguments.device is None else _on_device
    lines, where, content, measured = measure(arguments, artifact, directory, phone)
    prediction = predicted(phone, artifact, arguments.protocol) if phone else None
    weights = sum(path.stat().st_size for path in artifact.files.values())
    fit = fit_of(phone, GgufFile(artifact.files["model"]), weights, arguments.context) if phone and artifact.format != "onnx" else None
    content |= {"class": phone.key if phone else None, "predicted": _prediction_json(prediction), "fit": vars(fit) if fit else None}
    out = directory.parent / "bench" / f"{directory.name}-{where}-{arguments.protocol}.json"
    write_json(out, content)
    if arguments.json:
        print(json.dumps(content, indent=2))
    else:
        told = _predicted_lines(phone, prediction, fit, PROTOCOLS[arguments.protocol]) if phone else []
        print("\n".join([*lines, *told, str(out)]))
    return 0 if measured else 1


_OUT_OF_MEMORY = "  out of memory: the model does not load, or its cache has no room."
Found = tuple[list[str], str, dict[str, Any], bool]  # lines to print, where it ran, everything as JSON, whether there was memory


def _check_flags(arguments: argparse.Namespace) -> None:
    """Refuse what says too little or too much.

    Raises:
        ConfigError: it does.
    """
    for flag, value in (("--device", arguments.device), ("--arm", arguments.arm)):
        if value and Path(value).exists():
            raise ConfigError(f"The artifact stands before {flag}: cdcda bench {value} {flag}.")
    if arguments.artifact is None:
        raise ConfigError("Name an artifact (runs/42) to measure, or give --list-phones.")
    asked = {
        "--arm": bool(arguments.arm),
        "--device": arguments.device is not None,
        "--table": arguments.table,
        "--recommend": arguments.recommend,
    }
    given = [flag for flag, is_given in asked.items() if is_given]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other.")
    if arguments.min_tok_s and not arguments.recommend:
        raise ConfigError("--min-tok-s belongs to --recommend; without it no artifact is picked.")
    if arguments.context < 1 or not 0 <= arguments.min_tok_s < math.inf:
        raise ConfigError("--context has to be at least 1, --min-tok-s at least 0.")
    get_protocol(arguments.protocol, arguments.repeats, arguments.sustained, arguments.threads)
    if arguments.arm and (arguments.phone or arguments.sustained or arguments.threads):
        raise ConfigError("--arm compares numbers, not speeds: leave out --phone, --sustained and --threads.")


def _on_host(arguments: argparse.Namespace, artifact: Artifact, directory: Path, phone: Phone | None) -> Found:
    progress = choose_progress(arguments.quiet or arguments.json)
    progress.start(f"measuring {directory}", arguments.repeats + 1 + windows_of(arguments.sustained * 60), "tests")
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
    return _host_lines(found, phone), arguments.phone or "host", found.as_json(), found.measured is not None


def _on_device(arguments: argparse.Namespace, artifact: Artifact, directory: Path, phone: Phone | None) -> Found:
    from cdcda_engine.build import build_engine
    from cdcda_mobile.phone.device import connect
    from cdcda_mobile.phone.on_device import bench_on_device, plan_for

    progress = choose_progress(arguments.quiet or arguments.json)
    sustained = arguments.sustained * 60
    plan = plan_for(connect(arguments.device), artifact, arguments.protocol, arguments.repeats, sustained, arguments.threads)
    engine = build_engine(progress)
    steps = 2 * arguments.repeats
    sent = progress_of_bytes(progress, "to the phone", artifact.files["model"].stat().st_size)

    def step(note: str) -> None:
        nonlocal steps
        if steps:
            progress.done()
            progress.start("measuring on the phone", steps, "tests")
            steps = 0
        progress.advance(note=note)

    found = bench_on_device(plan, engine, sent, step)
    progress.done()
    model = re.sub(r"[^\w-]+", "-", found.phone["model"]) or "phone"
    return _device_lines(found), f"device-{model}", found.as_json(), found.measured is not None


def _device_lines(found: OnDevice) -> list[str]:
    told, before, after = found.phone, found.before, found.after
    head = (
        f"{found.artifact.name} (gguf {found.quant}, {size(found.bytes)}) ON THE PHONE: {told['manufacturer']} {told['model']}, "
        f"{told['soc'] or 'chip not said'}, Android {told['android']}; engine {found.variant}, cores {', '.join(map(str, found.cores))}"
    )
    if found.measured is None:
        return [head, _OUT_OF_MEMORY]
    lines = [head, *_speed_lines(found.measured, PROTOCOLS[found.protocol]), f"  peak memory     {size(found.measured.peak_rss)}"]
    if before.temperature is not None and after.temperature is not None:
        lines.append(f"  battery         {before.temperature:.1f} °C before, {after.temperature:.1f} °C after; {after.battery} % left")
    if found.unusable:
        lines.append(f"  NOT TO BE USED: {found.unusable}.")
    elif after.charging and found.measured.sustained:
        lines.append("  charging: a phone on a charger is warmer than one in a hand")
    return lines


def _host_lines(found: Bench, phone: Phone | None) -> list[str]:
    like = ""
    if phone:
        memory = f"{size(found.memory)} of memory ({found.held_by})" if found.memory else "memory unlimited, its own is not known"
        cores = f"{found.threads} threads for its {phone.soc.big_cores} fast cores"
        fewer = ", all that this machine has" if found.threads < phone.soc.big_cores and found.threads == cpu_threads() else ""
        like = f" within the limits of a {phone.name}: {memory}, {cores}{fewer}"
    head = (
        f"{found.artifact.name} ({found.format} {found.quant}, {size(found.bytes)}) on THIS MACHINE{like or f', {found.threads} threads'}"
    )
    if found.measured is None:
        return [head, _OUT_OF_MEMORY]
    lines = [head, *_speed_lines(found.measured, PROTOCOLS[found.protocol])]
    lines.append(f"  peak memory     {size(found.measured.peak_rss)}, Python itself included")
    if found.unusable:
        lines.append(f"  NOT TO BE USED: {found.unusable}.")
    return lines


def _speed_lines(got: Measured, tests: Tests) -> list[str]:
    lines = [f"  load            {duration(got.load)}"] if got.load is not None else []
    lines += [
        f"  first token     {duration(got.first_token)} after a prompt of {tests.prompt} tokens",
        f"  prefill         {_spread(got.prefill)} (pp{tests.prompt})",
        f"  decode          {_spread(got.decode)} (tg{tests.answer}{' behind the prompt' if tests.chained else ''})",
    ]
    if got.token_p90 is not None:
        lines.append(f"  slow tokens     one in ten takes more than {1000 * got.token_p90:.1f} ms")
    if got.sustained:
        lines.append(f"  sustained       {got.sustained[0]:.1f} tok/s at first, {got.sustained[-1]:.1f} at the end")
    return lines


def _spread(values: list[float]) -> str:
    one = spread_of(values)
    return f"{one.median:.1f} tok/s, p90 {one.p90:.1f} ({one.low:.1f} to {one.high:.1f} in {one.repeats} repeats)"


def _predicted_lines(phone: Phone, prediction: Prediction | None, fit: Fit | None, tests: Tests) -> list[str]:
    lines = [f"PREDICTED for a {phone.name} ({phone.soc.name})"]
    if fit:
        allowed = f"; an app may take {size(fit.budget)}" if fit.budget is not None else ""
        lines.append(f"  memory          {fit.verdict}: needs {size(fit.needed)}{allowed}")
    if prediction is None:
        return [*lines, "  speed           not calibrated for ONNX and for adapters at run time"]
    lines += [f"  decode          {_range(prediction.decode)}", f"  prefill         {_range(prediction.prefill)}"]
    if prediction.decode and prediction.prefill:
        first = tests.prompt / prediction.prefill.expected + 1 / prediction.decode.expected
        lines.append(f"  first token     {duration(first)} after a prompt of {tests.prompt} tokens")
    known = "other models were measured on this chip, with six threads"
    others = "from the chip's memory and clocks: too little was measured on it"
    return [*lines, f"  basis           {known if prediction.measured else others}"]


def _range(speed: Speed | None) -> str:
    if speed is None:
        return "unknown"
    expected, low, high = speed.texts()
    return f"{expected} tok/s, 90 % between {low} and {high}"


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
