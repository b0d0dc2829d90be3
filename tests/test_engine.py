"""The phone engine: which build runs where, what Android demands of its programs, and that they compute, under QEMU."""

from __future__ import annotations

import csv
import json
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from cdcda_engine.build import BENCH, PROGRAMS, SERVER
from cdcda_engine.variants import VARIANTS, best_variant, features_of
from cdcda_export.errors import ConfigError, ExportError, FileError
from cdcda_export.export import AdapterJob, export_adapter
from cdcda_export.progress import Silent
from cdcda_export.recipe import ExportConfig
from cdcda_mobile import emulated_command
from cdcda_mobile.chat import read_artifact
from cdcda_mobile.cli import main
from cdcda_mobile.history import Record
from cdcda_mobile.phone import emulated
from cdcda_mobile.phone.device import connect
from cdcda_mobile.phone.emulated import CPUS, agreement_of, emulate, qemu, served
from cdcda_mobile.phone.on_device import bench_on_device, plan_for
from cdcda_mobile.tasks import get_task
from fake_adb import FakePhone, phones

_AARCH64, _X86_64 = 183, 62
_PT_LOAD, _PT_INTERP = 1, 3
ASKED = ("-p", "16", "-n", "2", "-r", "1", "-t", "2", "-o", "json")
# A processor that lacks what the variant is for.
TOO_OLD = {"arm64-dotprod": "cortex-a53", "arm64-i8mm": "cortex-a76"}


@pytest.fixture(scope="session")
def tiny(llama_base: Path, llama_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny artifact with 8-bit weights: what dotprod and i8mm are for."""
    job = AdapterJob(llama_adapter, llama_base, workspace=tmp_path_factory.mktemp("tiny"), config=ExportConfig(quant="q8_0"))
    export_adapter(job, Silent())
    return job.directory


# Which one.


def test_a_phone_gets_the_fastest_build_that_all_its_cores_can_run() -> None:
    assert best_variant("arm64-v8a", {"fp", "asimd"}) == "arm64-v8"
    assert best_variant("arm64-v8a", {"asimddp", "asimdhp"}) == "arm64-dotprod"
    assert best_variant("arm64-v8a", {"asimddp", "asimdhp", "i8mm"}) == "arm64-i8mm"
    assert best_variant("arm64-v8a", {"i8mm"}) == "arm64-v8"
    assert best_variant("x86_64", set()) == "x86_64"
    with pytest.raises(ConfigError, match="this phone has armeabi-v7a; 32-bit phones are not supported"):
        best_variant("armeabi-v7a", set())


def test_what_one_core_lacks_the_phone_lacks() -> None:
    big, little = "processor\t: 1\nFeatures\t: fp asimddp i8mm\n", "processor\t: 0\nFeatures\t: fp asimddp\n"
    assert features_of(f"{little}\n{big}") == {"fp", "asimddp"}
    assert features_of("flags : sse") == set()


# What Android demands.


def _elf(path: Path) -> tuple[int, list[tuple[int, int]]]:
    """Return machine and (type, alignment) of the segments."""
    data = path.read_bytes()
    assert data[:5] == b"\x7fELF\x02"
    machine = struct.unpack_from("<H", data, 18)[0]
    offset = struct.unpack_from("<Q", data, 32)[0]
    size, count = struct.unpack_from("<HH", data, 54)
    headers = [offset + n * size for n in range(count)]
    segments = [(struct.unpack_from("<I", data, at)[0], struct.unpack_from("<Q", data, at + 48)[0]) for at in headers]
    return machine, segments


@pytest.mark.parametrize("variant", VARIANTS)
def test_programs_are_static_stripped_and_aligned_for_pages_of_16_kb(variant: str, phone_engine: Path) -> None:
    for program in PROGRAMS:
        path = phone_engine / variant / program
        machine, segments = _elf(path)
        assert machine == (_X86_64 if variant == "x86_64" else _AARCH64)
        assert _PT_INTERP not in {kind for kind, _ in segments}
        assert min(align for kind, align in segments if kind == _PT_LOAD) >= 16384
        assert b".symtab" not in path.read_bytes()
        assert path.stat().st_size < 16_000_000


def test_no_path_of_the_machine_that_compiled_it_is_in_it(phone_engine: Path) -> None:
    for variant in VARIANTS:
        assert b"/engines/" not in (phone_engine / variant / SERVER).read_bytes()


def test_the_licences_of_all_that_is_in_it_lie_beside_it(phone_engine: Path) -> None:
    found = {path.stem: path.read_text(errors="replace") for path in (phone_engine / "licences").iterdir()}
    assert {"llama.cpp", "musl", "libcxx", "libcxxabi", "libunwind", "compiler-rt", "cpp-httplib", "jsonhpp"} <= set(found)
    assert "MIT" in found["llama.cpp"] and "musl" in found["musl"]


def test_the_allowed_system_calls_are_those_of_all_releases(shared_data: Path) -> None:
    table = json.loads(files("cdcda_engine").joinpath("app_syscalls.json").read_text())
    with (shared_data / "android" / "app_syscalls.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for arch in ("arm64", "x86_64"):
        assert table[arch] == sorted(r["syscall"] for r in rows if r[f"{arch}_apis"].split() == [str(api) for api in table["apis"]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_loading_and_answering_makes_no_system_call_that_kills_an_app(variant: str, phone_engine: Path, tiny: Path, tmp_path: Path) -> None:
    log = tmp_path / "strace"
    arch = "x86_64" if variant == "x86_64" else "arm64"
    emulator = shutil.which("qemu-x86_64-static") if arch == "x86_64" else qemu()
    traced = [str(emulator), "-strace", "-cpu", CPUS.get(variant, "Nehalem"), str(phone_engine / variant / SERVER)]
    command = ["sh", "-c", f'exec "$0" "$@" 2> {log}', *traced]
    with served([*command, "-m", str(tiny / "model.gguf"), "-c", "256", "-t", "2", "--parallel", "1"], tmp_path / "socket") as ask:
        assert ask({"prompt": [20, 21, 22], "n_predict": 4, "temperature": 0.0, "return_tokens": True})["tokens"]
    said = log.read_text(errors="replace")
    made = set(re.findall(r"^\d+ (\w+)\(", said, re.MULTILINE))
    assert "Unknown syscall" not in said
    allowed = set(json.loads(files("cdcda_engine").joinpath("app_syscalls.json").read_text())[arch])
    assert {"openat", "futex", "accept4"} & made and len(made) > 15
    assert made <= allowed, made - allowed


# That they compute.


@pytest.mark.parametrize("variant", CPUS)
def test_a_build_computes_where_it_may_and_dies_where_it_may_not(variant: str, phone_engine: Path, tiny: Path) -> None:
    command = [str(phone_engine / variant / BENCH), "-m", str(tiny / "model.gguf"), *ASKED]
    done = subprocess.run([qemu(), "-cpu", CPUS[variant], *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 2, done.stderr
    if variant in TOO_OLD:
        done = subprocess.run([qemu(), "-cpu", TOO_OLD[variant], *command], capture_output=True, text=True, check=False)
        assert done.returncode != 0 and "signal 4" in done.stderr


def test_the_build_for_emulators_computes_here(phone_engine: Path, tiny: Path) -> None:
    command = [str(phone_engine / "x86_64" / BENCH), "-m", str(tiny / "model.gguf"), *ASKED]
    assert len(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)) == 2


def test_the_tiny_model_gives_on_arm_what_it_gives_here(
    phone_engine: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a user's run, of which the held-out records are asked; with and without the kernels that repack."""
    run, commands = tmp_path / "42", list[list[str]]()
    shutil.copytree(tiny, run / tiny.name)
    records = [Record(f"r{n}", "2024", "headline", f"the thing number {n}", "x") for n in range(10)]
    (run / "history").mkdir()
    (run / "history" / "test.jsonl").write_text("".join(json.dumps(vars(record)) + "\n" for record in records))
    start = emulated.served

    def served(command: list[str], path: Path) -> Any:
        commands.append(command)
        return start(command, path)

    monkeypatch.setattr(emulated, "served", served)
    monkeypatch.setattr("cdcda_mobile.emulated_command.build_engine", lambda progress: phone_engine)
    assert main(["bench", str(run), "--arm", "--quiet"]) == 0
    told = capsys.readouterr().out
    found = json.loads((run / "bench" / f"{tiny.name}-arm64-i8mm.json").read_text())
    assert found["passed"] and found["repacked"]["kl"] <= found["gate"] and found["positions"] >= 200
    assert found["repacked"]["same_top"] > 0.9 and found["versions"]["python"] and found["host"]["cores"] >= 1
    assert ["--no-repack" in command for command in commands] == [False, True]
    assert found["prompts"]["records"] == [f"r{n}" for n in range(8)] and len(found["asked"]) == 8
    for key, name in (("equal", "repacked"), ("equal_plain", "plain")):
        assert sum(found[key]) > 0.5 * sum(found["asked"])
        total = rf"{sum(found[key])} of {sum(found['asked'])} tokens the same from the start"
        assert re.search(rf"greedy, {name} +{total}", told)
    assert f"8 prompts of {run}/history/test.jsonl" in told


def test_without_held_out_records_the_neutral_text_is_asked(tmp_path: Path) -> None:
    turns, asked = emulated_command._turns(tmp_path / "gguf-q8_0")
    assert len(turns) == 4 and asked == {"source": "the neutral text", "records": []}
    (tmp_path / "history").mkdir()
    (tmp_path / "history" / "test.jsonl").write_text('{"id": "1"\n')
    with pytest.raises(FileError, match="test.jsonl is damaged; export the user again with --redo history"):
        emulated_command._turns(tmp_path / "gguf-q8_0")
    record = Record("1", "2024", "headline", "A long night", "x")
    (tmp_path / "history" / "test.jsonl").write_text(json.dumps(vars(record)))
    assert emulated_command._turns(tmp_path / "gguf-q8_0")[0] == [get_task("headline").prompt("A long night")]


@pytest.mark.model
def test_the_real_model_gives_on_arm_what_it_gives_here(phone_engine: Path, real_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A little of what ``cdcda bench --arm`` asks: under QEMU it takes its time."""
    for name, value in (("_CONTEXT", 32), ("_CHUNKS", 1), ("_ANSWER", 4)):
        monkeypatch.setattr(emulated, name, value)
    prompts = ["The sky is", "In the year 1900", "Dear friends,", "A recipe for bread:"]
    found = emulate(real_base, phone_engine, "arm64-i8mm", prompts, lambda note: None)
    assert max(found.repacked.kl, found.plain.kl) < 0.01
    for same in (found.equal, found.equal_plain):
        assert sum(equal == asked for equal, asked in zip(same, found.asked, strict=True)) >= 3


def test_the_phone_on_the_cable_runs_the_real_engine(
    phone_engine: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phone = FakePhone(tmp_path / "phone")
    with phones(monkeypatch, phone):
        plan = plan_for(connect(), read_artifact(tiny), "pocketpal", 2, 0.0, 0)
        found = bench_on_device(plan, phone_engine, lambda count: None, lambda note: None)
    assert found.measured is not None
    assert found.variant == "arm64-i8mm" and len(found.measured.decode) == 2 and min(found.measured.decode) > 0
    assert found.raw[1]["n_depth"] == 256 and found.measured.peak_rss > 1_000_000
    assert list(phone.local("/data/local/tmp").iterdir()) == []


def test_the_last_line_of_the_comparison_counts() -> None:
    said = """chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
   1      14.5894 ±    9.4458       0.02153 ±    0.01637       0.00327 ±    0.00035     1.374 ±  0.271 %    100.000 ±  0.000 %
   2      33.5313 ±   21.1266      -0.01527 ±    0.01510       0.00330 ±    0.00029     1.441 ±  0.203 %     97.500 ±  0.000 %
"""
    assert agreement_of(said) == emulated.Agreement(0.0033, 0.975)


# What goes wrong.


def test_what_is_missing_is_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no ARM variant 'arm64-sve'; one of: arm64-v8, arm64-dotprod, arm64-i8mm"):
        emulate(tiny / "model.gguf", tmp_path, "arm64-sve", [], lambda note: None)
    with pytest.raises(ExportError, match="compared nothing .0.1 E kl_divergence: failed reading"):
        agreement_of("Mean PPL: 3\n0.1 E kl_divergence: failed reading n_vocab")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="apt install qemu-user-static"):
        qemu()


def test_what_runs_under_qemu_ends_with_the_command_that_was_killed(tmp_path: Path) -> None:
    player = tmp_path / "qemu"
    player.write_text("#!/bin/sh\necho here\nexec sleep 60\n")
    player.chmod(0o755)
    command = (
        "import pathlib, subprocess, sys; from cdcda_mobile.phone import emulated; emulated.qemu = lambda: pathlib.Path(sys.argv[1]);"
        "subprocess.run(emulated._arm('arm64-v8'))"
    )
    with subprocess.Popen([sys.executable, "-c", command, str(player)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.kill()
        ended, *_ = select.select([process.stdout], [], [], 20)  # nobody holds its other end any more
    assert ended and process.returncode == -signal.SIGKILL


def test_an_engine_that_does_not_start_is_one_sentence(tmp_path: Path) -> None:
    for command, said in ((["false"], "exit status 1"), (["sh", "-c", "echo no such model >&2; exit 2"], "no such model")):
        with pytest.raises(ExportError, match=f"does not start .{said}."), served(command, tmp_path / "socket"):
            pass
