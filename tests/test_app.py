"""The app: its own tests, what Android demands of the package, packing and signing, and its engine answering under QEMU."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import NoEncryption, pkcs12

from cdcda_apk import APPLICATION_ID
from cdcda_apk.axml import renamed
from cdcda_apk.packing import _LARGEST, Cargo, check_id, pack
from cdcda_apk.shell import find_shell
from cdcda_apk.signing import PASSWORD, key_of, own_key
from cdcda_engine.variants import best_variant, features_of
from cdcda_export.card_values import size
from cdcda_export.chat_template import template_of
from cdcda_export.errors import BuildError, ConfigError, FileError
from cdcda_export.export import AdapterJob, export_adapter
from cdcda_export.gguf import GgufFile
from cdcda_export.progress import Plain, Silent, progress_of_bytes
from cdcda_export.recipe import ExportConfig
from cdcda_export.runtime import LlamaCpp
from cdcda_export.verify import neutral_texts
from cdcda_mobile.cli import export_main, main
from cdcda_mobile.phone.device import Core, big_cores
from cdcda_mobile.phone.emulated import CPUS, qemu
from fake_endpoint import FakeEndpoint
from job import KEY, set_table
from talk import talking
from tiny import make_adapter

ROOT = Path(__file__).parent.parent
MODULE = ROOT / "android_demo" / "app"
Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class App:
    """What Maven left."""

    shell: Path
    classpath: str


@pytest.fixture(scope="module")
def app() -> App:
    """The app, built and tested by Maven."""
    shutil.rmtree(MODULE / "target" / "screenshots", ignore_errors=True)
    done = subprocess.run(["mvn", "--batch-mode", "--quiet", "verify"], cwd=MODULE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return App(MODULE / "target" / "shell.apk", (MODULE / "target" / "classpath").read_text())


@pytest.fixture(scope="module")
def tiny(llama_base: Path, llama_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = AdapterJob(llama_adapter, llama_base, workspace=tmp_path_factory.mktemp("tiny"), config=ExportConfig(quant="q8_0"))
    export_adapter(job, Silent())
    return job.directory


@pytest.fixture
def packed(app: App, phone_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Packs, and returns the APK."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("cdcda_mobile.apk_command.build_engine", lambda progress: phone_engine)

    def pack(*words: object, name: str = "app.apk", code: int = 0) -> Path:
        out = tmp_path / name
        assert main(["apk", "--shell", str(app.shell), "--out", str(out), *map(str, words), "--quiet"]) == code
        return out

    return pack


def said(*command: object) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


# The contract.


def test_both_languages_know_the_same_processors() -> None:
    table = json.loads((Path(__file__).parent / "data" / "processors.json").read_text())
    for case in table["variants"]:
        if case["variant"]:
            assert best_variant(case["abi"], features_of(case["cpuinfo"])) == case["variant"]
        else:
            with pytest.raises(ConfigError):
                best_variant(case["abi"], features_of(case["cpuinfo"]))
    for case in table["cores"]:
        assert big_cores([Core(*core) for core in case["cores"]]) == case["big"]


def test_an_export_writes_the_bundle_that_the_app_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own, with everything that an adapter from elsewhere has not: presets, and what it learned from."""

    def shape(value: object) -> object:
        if isinstance(value, list):
            assert len({json.dumps(shape(one), sort_keys=True) for one in value}) == 1
            return [shape(value[0])]
        return {key: shape(one) for key, one in value.items()} if isinstance(value, dict) else type(value).__name__

    known = json.loads((Path(__file__).parent / "data" / "bundle.json").read_text())
    with FakeEndpoint() as teacher:
        desk = set_table(tmp_path, teacher)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        assert export_main(desk.arguments("--format", "gguf-lora", "--quant", "q8_0")) == 0
    made = json.loads((desk.run / "gguf-lora-q8_0" / "bundle.json").read_text())
    assert made["schema"] == known["schema"] and set(made) == set(known)
    for part in set(known) - {"tensor_types", "verification"}:
        assert shape(made[part]) == shape(known[part]), part
    assert set(known["verification"]) <= set(made["verification"])


# What Android demands.


def test_the_shell_is_small_asks_for_nothing_and_needs_nothing_new(app: App, tmp_path: Path) -> None:
    badging = said("aapt2", "dump", "badging", app.shell)
    assert "uses-permission" not in badging and f"package: name='{APPLICATION_ID}'" in badging
    assert "sdkVersion:'26'" in badging and "targetSdkVersion:'34'" in badging and "application-label-zh-CN" in badging
    with zipfile.ZipFile(app.shell) as archive:
        archive.extract("classes.dex", tmp_path)
    assert (tmp_path / "classes.dex").stat().st_size < 300_000
    assert "invoke-custom" not in said("dexdump", "-d", tmp_path / "classes.dex")
    tree = said("aapt2", "dump", "xmltree", "--file", "AndroidManifest.xml", app.shell)
    assert re.search(r"allowBackup\(\w+\)=false", tree) and re.search(r"extractNativeLibs\(\w+\)=true", tree)


def test_every_look_was_drawn(app: App) -> None:
    drawn = {path.name.partition("-")[0] for path in (MODULE / "target" / "screenshots").glob("*.png")}
    assert drawn == {"light", "dark", "large", "landscape", "chinese", "small"}


def test_the_package_is_signed_aligned_and_holds_the_engine(packed: Any, tiny: Path) -> None:
    apk = packed("--bundle", tiny)
    verified = said("apksigner", "verify", "--verbose", "--min-sdk-version", "26", apk)
    assert "v2 scheme (APK Signature Scheme v2): true" in verified and "v3 scheme (APK Signature Scheme v3): true" in verified
    said("zipalign", "-c", "4", apk)
    with zipfile.ZipFile(apk) as archive:
        names = archive.namelist()
        assert archive.read("assets/model/model.gguf") == (tiny / "model.gguf").read_bytes()
        assert archive.getinfo("assets/model/model.gguf").compress_type == zipfile.ZIP_STORED
        assert archive.getinfo("resources.arsc").compress_type == zipfile.ZIP_STORED
        assert json.loads(archive.read("assets/model/bundle.json"))["files"]["model"]["path"] == "model.gguf"
        for name in (name for name in names if name.endswith(".so")):
            assert _least_alignment(archive.read(name)) >= 16384
    assert {f"lib/arm64-v8a/libllama-server-{name}.so" for name in CPUS} | {"lib/x86_64/libllama-server-x86_64.so"} <= set(names)
    assert "assets/licences/musl.txt" in names
    assert apk.stat().st_size - (tiny / "model.gguf").stat().st_size < 20_000_000


def _least_alignment(elf: bytes) -> int:
    offset, size, count = struct.unpack_from("<Q", elf, 32)[0], *struct.unpack_from("<HH", elf, 54)
    loads = [offset + n * size for n in range(count) if struct.unpack_from("<I", elf, offset + n * size)[0] == 1]
    return min(struct.unpack_from("<Q", elf, at + 48)[0] for at in loads)


# Packing.


def test_the_same_inputs_give_the_same_bytes(packed: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keystore = own_keystore(tmp_path, ["-keyalg", "EC"])
    monkeypatch.setenv(PASSWORD, "secret1")
    words = ("--bundle", tiny, "--keystore", keystore)
    once = packed(*words).read_bytes()
    monkeypatch.setenv("CDCDA_CACHE", str(tmp_path / "cache"))
    assert packed(*words, name="again.apk").read_bytes() == once


def test_a_model_has_as_many_megabytes_while_it_is_packed_as_afterwards(capsys: Capture) -> None:
    progress_of_bytes(Plain(), "packing", 91_700_000)
    assert size(91_700_000) == "91.7 MB" and "(91 MB)" in capsys.readouterr().err


def test_two_ids_are_two_apps(packed: Any) -> None:
    apk = packed("--model-less", "--application-id", "org.example.ann")
    badging = said("aapt2", "dump", "badging", apk)
    assert "package: name='org.example.ann'" in badging
    assert "launchable-activity: name='org.cdcda.app.ui.WritingActivity'" in badging
    said("apksigner", "verify", "--min-sdk-version", "26", apk)
    assert not [name for name in zipfile.ZipFile(apk).namelist() if name.startswith("assets/model")]


def own_keystore(folder: Path, kind: list[str]) -> Path:
    keystore = folder / f"{kind[1]}.p12"
    stored = ["-keystore", keystore, "-storetype", "PKCS12", "-storepass", "secret1"]
    said("keytool", "-genkeypair", *kind, *stored, "-dname", "CN=me", "-alias", "a")
    return keystore


def test_ones_own_keystore_signs(packed: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for kind in (["-keyalg", "EC"], ["-keyalg", "RSA", "-keysize", "2048"]):
        keystore = own_keystore(tmp_path, kind)
        monkeypatch.setenv(PASSWORD, "secret1")
        apk = packed("--bundle", tiny, "--keystore", keystore)
        assert "CN=me" in said("apksigner", "verify", "--print-certs", "--min-sdk-version", "26", apk)
    monkeypatch.setenv(PASSWORD, "other")
    capsys.readouterr()
    packed("--bundle", tiny, "--keystore", keystore, code=2)
    assert f"{PASSWORD} is not its password" in capsys.readouterr().err
    monkeypatch.setenv(PASSWORD, "secret1")
    packed("--bundle", tiny, "--keystore", own_keystore(tmp_path, ["-keyalg", "EdDSA"]), code=2)
    assert "holds no RSA or elliptic-curve key" in capsys.readouterr().err
    packed("--bundle", tiny, "--keystore", own_keystore(tmp_path, ["-keyalg", "RSASSA-PSS", "-keysize", "2048"]), code=2)
    assert "whose kind of key Android does not take" in capsys.readouterr().err  # apksigner: public key mismatch
    packed("--bundle", tiny, "--keystore", tmp_path / "none.p12", code=1)
    assert "Cannot read" in capsys.readouterr().err
    assert (tmp_path / "data" / "cdcda").exists() is False  # nobody asked for a key of this machine's


def test_a_curve_that_android_does_not_know_is_refused(tmp_path: Path) -> None:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "me")])
    when = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    for curve, known in ((ec.SECP256R1(), True), (ec.SECP384R1(), True), (ec.SECP521R1(), True), (ec.SECP256K1(), False)):
        private = ec.generate_private_key(curve)
        made = x509.CertificateBuilder(name, name, private.public_key(), 1, when, when + dt.timedelta(1)).sign(private, hashes.SHA256())
        keystore = tmp_path / f"{curve.name}.p12"
        keystore.write_bytes(pkcs12.serialize_key_and_certificates(b"a", private, made, None, NoEncryption()))
        if known:
            assert key_of(keystore, "").certificate
        else:
            with pytest.raises(ConfigError, match="the curve secp256k1, and Android takes P-256, P-384 and P-521"):
                key_of(keystore, "")


def test_this_machines_own_key_is_private_and_stays(packed: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed("--bundle", tiny).stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv(PASSWORD, "of another keystore")
    key = tmp_path / "data" / "cdcda" / "apk.p12"
    before = key.read_bytes()
    assert key.stat().st_mode & 0o777 == 0o600
    packed("--bundle", tiny)
    assert key.read_bytes() == before


def test_of_a_users_exports_the_right_one_is_packed(
    packed: Any, tmp_path: Path, llama_base: Path, llama_adapter: Path, capsys: Capture
) -> None:
    runs = tmp_path / "runs"

    def export(**config: str) -> Path:
        job = AdapterJob(llama_adapter, llama_base, workspace=runs, config=ExportConfig(**config))
        export_adapter(job, Silent())
        return job.directory

    def bundle(*words: str) -> dict[str, Any]:
        apk = packed("--user", user, "--workspace", workspace, *words)
        with zipfile.ZipFile(apk) as archive:
            found: dict[str, Any] = json.loads(archive.read("assets/model/bundle.json"))
            assert {f"assets/model/{entry['file']}" for entry in found["files"].values()} <= set(archive.namelist())
        return found

    merged = export(quant="q8_0")
    user, workspace = "ann", merged.parent.parent
    packed("--user", user, "--workspace", workspace, "--compare", code=1)
    assert "make one with `cdcda-export --user ann --format gguf-lora`" in capsys.readouterr().err
    pair = export(format="gguf-lora", quant="q8_0")
    onnx = export(format="onnx", quant="int8")
    run = workspace / user
    run.mkdir(mode=0o700)
    (run / "gguf-lora-q9.partial").mkdir()
    for made in (merged, pair, onnx):
        shutil.copytree(made, run / made.name)  # as deep as before: the shared base is found
    assert bundle()["format"] == "gguf-lora"  # the newest that the app runs
    assert capsys.readouterr().out.startswith(f"Packing {run / pair.name}.\n")
    assert bundle("--compare")["files"].keys() == {"model", "adapter"}
    shutil.copytree(merged, run / "gguf-q4_0")  # the usual one, however old
    os.utime(run / "gguf-q4_0" / "manifest.json", (0, 0))
    assert bundle()["format"] == "gguf"
    newer = run / pair.name
    assert f"Packing {run / 'gguf-q4_0'}; {newer} is newer: --bundle {newer} packs that.\n" in capsys.readouterr().out


def test_what_cannot_be_packed_is_one_sentence(packed: Any, tmp_path: Path, llama_base: Path, llama_adapter: Path, capsys: Capture) -> None:
    def sentence(*words: object, code: int) -> str:
        capsys.readouterr()
        packed(*words, code=code)
        found = capsys.readouterr().err.strip()
        assert "\n" not in found
        return found

    assert "--user, or --bundle DIR, or --model-less" in sentence(code=2)
    assert "--user, or --bundle DIR, or --model-less" in sentence("--user", "42", "--model-less", code=2)
    assert "--compare goes with --user" in sentence("--bundle", tmp_path, "--compare", code=2)
    assert "holds no finished gguf-lora artifact" in sentence("--user", "ann", "--workspace", tmp_path, "--compare", code=1)
    assert "--out names the file to write" in sentence("--model-less", "--out", tmp_path, code=2)
    os.mkfifo(tmp_path / "pipe")  # or a device: root would put the app in its place
    assert "--out names the file to write" in sentence("--model-less", "--out", tmp_path / "pipe", code=2)
    no_zip, no_app = tmp_path / "no.zip", tmp_path / "no-app.zip"
    no_zip.write_bytes(b"PK")
    with zipfile.ZipFile(no_app, "w") as archive:
        archive.writestr("classes.dex", b"")
    assert "cannot be read as an app" in sentence("--model-less", "--shell", no_zip, code=1)
    assert "has no AndroidManifest.xml and no resources.arsc" in sentence("--model-less", "--shell", no_app, code=1)
    ready = packed("--model-less", name="packed.zip")
    assert "packed.zip was packed already" in sentence("--model-less", "--shell", ready, code=1)
    assert "is no application id" in sentence("--model-less", "--application-id", "ann", code=2)
    assert "above 70 letters the engine's socket has no name" in sentence("--model-less", "--application-id", "a." + 69 * "b", code=2)
    check_id("a." + 68 * "b")
    assert "holds no finished gguf or gguf-lora artifact" in sentence("--bundle", tmp_path, code=1)
    job = AdapterJob(llama_adapter, llama_base, workspace=tmp_path / "quick", config=ExportConfig(quant="q8_0", verify="quick"))
    export_adapter(job, Silent())
    assert "run cdcda-export again with --verify full" in sentence("--bundle", job.directory, code=1)
    assert list(tmp_path.glob("*.apk")) == [] and list(tmp_path.glob(".*.partial")) == []


def test_a_model_above_two_gigabytes_is_not_for_a_package(tmp_path: Path, app: App, phone_engine: Path) -> None:
    large = tmp_path / "model.gguf"
    with large.open("wb") as stream:
        stream.truncate(_LARGEST + 1)
    assert _LARGEST * 1.05 < zipfile.ZIP64_LIMIT  # from there on zipfile writes what Android does not read
    with pytest.raises(ConfigError, match="above 2 GB"):
        pack(app.shell, phone_engine, Cargo({}, {"model.gguf": large}, large), "a.b", own_key(tmp_path / "k.p12"), tmp_path / "x.apk", id)


def test_the_shell_is_built_once_and_what_it_takes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDCDA_CACHE", str(tmp_path / "cache"))
    tools = tmp_path / "tools"
    tools.mkdir()

    def tool(name: str, body: str) -> None:
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)

    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("ANDROID_HOME", raising=False)
    with pytest.raises(ConfigError, match="needs maven and default-jdk-headless and aapt: `apt install"):
        find_shell(None, Silent())
    in_sdk = tmp_path / "sdk" / "build-tools" / "34.0.0" / "aapt2"
    in_sdk.parent.mkdir(parents=True)
    in_sdk.touch()
    monkeypatch.setenv("ANDROID_HOME", str(tmp_path / "sdk"))
    tool("javac", "")
    with pytest.raises(ConfigError, match="needs maven: `apt install maven`"):
        find_shell(None, Silent())
    monkeypatch.delenv("ANDROID_HOME")
    tool("aapt2", "")
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin")
    tool("mvn", "echo '[ERROR] Could not find artifact com.android.tools:r8:jar:8.7.18'; exit 1")
    with pytest.raises(BuildError, match="add Google's Maven repository"):
        find_shell(None, Silent())
    tool("mvn", "echo '[ERROR] cannot find symbol'; exit 1")
    with pytest.raises(BuildError, match="cannot find symbol"):
        find_shell(None, Silent())
    tool("mvn", "test -f pom.xml && mkdir target && echo built > target/shell.apk")
    shell = find_shell(None, Silent())
    assert shell.read_text() == "built\n"
    tool("mvn", "exit 1")
    assert find_shell(None, Silent()) == shell


def test_a_shell_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="There is no shell"):
        find_shell(tmp_path / "none.apk", Silent())
    for content in (b"", b"<manifest/>", struct.pack("<HHIHHI5I", 3, 8, 36, 1, 28, 28, 0, 0, 0, 28, 0)):
        with pytest.raises(BuildError):
            renamed(content, "a.b", "c.d")


# The engine under QEMU, through the app's own client.


def unpacked(apk: Path, folder: Path) -> Path:
    """Lay the model as the app's store does, and return the engine for 64-bit ARM with all instructions."""
    with zipfile.ZipFile(apk) as archive:
        archive.extractall(folder / "apk")
    shutil.move(folder / "apk" / "assets" / "model", folder / "bundled")
    program = folder / "apk" / "lib" / "arm64-v8a" / "libllama-server-arm64-i8mm.so"
    program.chmod(0o755)
    return program


def engine_of(program: Path) -> list[int]:
    """Return the processes of an engine; the shell that guards it names it too."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(program).encode() in words and not words[0].endswith(b"sh") and b"java" not in words[0]:
            found.append(int(process.name))
    return found


def gone_within(program: Path, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while engine_of(program) and time.monotonic() < until:
        time.sleep(0.02)
    return not engine_of(program)


def arm(program: Path) -> list[str | Path]:
    return [qemu(), "-cpu", CPUS["arm64-i8mm"], program]


def test_its_engine_streams_stops_dies_and_starts_again(app: App, packed: Any, tiny: Path, tmp_path: Path) -> None:
    program = unpacked(packed("--bundle", tiny), tmp_path)
    with talking(app.classpath, tmp_path, arm(program)) as client:
        assert client.until("model")["model"] == "q8_0"
        client.until("state", "READY")
        text, end = client.answer("hello", 12)
        assert end in ("CUT", "COMPLETE") and text
        client.do("begin", text="hello", tokens=400)
        client.until("piece")
        client.do("stop")
        assert client.until("end")["end"] == "STOPPED"  # and ready again, which was said before
        (running,) = engine_of(program)
        os.kill(running, signal.SIGKILL)
        state = client.until("state", "FAILED")
        assert state["failure"] == "NOT_ENOUGH_MEMORY"  # what Android's low-memory killer does
        client.do("load")
        client.until("state", "READY")
        assert client.answer("hello", 12)[0] == text
        client.process.kill()
        assert gone_within(program, 2.0)


@pytest.mark.model
def test_the_real_model_answers_on_arm_as_it_does_here(
    app: App, packed: Any, real_base: Path, llama_adapter: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    adapter = make_adapter(tmp_path_factory.mktemp("real") / "adapter", real_base, rank=4, alpha=0.1)
    job = AdapterJob(adapter, real_base, workspace=tmp_path / "runs", config=ExportConfig(quant="q4_0"))
    export_adapter(job, Silent())
    program = unpacked(packed("--bundle", job.directory), tmp_path)
    words = " ".join(neutral_texts()).split()
    prompts = [" ".join(words[at : at + 12]) for at in range(0, 144, 12)]
    with talking(app.classpath, tmp_path, arm(program)) as client:
        client.until("state", "READY")
        theirs = [client.answer(prompt, 1)[0].strip() for prompt in prompts]
    with LlamaCpp(job.directory / "model.gguf", 512) as runtime:
        template = template_of(GgufFile(job.directory / "model.gguf"))
        ours = [runtime.decode(runtime.greedy(runtime.encode(template.prompt(prompt)), 1)).strip() for prompt in prompts]
    # Template, tokenizer and client; where two tokens are nearly as likely, ARM's rounding of activations may choose the other one.
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 10, (ours, theirs)
