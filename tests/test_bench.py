"""``cdcda bench``: limits that hold, runs that say something, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cdcda_export.artifact import Artifact
from cdcda_export.errors import CdcdaError, ConfigError, ExportError, VerificationFailed
from cdcda_export.export import AdapterJob, export_adapter
from cdcda_export.gguf import GgufFile
from cdcda_export.progress import Silent
from cdcda_export.recipe import ExportConfig
from cdcda_mobile import bench_command
from cdcda_mobile.cli import main
from cdcda_mobile.phone import bench as bench_module
from cdcda_mobile.phone import constrain, measure
from cdcda_mobile.phone.bench import PROTOCOLS, Fit, Spread, bench, fit_of, predicted, spread_of, summarize
from cdcda_mobile.phone.classes import Fact, get_phone
from cdcda_mobile.phone.constrain import Holder, Outcome, choose_cores, hold_memory, run_constrained, throttled_periods
from cdcda_mobile.phone.predict import Prediction, Speed

Capture = pytest.CaptureFixture[str]

CHILD = """
import json, os, sys
from cdcda_mobile.phone.constrain import enter
given = json.load(sys.stdin)
enter(given["limits"]["cores"], given["limits"]["memory"])
print(json.dumps({"cores": sorted(os.sched_getaffinity(0))}), flush=True)
block = bytearray(given["bytes"])
for at in range(0, len(block), 4096):
    block[at] = 1
print(json.dumps({"held": len(block)}), flush=True)
"""


def child(allocate: int, memory: int) -> tuple[Outcome, list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    cores = choose_cores(1)
    outcome = run_constrained(
        [sys.executable, "-c", CHILD], {"bytes": allocate}, cores, memory, lambda line: lines.append(json.loads(line))
    )
    assert lines[0] == {"cores": list(cores)}
    return outcome, lines[1:]


def artifact_of(base: Path) -> Artifact:
    return Artifact("gguf", "f32", base, {"model": base}, [], {}, None)


@pytest.fixture(scope="module")
def exported(llama_base: Path, llama_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Finished artifacts by format."""
    workspace = tmp_path_factory.mktemp("runs")

    def export(kind: str) -> Path:
        job = AdapterJob(llama_adapter, llama_base, workspace=workspace, config=ExportConfig(format=kind, verify="off"))
        export_adapter(job, Silent())
        return job.directory

    return export


# Limits.


@pytest.mark.parametrize("rlimit", [False, True], ids=["as this machine can", "rlimit"])
def test_a_process_that_wants_more_than_it_may_have_is_out_of_memory(rlimit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if rlimit:
        monkeypatch.setattr(constrain, "hold_memory", lambda memory: Holder("rlimit", memory))
    enough, lines = child(20_000_000, 200_000_000)
    assert enough.status == 0 and not enough.out_of_memory and lines == [{"held": 20_000_000}]
    starved, lines = child(400_000_000, 200_000_000)
    assert starved.status != 0 and starved.out_of_memory and lines == []
    assert starved.held_by == enough.held_by and (starved.held_by == "rlimit" if rlimit else starved.held_by != "none")


def test_a_group_that_takes_no_process_is_replaced_by_the_process_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrain, "hold_memory", lambda memory: Holder("cgroup v2", memory, tmp_path / "gone"))
    enough, lines = child(20_000_000, 200_000_000)
    assert enough.held_by == "rlimit" and enough.status == 0 and lines == [{"held": 20_000_000}]
    assert child(400_000_000, 200_000_000)[0].out_of_memory


@pytest.mark.parametrize(("word", "starved"), [("", False), ("terminate called after throwing an instance of 'std::bad_alloc'", True)])
def test_a_crash_is_a_lack_of_memory_only_where_somebody_complained_of_it(
    word: str, starved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constrain, "hold_memory", lambda memory: Holder("rlimit", memory))
    program = f"import os, sys; sys.stderr.write({word!r}); sys.stderr.flush(); os.abort()"
    outcome = run_constrained([sys.executable, "-c", program], {}, choose_cores(1), 200_000_000)
    assert outcome.status == -6 and outcome.out_of_memory is starved


def test_without_a_limit_nothing_is_held() -> None:
    outcome, lines = child(20_000_000, 0)
    assert outcome.held_by == "none" and not outcome.out_of_memory and lines == [{"held": 20_000_000}]


def test_a_group_of_our_own_is_made_next_to_ours_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2 with a folder in the place of the kernel's: files appear in every new group, as the kernel makes them."""
    made = Path.mkdir

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if self.is_relative_to(tmp_path / "user"):
            for name in ("cgroup.procs", "memory.max", "memory.swap.max"):
                (self / name).write_text("")

    (tmp_path / "cgroup.controllers").write_text("memory")
    (tmp_path / "user" / "shell").mkdir(parents=True)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    holder = hold_memory(123_000_000, tmp_path, "0::/user/shell\n")
    assert holder.name == "cgroup v2" and holder.directory is not None
    assert (holder.directory / "memory.max").read_text() == "123000000"
    assert (holder.directory / "memory.swap.max").read_text() == "0"
    (holder.directory / "memory.events").write_text("oom 1\noom_kill 0\n")
    assert not holder.was_exceeded(-9, "")
    (holder.directory / "memory.events").write_text("oom 1\noom_kill 1\n")
    assert holder.was_exceeded(-9, "")


@pytest.mark.parametrize("own", ["0::/\n", "4:memory:/x\n", "1:cpu,cpuacct:/\n0::/\n"])
def test_where_no_group_can_be_made_the_process_limits_itself(own: str, tmp_path: Path) -> None:
    assert hold_memory(1_000_000, tmp_path / "nothing", own) == Holder("rlimit", 1_000_000)


def test_the_group_of_a_run_that_was_killed_goes_with_the_next_one(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    for name in (f"cdcda-bench-{ended.pid}-aa", f"cdcda-bench-{os.getpid()}-bb", f"cdcda-bench-{ended.pid}-cc/busy"):
        (tmp_path / "memory" / name).mkdir(parents=True)
    hold_memory(1_000_000, tmp_path, "4:memory:/\n").close()
    left = sorted(path.name for path in (tmp_path / "memory").glob("cdcda-bench-*-??"))
    assert left == sorted([f"cdcda-bench-{os.getpid()}-bb", f"cdcda-bench-{ended.pid}-cc"])


def test_throttled_periods_are_those_of_our_group_and_of_all_around_it(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "cpu.stat").write_text("nr_periods 9\nnr_throttled 3\n")
    (tmp_path / "a" / "b" / "cpu.stat").write_text("nr_periods 9\nnr_throttled 4\n")
    assert throttled_periods(tmp_path, "0::/a/b\n") == 7
    (tmp_path / "cpu" / "c").mkdir(parents=True)
    (tmp_path / "cpu" / "c" / "cpu.stat").write_text("nr_throttled 5\n")
    assert throttled_periods(tmp_path, "3:cpu,cpuacct:/c\n4:memory:/a\n") == 5
    assert throttled_periods(tmp_path, "5:pids:/a\n") == 0


def test_as_many_cores_as_there_are() -> None:
    usable = os.sched_getaffinity(0)
    assert set(choose_cores(10**6)) == usable and len(choose_cores(1)) == 1
    with pytest.raises(ConfigError, match="at least one core"):
        choose_cores(0)


# Runs.


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_model_is_measured_in_its_runtime(protocol: str, llama_base: Path) -> None:
    steps: list[str] = []
    found = bench(artifact_of(llama_base), protocol, 2, 0.0, get_phone("redmi-7a"), 1, steps.append)
    assert found.measured is not None and found.threads == 1 and found.memory == get_phone("redmi-7a").memory_budget.value
    got, tests = found.measured, PROTOCOLS[protocol]
    assert len(got.prefill) == len(got.decode) == 2 and min(*got.prefill, *got.decode) > 0
    assert len(found.raw["decode"][0]) == tests.answer and got.first_token == pytest.approx(tests.prompt / got.prefill[0], rel=5)
    assert got.peak_rss > llama_base.stat().st_size and 0 <= got.crowded <= 1
    assert len(found.raw["resident"]) == len(got.decode) and max(found.raw["resident"]) <= got.peak_rss
    assert steps == ["load", "repeat", "repeat"]
    told = json.loads(json.dumps(found.as_json()))
    assert told["host"]["cores"] >= 1 and told["versions"]["python"] and told["measured"]["decode"] == got.decode
    slow = told["measured"]["speeds"]["decode"]
    assert slow["low"] == min(got.decode) < slow["p90"] < slow["median"] < slow["high"] == max(got.decode) and slow["repeats"] == 2


def test_a_model_that_does_not_go_in_is_a_result(llama_base: Path) -> None:
    small = replace(get_phone("redmi-7a"), memory_budget=Fact(12_000_000, "x"))
    found = bench(artifact_of(llama_base), "pocketpal", 1, 0.0, small, 1, lambda step: None)
    assert found.measured is None and found.memory == 12_000_000


@pytest.mark.parametrize("rlimit", [False, True], ids=["as this machine can", "rlimit"])
def test_a_damaged_model_is_not_out_of_memory(rlimit: bool, llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if rlimit:
        monkeypatch.setattr(constrain, "hold_memory", lambda memory: Holder("rlimit", memory))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(llama_base.read_bytes()[:-100_000])
    with pytest.raises(ExportError, match="llama.cpp does not load the model .*corrupted or incomplete"):
        bench(artifact_of(damaged), "pocketpal", 1, 0.0, get_phone("redmi-7a"), 1, lambda step: None)
    adapted = replace(artifact_of(llama_base), format="gguf-lora", files={"model": llama_base, "adapter": damaged})
    with pytest.raises(ExportError, match="llama.cpp does not load the adapter"):
        bench(adapted, "pocketpal", 1, 0.0, get_phone("redmi-7a"), 1, lambda step: None)


@pytest.fixture(scope="module")
def padded_onnx(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tiny ONNX model with 64 MB of numbers that nothing uses."""
    import numpy as np
    import onnx

    directory = tmp_path_factory.mktemp("padded") / "onnx"
    shutil.copytree(exported("onnx"), directory)
    model = onnx.load(str(directory / "model.onnx"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(64_000_000, np.uint8), "padding"))
    onnx.save(model, str(directory / "model.onnx"))
    return Artifact("onnx", "int8", directory / "model.onnx", {"model": directory / "model.onnx"}, [], {}, None)


@pytest.mark.parametrize(("rlimit", "memory"), [(False, 30_000_000), (True, 100_000_000)])
def test_an_onnx_model_that_does_not_go_in_is_a_result(
    rlimit: bool, memory: int, padded_onnx: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 MB are enough for ONNX Runtime without the model, so that it is the model that fails."""
    if rlimit:
        monkeypatch.setattr(constrain, "hold_memory", lambda memory: Holder("rlimit", memory))
    phone = get_phone("redmi-7a")
    small = replace(phone, memory_budget=Fact(memory, "x"))
    assert bench(padded_onnx, "pocketpal", 1, 0.0, small, 1, lambda step: None).measured is None
    assert bench(padded_onnx, "pocketpal", 1, 0.0, phone, 1, lambda step: None).measured is not None


def test_a_damaged_onnx_model_is_not_out_of_memory(padded_onnx: Artifact, tmp_path: Path) -> None:
    directory = tmp_path / "onnx"
    shutil.copytree(padded_onnx.main.parent, directory)
    (directory / "model.onnx").write_bytes(padded_onnx.main.read_bytes()[:-1000])
    damaged = replace(padded_onnx, main=directory / "model.onnx", files={"model": directory / "model.onnx"})
    with pytest.raises(ExportError, match="it is truncated or damaged"):
        bench(damaged, "pocketpal", 1, 0.0, get_phone("redmi-7a"), 1, lambda step: None)


def test_no_more_threads_than_the_phone_has_fast_cores(llama_base: Path) -> None:
    with pytest.raises(ConfigError, match="Galaxy A16.* has 2 fast cores; --threads 8 would"):
        bench(artifact_of(llama_base), "pocketpal", 1, 0.0, get_phone("galaxy-a16"), 8, lambda step: None)


@pytest.mark.parametrize(("protocol", "repeats", "said"), [("pocketpall", 1, "Did you mean 'pocketpal'"), ("pocketpal", 0, "at least 1")])
def test_numbers_and_names_that_make_no_sense(protocol: str, repeats: int, said: str, llama_base: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        bench(artifact_of(llama_base), protocol, repeats, 0.0, None, 1, lambda step: None)


def test_sustained_decode_is_told_in_windows(llama_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_WINDOW_S", 0.05)
    plan = measure.Plan(str(llama_base), "gguf", "", 1, 16, 8, chained=False, repeats=1, sustained=0.1)
    found = measure.measure(plan, lambda step: None)
    assert len(found.windows) == 2 and all(window["tokens"] >= 1 and window["seconds"] >= 0.05 for window in found.windows)
    assert [measure.windows_of(seconds) for seconds in (0.0, 0.01, 0.05, 0.06)] == [0, 1, 1, 2]


def test_sustained_decode_empties_the_cache_after_as_many_tokens_in_every_runtime() -> None:
    class Engine:
        vocabulary, first, seen = 10, None, 99
        lengths: list[int] = []

        def clear(self) -> None:
            self.seen = 0

        def read(self, ids: Sequence[int]) -> None:
            self.seen += len(ids)
            self.lengths.append(self.seen)

    engine, found = Engine(), measure.Timings()

    def timed(ids: Sequence[int]) -> float:
        engine.read(ids)
        return 0.125

    plan = measure.Plan("", "onnx", "", 1, 256, 64, chained=True, repeats=1, sustained=20.0)
    measure._sustain(plan, engine, found, timed, lambda count: [0] * count, lambda step: None)
    assert engine.lengths == [*range(1, 129), *range(1, 33)] and [window["tokens"] for window in found.windows] == [80, 80]


def test_the_speeds_are_those_of_the_seconds() -> None:
    result = {
        "load": 1.0,
        "prefill": [2.0, 4.0, 1.0],
        "decode": [[0.1] * 9 + [1.1], [0.2] * 10],
        "windows": [{"tokens": 50, "seconds": 10.0}],
    }
    got = summarize({**result, "peak_rss": 7, "waited": 1.0, "worked": 3.0}, PROTOCOLS["pocketpal"])
    assert got.prefill == [128.0, 64.0, 256.0] and got.first_token == 2.0
    assert got.decode == pytest.approx([5.0, 5.0]) and got.token_p90 == 0.2
    assert got.sustained == [5.0] and got.crowded == 0.25
    assert spread_of([50.0, 10.0, 40.0, 20.0, 30.0]) == Spread(30.0, 14.0, 10.0, 50.0, 5)
    assert spread_of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize(
    ("outcome", "result", "error", "said"),
    [
        (Outcome("", 0, False, "none", 3), {"swapped": 0}, VerificationFailed, "3 periods"),
        (Outcome("", 0, False, "none", 0), {"swapped": 4096}, VerificationFailed, "swap"),
        (Outcome("Traceback\nRuntimeError: bad", 1, False, "none", 0), {}, ExportError, "RuntimeError: bad"),
        (Outcome("", -11, False, "none", 0), {}, ExportError, "exit status -11"),
    ],
)
def test_a_run_that_says_nothing_is_refused(
    outcome: Outcome, result: dict[str, Any], error: type[CdcdaError], said: str, llama_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: Any, given: Any, cores: Any, memory: int, on_line: Any) -> Outcome:
        if result:
            on_line(json.dumps({"result": result}))
        return outcome

    monkeypatch.setattr(bench_module, "run_constrained", run)
    with pytest.raises(error, match=said):
        bench(artifact_of(llama_base), "pocketpal", 1, 0.0, None, 1, lambda step: None)


# What is told of a phone.


def test_it_fits_is_tight_or_does_not_fit(llama_base: Path) -> None:
    phone, file = get_phone("redmi-7a"), GgufFile(llama_base)
    needed = fit_of(phone, file, 1000, 100).needed

    def verdict(budget: int | None) -> str:
        return fit_of(replace(phone, memory_budget=Fact(budget)), file, 1000, 100).verdict

    assert [verdict(b) for b in (2 * needed, needed, needed - 1, None)] == ["fits", "tight", "does not fit", "unknown"]


def test_onnx_is_not_calibrated(llama_base: Path) -> None:
    phone = get_phone("galaxy-s23")
    assert predicted(phone, artifact_of(llama_base), "pocketpal") is not None
    assert predicted(phone, replace(artifact_of(llama_base), format="onnx"), "pocketpal") is None
    assert "not calibrated" in "".join(bench_command._predicted_lines(phone, None, None, PROTOCOLS["pocketpal"]))
    some = Prediction(Speed(10.0, 5.0, 20.0), None, measured=False)
    text = "\n".join(bench_command._predicted_lines(phone, some, Fit("tight", 10, 100), PROTOCOLS["pocketpal"]))
    assert "tight" in text and "10 tok/s, 90 % between 5 and 20" in text and "unknown" in text
    # One model was measured on the board, with four threads.
    assert "too little was measured on it" in text and "nobody" not in text and "six threads" not in text


# The command.


@pytest.mark.parametrize("kind", ["onnx", "gguf-lora"])
def test_every_format_is_measured_in_its_runtime(kind: str, exported: Callable[[str], Path], capsys: Capture) -> None:
    directory = exported(kind)
    words = ["bench", str(directory), "--phone", "galaxy-s23", "--protocol", "pocketpal", "--repeats", "2", "--threads", "1", "--quiet"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert f"({kind} {directory.name.removeprefix(kind + '-')}," in told and "not calibrated for ONNX and for adapters at run time" in told
    assert re.search(r"decode +[\d.]+ tok/s, p90 [\d.]+ \([\d.]+ to [\d.]+ in 2 repeats\)", told)
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == kind and found["predicted"] is None and (found["fit"] is None) == (kind == "onnx")
    assert found["bytes"] > sum(path.stat().st_size for path in directory.glob("*.gguf")) and len(found["raw"]["decode"][1]) == 64
    assert json.loads((directory.parent / "bench" / f"{directory.name}-galaxy-s23-pocketpal.json").read_text()) == found


def test_what_is_measured_from_inside_an_artifact_is_written_beside_it(
    exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    directory = exported("gguf-lora")
    monkeypatch.chdir(directory)
    assert main(["bench", ".", "--protocol", "pocketpal", "--repeats", "1", "--threads", "1", "--quiet"]) == 0
    assert not (directory / "bench").exists() and (directory.parent / "bench" / f"{directory.name}-host-pocketpal.json").exists()


def test_the_list_names_every_phone(capsys: Capture) -> None:
    assert main(["bench", "--list-phones"]) == 0
    told = capsys.readouterr().out
    assert all(phone in told for phone in ("galaxy-s23", "raspberry-pi-5", "i8mm", "v8.0"))
    assert main(["bench", "--list-phones", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["phones"]["galaxy-s23"]["soc"]["clusters"]["source"] in found["sources"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Name an artifact"),
        (["runs/none"], "holds no finished artifact"),
        (["x", "--phone", "galaxy-s32"], "Did you mean 'galaxy-s2"),
        (["x", "--min-tok-s", "8"], "--min-tok-s belongs to --recommend"),
        (["x", "--recommend", "--phone", "pixel-7a", "--min-tok-s", "nan"], "--min-tok-s at least 0"),
        (["x", "--context", "-1"], "--context has to be at least 1"),
        (["x", "--repeats", "0"], "--repeats has to be at least 1"),
        (["x", "--sustained", "nan"], "--sustained and --threads at least 0"),
        (["x", "--sustained", "inf"], "--sustained and --threads at least 0"),
        (["x", "--arm", "--phone", "galaxy-s23"], "leave out --phone"),
        (["x", "--arm", "--sustained", "1"], "leave out --phone, --sustained"),
        (["x", "--arm", "--threads", "1"], "leave out --phone, --sustained and --threads"),
    ],
)
def test_a_wrong_word_is_one_sentence(words: list[str], said: str, capsys: Capture) -> None:
    assert main(["bench", *words]) != 0
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_command_measures_predicts_and_writes(
    llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    directory = tmp_path / "42" / "gguf-f32"
    directory.mkdir(parents=True)
    monkeypatch.setattr(bench_command, "find_artifact", lambda path, formats: directory)
    monkeypatch.setattr(bench_command, "read_artifact", lambda path: artifact_of(llama_base))
    words = ["bench", str(directory), "--phone", "galaxy-s23", "--protocol", "pocketpal", "--repeats", "1", "--threads", "1", "--quiet"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "THIS MACHINE" in told and "PREDICTED for a Samsung Galaxy S23" in told and "pp256" in told
    written = json.loads((directory.parent / "bench" / "gguf-f32-galaxy-s23-pocketpal.json").read_text())
    assert written["fit"]["verdict"] == "fits" and written["predicted"]["decode"]["low"] < written["predicted"]["decode"]["high"]
    monkeypatch.setattr(bench_command, "get_phone", lambda key: replace(get_phone(key), memory_budget=Fact(12_000_000, "x")))
    assert main(words) == 1
    assert "out of memory" in capsys.readouterr().out
