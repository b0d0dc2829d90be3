"""A phone over adb: found, described, measured and left as it was; the server speaks the real protocol, the phone is a sandbox folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdcda_export.artifact import Artifact
from cdcda_export.errors import ConfigError, DeviceError, DiskFull
from cdcda_export.export import AdapterJob, export_adapter
from cdcda_export.progress import Silent
from cdcda_export.recipe import ExportConfig
from cdcda_mobile.cli import main
from cdcda_mobile.phone.device import Core, Device, State, big_cores, connect
from cdcda_mobile.phone.on_device import OnDevice, bench_on_device, plan_for
from fake_adb import FakePhone, free_port, phones

# Speaks as llama-bench does: progress, a row for each test, samples in ns; its second test depends on what it is asked.
BENCH = r"""#!/bin/sh
echo "$@" >> ../told
p=0; n=0; r=0
while [ $# -gt 0 ]; do
  case "$1" in -p) p=$2; shift;; -n) n=$2; shift;; -r) r=$2; shift;; esac
  shift
done
{before}
samples=""
i=1
while [ $i -le $r ]; do
  echo "llama-bench: benchmark 1/1: generation run $i/$r"
  samples="$samples,$((i * 1000000 + (p + n) * 1000000))"
  i=$((i + 1))
done
sleep 0.6
echo "{{\"n_prompt\": $p, \"n_gen\": $n, \"samples_ns\": [${{samples#,}}]}}"
"""


@pytest.fixture
def phone(tmp_path: Path) -> FakePhone:
    return FakePhone(tmp_path / "phone")


@pytest.fixture
def device(phone: FakePhone, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with phones(monkeypatch, phone):
        yield connect()


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Path]:
    def make(before: str = "") -> Path:
        for variant in ("arm64-i8mm", "arm64-dotprod", "arm64-v8"):
            program = tmp_path / "engine" / variant / "llama-bench"
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_text(BENCH.format(before=before))
        return tmp_path / "engine"

    return make


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF" + bytes(100_000))
    return Artifact("gguf", "q4_0", model, {"model": model}, [model.name], {"q4_0": 1}, None)


def measure(
    device: Device, artifact: Artifact, engine: Path, protocol: str = "llama-bench", sustained: float = 0.0, threads: int = 0
) -> OnDevice:
    plan = plan_for(device, artifact, protocol, 3, sustained, threads)
    return bench_on_device(plan, engine, lambda count: None, lambda note: None)


# Finding it.


def test_no_phone_several_phones_and_one_that_does_not_trust_us_are_one_sentence_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with phones(monkeypatch), pytest.raises(DeviceError, match="No phone is connected: switch on USB debugging"):
        connect()
    one, two = FakePhone(tmp_path / "1", "A"), FakePhone(tmp_path / "2", "B")
    with phones(monkeypatch, one, two):
        with pytest.raises(ConfigError, match="name one with --device: A, B"):
            connect()
        with pytest.raises(ConfigError, match="There is no phone C on adb. Connected: A, B"):
            connect("C")
        assert connect("B").serial == "B"
    one.state = "unauthorized"
    with phones(monkeypatch, one, two):
        assert connect().serial == "B"
        with pytest.raises(DeviceError, match="The phone A is unauthorized: unlock it and confirm"):
            connect("A")
    one.state = "no permissions (missing udev rules?)"
    with phones(monkeypatch, one), pytest.raises(DeviceError, match="The phone A is not accessible: .*udev"):
        connect()
    one.state = "unauthorized"
    with phones(monkeypatch, one), pytest.raises(DeviceError, match="The phone A is unauthorized"):
        connect()


def test_where_no_adb_server_can_be_started_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADBUTILS_ADB_PATH", "/bin/false")
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port()))
    with pytest.raises(DeviceError, match="does not answer"):
        connect()


# What it is.


def test_it_says_what_it_is_but_not_which_one(device: Device) -> None:
    told = device.describe()
    assert told["model"] == "One Two/3" and told["soc"] == "SM8550" and told["api"] == "34"
    assert device.serial not in json.dumps(told)
    assert device.features() == {"fp", "asimd", "asimdhp", "asimddp", "i8mm"}
    assert device.state() == State(81, True, 29.7, 0)
    assert device.cores() == [Core(0, 1_800_000, "0xd05"), Core(1, 1_800_000, "0xd05"), Core(2, 3_000_000, "0xd44")]


def test_the_big_cores_are_those_that_make_nobody_wait() -> None:
    little, big, prime = "0xd05", "0xd44", "0xd4e"
    assert big_cores([Core(0, 1800, little), Core(1, 2400, big), Core(2, 3000, prime)]) == [2, 1]
    silver, gold = "0x805", "0x804"  # Kryo 4xx, whose cores differ less in their clocks
    assert big_cores([Core(n, 1800 + 520 * (n > 5), gold if n > 5 else silver) for n in range(8)]) == [6, 7]
    assert big_cores([Core(0, 1800, big), Core(1, 3000, prime)]) == [1]
    assert big_cores([Core(n, 1600 + 400 * (n > 3), little) for n in range(8)]) == [4, 5, 6, 7]
    assert big_cores([Core(0, 0, ""), Core(1, 0, "")]) == [0, 1]


def test_a_command_that_fails_says_the_phones_last_word(device: Device) -> None:
    with pytest.raises(DeviceError, match="The phone refused `cat /sdcard/none`: .*No such file"):
        device.run("cat /sdcard/none")
    assert device.try_run("false") == "" and device.sha256("/sdcard/none") == ""


# Measuring.


def test_the_command_measures_on_the_phone_predicts_and_writes(
    phone: FakePhone,
    engine: Callable[..., Path],
    llama_base: Path,
    llama_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = AdapterJob(llama_adapter, llama_base, workspace=tmp_path / "runs", config=ExportConfig(quant="q8_0", verify="off"))
    export_adapter(job, Silent())
    monkeypatch.setattr("cdcda_engine.build.build_engine", lambda progress: engine())
    # The run is named, and its newest artifact that phones can run is taken.
    words = ["bench", str(job.directory.parent), "--device", "--phone", "galaxy-s23", "--repeats", "3", "--quiet"]
    with phones(monkeypatch, phone):
        assert main(words) == 0
        told = capsys.readouterr().out
        assert (
            "model.gguf (gguf q8_0," in told and "ON THE PHONE: Example One Two/3, SM8550, Android 14; engine arm64-i8mm, cores 2\n" in told
        )
        assert "  prefill         996.1 tok/s, p90 994.6 (994.2 to 998.1 in 3 repeats) (pp512)\n" in told
        assert "  battery         29.7 °C before, 29.7 °C after; 81 % left\n" in told
        assert "PREDICTED for a Samsung Galaxy S23" in told and "memory          fits" in told and "THIS MACHINE" not in told
        out = job.directory.parent / "bench" / "gguf-q8_0-device-One-Two-3-llama-bench.json"
        assert told.endswith(f"{out}\n")
        assert main([*words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found == json.loads(out.read_text()) and phone.serial not in json.dumps(found)
        assert found["class"] == "galaxy-s23" and found["predicted"]["decode"]["low"] > 0 and len(found["raw"]) == 2
        assert found["measured"]["speeds"]["decode"]["repeats"] == 3 and found["versions"]["python"] and found["unusable"] == ""
        assert main([*words, "--threads", "2"]) == 2
        assert capsys.readouterr().err.endswith("has 1 fast cores; --threads 2 would make them wait for slow ones.\n")
        monkeypatch.setattr("cdcda_engine.build.build_engine", lambda progress: engine("kill -9 $$"))
        assert main(words) == 1
        assert "out of memory" in capsys.readouterr().out and json.loads(out.read_text())["measured"] is None
    with phones(monkeypatch):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert "No phone is connected" in error and error.count("\n") == 1


def test_it_is_measured_on_its_big_cores_and_left_as_it_was(
    device: Device, phone: FakePhone, artifact: Artifact, engine: Callable[..., Path]
) -> None:
    found = measure(device, artifact, engine(), sustained=1.0)
    told = (phone.local("/data/local/tmp") / "told").read_text().splitlines()
    assert [path.name for path in phone.local("/data/local/tmp").iterdir()] == ["told"]
    assert found.cores == [2] and all("-t 1 -C 0x4 --cpu-strict 1 -lm none" in line for line in told)
    assert found.variant == "arm64-i8mm" and found.phone["model"] == "One Two/3"
    assert found.measured is not None and found.pinned
    assert found.measured.prefill == pytest.approx([512 / 0.513, 512 / 0.514, 512 / 0.515])
    assert found.measured.decode == pytest.approx([128 / 0.129, 128 / 0.130, 128 / 0.131])
    assert "-p 0 -n 128 -r 8" in told[2] and len(found.measured.sustained) == 8
    assert found.measured.peak_rss > 100_000 and found.before == found.after
    assert found.as_json()["measured"]["speeds"]["prefill"]["p90"] == pytest.approx(512 / 0.5148, rel=1e-4)
    assert json.dumps(found.as_json()) and device.serial not in json.dumps(found.as_json())


def test_the_other_protocol_goes_on_behind_the_prompt(
    device: Device, phone: FakePhone, artifact: Artifact, engine: Callable[..., Path]
) -> None:
    phone.features = "fp asimd"
    phone.lay_out()
    assert measure(device, artifact, engine(), "pocketpal", threads=1).variant == "arm64-v8"
    with pytest.raises(ConfigError, match="has 1 fast cores; --threads 2"):
        plan_for(device, artifact, "pocketpal", 3, 0.0, 2)
    told = (phone.local("/data/local/tmp") / "told").read_text().splitlines()
    assert "-p 256 -n 0 -d" not in told[0] and "-p 0 -n 64 -d 256 -r 3" in told[1]


@pytest.mark.parametrize(
    ("before", "says"),
    [
        ("echo 'error: unknown model' >&2; exit 3", "failed on the phone .error: unknown model"),
        ("exit 0", "exit status 0"),
        ("echo '{'; exit 0", "exit status 0"),
    ],
)
def test_an_engine_that_fails_there_says_why_and_leaves_nothing(
    before: str, says: str, device: Device, phone: FakePhone, artifact: Artifact, engine: Callable[..., Path]
) -> None:
    with pytest.raises(DeviceError, match=says):
        measure(device, artifact, engine(before))
    assert [path.name for path in phone.local("/data/local/tmp").iterdir()] == ["told"]


@pytest.mark.parametrize("before", ["echo 'error: failed to create context with model' >&2; exit 1", "kill -9 $$"])
def test_out_of_memory_is_a_result(before: str, device: Device, phone: FakePhone, artifact: Artifact, engine: Callable[..., Path]) -> None:
    assert measure(device, artifact, engine(before)).measured is None
    assert [path.name for path in phone.local("/data/local/tmp").iterdir()] == ["told"]


def test_threads_that_the_phone_moved_are_told_of(device: Device, artifact: Artifact, engine: Callable[..., Path]) -> None:
    assert not measure(device, artifact, engine("echo 'warn: failed to set affinity mask 0x4' >&2")).pinned


def test_a_run_that_is_stopped_leaves_neither_files_nor_processes(
    device: Device, phone: FakePhone, artifact: Artifact, engine: Callable[..., Path]
) -> None:
    """As at Ctrl-C: the exception comes while the engine runs."""
    plan = plan_for(device, artifact, "llama-bench", 3, 0.0, 0)

    def stop(note: str) -> None:
        raise KeyboardInterrupt

    program = engine('echo "llama-bench: benchmark 1/1: prompt run 1/3" >&2; sleep 5')
    with pytest.raises(KeyboardInterrupt):
        bench_on_device(plan, program, lambda count: None, stop)
    assert [path.name for path in phone.local("/data/local/tmp").iterdir()] == ["told"]
    assert any("kill -9 $(cat " in command for command in phone.commands)


def test_a_cable_that_is_pulled_is_one_sentence(device: Device, phone: FakePhone, artifact: Artifact, engine: Callable[..., Path]) -> None:
    phone.unplug_at = "llama-bench -m"
    with pytest.raises(DeviceError, match="unplugged during the run; plug it in, remove what was put there .adb shell rm -r"):
        measure(device, artifact, engine())


def test_a_full_phone_and_an_old_one_are_refused(device: Device, phone: FakePhone, artifact: Artifact, engine: Callable[..., Path]) -> None:
    phone.free_kb = 1000
    phone.lay_out()
    with pytest.raises(DiskFull, match="no room for llama-bench"):
        measure(device, artifact, engine())
    phone.properties["ro.product.cpu.abi"] = "armeabi-v7a"
    phone.lay_out()
    with pytest.raises(ConfigError, match="built for arm64-v8a, x86_64, and this phone has armeabi-v7a; 32-bit phones are not supported"):
        measure(device, artifact, engine())


def test_what_the_engine_cannot_run_alone_is_refused_before_anything_is_sent(device: Device, artifact: Artifact, tmp_path: Path) -> None:
    for kind in ("onnx", "gguf-lora"):
        with pytest.raises(ConfigError, match="export one with --format gguf"):
            measure(device, Artifact(kind, "int4", artifact.main, artifact.files, [], {}, None), tmp_path)
