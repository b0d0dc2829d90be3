"""``cdcda bench ARTIFACT --arm``: the phone's own engine executes the artifact here, and its arithmetic is held to the artifact's gate."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from cdcda_engine.build import build_engine
from cdcda_export.artifact import Artifact
from cdcda_export.bundle import read_bundle
from cdcda_export.card_values import finite, part
from cdcda_export.chat_template import template_of
from cdcda_export.errors import ConfigError
from cdcda_export.gates import get_gate
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import write_json
from cdcda_export.progress import choose_progress
from cdcda_export.quantization import quant_of_base
from cdcda_export.verify import neutral_texts
from cdcda_mobile.phone.emulated import Agreement, check_variant, emulate, qemu

_PROMPTS, _WORDS = 4, 12


def show_emulated(arguments: argparse.Namespace, artifact: Artifact, directory: Path) -> int:
    """Execute, compare, print and write; 1 where the phone's arithmetic is outside the gate.

    Raises:
        ConfigError: it is no merged GGUF, or QEMU is not there.
        CdcdaError: the engine cannot be built or failed.
    """
    if artifact.format != "gguf":
        raise ConfigError(f"The phone's engine is compared on merged GGUF files, and {directory} is {artifact.format}.")
    check_variant(arguments.arm)  # both said before twenty minutes of compiling
    qemu()
    progress = choose_progress(arguments.quiet or arguments.json)
    engine = build_engine(progress)
    file = GgufFile(artifact.files["model"])
    gate = finite(part(read_bundle(directory), "verification").get("kl_gate"))
    if gate is None:  # not verified in full: the measured one of its quantization
        gate = get_gate(quant_of_base(file).name if artifact.quant == "base" else artifact.quant).kl
    template = template_of(file)
    prompts = [template.prompt(" ".join(text.split()[:_WORDS])) for text in neutral_texts()[:_PROMPTS]]
    progress.start(f"executing {directory.name} as a phone does", 4, "steps")
    found = emulate(file.path, engine, arguments.arm, prompts, lambda note: progress.advance(note=note))
    progress.done()
    passed = max(found.repacked.kl, found.plain.kl) <= gate
    out = directory.parent / "bench" / f"{directory.name}-{arguments.arm}.json"
    content = {**asdict(found), "gate": gate, "passed": passed}
    write_json(out, content)
    if arguments.json:
        print(json.dumps(content, indent=2))
        return 0 if passed else 1
    print(f"{directory.name} under QEMU as on a phone ({found.variant} on {found.cpu}), {found.positions} positions against this machine")
    print(f"  repacked kernels  {_said(found.repacked)}")
    print(f"  plain kernels     {_said(found.plain)}")
    print(f"  greedy tokens     {', '.join(f'{a} of {b}' for a, b in zip(found.equal, found.asked, strict=True))} the same from the start")
    print(f"  gate              {gate:.4f}: {'passed' if passed else 'FAILED, this file must not go onto such a phone'}")
    print(out)
    return 0 if passed else 1


def _said(one: Agreement) -> str:
    return f"KL {one.kl:.5f}, same most likely token at {one.same_top:.1%}"
