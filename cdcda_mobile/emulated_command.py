"""``cdcda bench ARTIFACT --arm``: the phone's own engine executes the artifact here, and its arithmetic is held to the artifact's gate."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cdcda_engine.build import build_engine
from cdcda_export.artifact import Artifact
from cdcda_export.bundle import read_bundle
from cdcda_export.card_values import finite, part
from cdcda_export.chat_template import template_of
from cdcda_export.errors import ConfigError, FileError
from cdcda_export.gates import get_gate
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import write_json
from cdcda_export.progress import choose_progress
from cdcda_export.quantization import quant_of_base
from cdcda_export.verify import neutral_texts
from cdcda_mobile.history import records_in
from cdcda_mobile.phone.bench import this_machine
from cdcda_mobile.phone.emulated import STEPS, Agreement, check_variant, emulate, qemu
from cdcda_mobile.tasks import get_task

_RECORDS, _NEUTRAL, _WORDS = 8, 4, 12


def show_emulated(arguments: argparse.Namespace, artifact: Artifact, directory: Path) -> int:
    """Execute, compare, print and write; 1 where the phone's arithmetic is outside the gate.

    Raises:
        ConfigError: it is no merged GGUF, or QEMU is not there.
        FileError: the user's held-out records are damaged.
        CdcdaError: the engine cannot be built or failed.
    """
    if artifact.format != "gguf":
        raise ConfigError(f"The phone's engine is compared on merged GGUF files, and {directory} is {artifact.format}.")
    check_variant(arguments.arm)  # all of it said before twenty minutes of compiling
    qemu()
    turns, asked = _turns(directory)
    progress = choose_progress(arguments.quiet or arguments.json)
    engine = build_engine(progress)
    file = GgufFile(artifact.files["model"])
    gate = finite(part(read_bundle(directory), "verification").get("kl_gate"))
    if gate is None:  # not verified in full: the measured one of its quantization
        gate = get_gate(quant_of_base(file).name if artifact.quant == "base" else artifact.quant).kl
    template = template_of(file)
    prompts = [template.prompt(turn) for turn in turns]
    progress.start(f"executing {directory.name} as a phone does", STEPS, "steps")
    found = emulate(file.path, engine, arguments.arm, prompts, lambda note: progress.advance(note=note))
    progress.done()
    passed = max(found.repacked.kl, found.plain.kl) <= gate
    out = directory.parent / "bench" / f"{directory.name}-{arguments.arm}.json"
    content = {"artifact": str(artifact.main), **asdict(found), "prompts": asked, "gate": gate, "passed": passed, **this_machine()}
    write_json(out, content)
    if arguments.json:
        print(json.dumps(content, indent=2))
        return 0 if passed else 1
    print(f"{directory.name} under QEMU as on a phone ({found.variant} on {found.cpu}), {found.positions} positions against this machine")
    print(f"  repacked kernels  {_said(found.repacked)}")
    print(f"  plain kernels     {_said(found.plain)}")
    print(f"  greedy, repacked  {_same(found.equal, found.asked)}")
    print(f"  greedy, plain     {_same(found.equal_plain, found.asked)}")
    print(f"  asked             {len(prompts)} prompts of {asked['source']}")
    print(f"  gate              {gate:.4f}: {'passed' if passed else 'FAILED, this file must not go onto such a phone'}")
    print(out)
    return 0 if passed else 1


def _turns(directory: Path) -> tuple[list[str], dict[str, object]]:
    """Return what is asked, and where it is from: the user's own held-out records where there are some, else the neutral text.

    Raises:
        FileError: the records are damaged.
    """
    path = directory.parent / "history" / "test.jsonl"
    try:
        records = records_in(path)[:_RECORDS] if path.exists() else []
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} is damaged; export the user again with --redo history.") from error
    if records:
        turns = [get_task(record.task).prompt(record.input) for record in records]
        return turns, {"source": str(path), "records": [record.id for record in records]}
    return [" ".join(text.split()[:_WORDS]) for text in neutral_texts()[:_NEUTRAL]], {"source": "the neutral text", "records": []}


def _same(equal: Sequence[int], asked: Sequence[int]) -> str:
    each = ", ".join(f"{a} of {b}" for a, b in zip(equal, asked, strict=True))
    return f"{sum(equal)} of {sum(asked)} tokens the same from the start ({each})"


def _said(one: Agreement) -> str:
    return f"KL {one.kl:.5f}, same most likely token at {one.same_top:.1%}"
