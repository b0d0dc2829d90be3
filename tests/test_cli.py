"""Bad input through the commands: one clear sentence, a non-zero exit, nothing lost and nothing half-trusted."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdcda_export.manifest import sha256_file
from cdcda_mobile.cli import export_main, main
from cdcda_mobile.workspace import Workspace
from fake_endpoint import FakeEndpoint, Reply, chat, failure, serving
from job import USER, Desk, command, environment, finish, hashes, set_table, spawn, wait_until, write_history
from tiny import make_adapter, make_gguf

Capture = pytest.CaptureFixture[str]
ARTIFACT = "gguf-q4_0/model.gguf"


@pytest.fixture(autouse=True)
def no_teacher_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[FakeEndpoint]:
    with FakeEndpoint() as served:
        yield served


@pytest.fixture(scope="module")
def finished(endpoint: FakeEndpoint, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A job that is done; nobody writes here."""
    desk = set_table(tmp_path_factory.mktemp("finished"), endpoint)
    assert export_main(desk.arguments()) == 0
    return desk


@pytest.fixture
def desk(finished: Desk, tmp_path: Path) -> Desk:
    """The finished job's table with a copy of its runs, for one test to spoil."""
    shutil.copytree(finished.runs, tmp_path / "runs")
    return Desk(tmp_path, finished.base, finished.teacher)


def arguments_of(desk: Desk, finished: Desk, *more: object) -> list[str]:
    """Arguments that read the finished table's files and write to the copy."""
    return finished.arguments(*more, workspace=desk.runs)


def refused(argv: list[str], capsys: Capture, says: str, prog: str = "cdcda-export") -> str:
    """Run and hold the command to one sentence."""
    capsys.readouterr()
    try:
        code = main(argv) if prog != "cdcda-export" else export_main(argv)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    assert code not in (0, None), err
    sentence = err.strip().splitlines()[-1]
    assert sentence.startswith(f"{prog}: "), err
    assert says in sentence, sentence
    assert "Traceback" not in err
    assert out == ""
    return sentence


def spoiled(path: Path, how: str) -> Path:
    """A base that is none."""
    if how == "text":
        path.write_text("not a model\n" * 50)
    elif how == "truncated":
        data = make_gguf(path).read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])
    elif how == "head":
        path.write_bytes(make_gguf(path).read_bytes()[:100])
    elif how == "directory":
        path.mkdir()
    elif how == "mamba":
        make_gguf(path, **{"general.architecture": "mamba"})
    return path


BASES = {
    "absent": "base.gguf",
    "text": "base.gguf",
    "truncated": "truncated",
    "head": "base.gguf",
    "directory": "holds no config.json",
    "mamba": "mamba",
}


@pytest.mark.parametrize("how", BASES)
def test_bases_that_cannot_be_exported(how: str, desk: Desk, finished: Desk, capsys: Capture) -> None:
    before = hashes(desk.runs)
    base = spoiled(desk.folder / "base.gguf", how)
    refused(arguments_of(desk, finished, "--base", base), capsys, BASES[how])
    assert hashes(desk.runs) == before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--user", "anm"], "Did you mean 'ann'?"),
        (["--user", "../../etc"], "looks like a path"),
        (["--user", ""], "user id is empty"),
        (["--quant", "q4_k_m"], "multiple of 256"),
        (["--quant", "int8"], "no quantization 'int8'"),
        (["--quant", "q4_O"], "no quantization 'q4_O'"),
        (["--format", "ggfu"], "Did you mean 'gguf'?"),
        (["--fromat", "gguf"], "Did you mean '--format'?"),
        (["--redo", "trian"], "no stage 'trian'"),
        (["--recipe", "qiuck"], "Did you mean 'quick'?"),
        (["--adapter", "somewhere"], "exclude each other"),
        (["--text", "own.txt"], "--text goes with --adapter"),
        (["--rank", "eight"], "invalid int value: 'eight'"),
        (["--rank", "0"], "must be at least 1"),
        (["--keep", "-1"], "0 or more"),
        (["--data", "history.txt"], "no source of histories"),
        (["--base"], "expected one argument"),
    ],
)
def test_options_that_make_no_sense(more: list[str], says: str, desk: Desk, finished: Desk, capsys: Capture) -> None:
    before, beside = hashes(desk.runs), sorted(desk.folder.iterdir())
    refused(arguments_of(desk, finished, *more), capsys, says)
    assert hashes(desk.runs) == before
    assert sorted(desk.folder.iterdir()) == beside


def test_neither_user_nor_adapter_and_unknown_verbs(capsys: Capture) -> None:
    refused([], capsys, "--user")
    refused(["chatt"], capsys, "chat", prog="cdcda")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[train]\nranks = 3", "Did you mean 'rank'?"),
        ("[trian]\nrank = 3", "Did you mean 'train'?"),
        ("[train]\nrank = 'three'", "must be of type int"),
        ("[train\n", "not valid TOML"),
    ],
)
def test_recipes_that_make_no_sense(text: str, says: str, desk: Desk, finished: Desk, capsys: Capture) -> None:
    recipe = desk.folder / "own.toml"
    recipe.write_text(text)
    refused(arguments_of(desk, finished, "--recipe", recipe), capsys, says)


def test_empty_and_short_histories(tmp_path: Path, finished: Desk, capsys: Capture) -> None:
    empty, short = tmp_path / "empty.jsonl", write_history(tmp_path / "short.jsonl", count=5)
    empty.write_text("")
    refused(finished.arguments("--data", empty, workspace=tmp_path / "a"), capsys, "is empty")
    refused(finished.arguments("--data", short, workspace=tmp_path / "b"), capsys, "5 usable records, but 20 are needed")


def other_kind(directory: Path, base: Path) -> None:
    make_adapter(directory, base, peft_type="IA3")


def pickled(directory: Path, base: Path) -> None:
    make_adapter(directory, base)
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def wider(directory: Path, base: Path) -> None:
    make_adapter(directory, make_gguf(directory.parent / "wide.gguf", hidden=128))


def grown(directory: Path, base: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    make_adapter(directory, base)
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = np.zeros((9000, 64), np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("make", "says"), [(other_kind, "type IA3"), (pickled, "pickle"), (wider, "_proj changes a ["), (grown, "vocabulary was grown")]
)
def test_adapters_that_do_not_fit(make: Callable[[Path, Path], None], says: str, tmp_path: Path, llama_base: Path, capsys: Capture) -> None:
    argv = ["--adapter", str(tmp_path / "adapter"), "--base", str(llama_base), "--workspace", str(tmp_path / "runs"), "--quant", "q8_0"]
    make_adapter(tmp_path / "adapter", llama_base)
    assert export_main([*argv, "--quiet"]) == 0
    model = tmp_path / "runs" / "_adapters" / "adapter" / "gguf-q8_0" / "model.gguf"
    before = sha256_file(model)
    shutil.rmtree(tmp_path / "adapter")
    make(tmp_path / "adapter", llama_base)
    refused([*argv, "--quiet"], capsys, says)
    assert sha256_file(model) == before


def test_an_adapter_of_another_base_is_warned_about(tmp_path: Path, llama_base: Path, capsys: Capture) -> None:
    make_adapter(tmp_path / "adapter", llama_base, base_model_name_or_path="somebody/Other-7B")
    argv = ["--adapter", str(tmp_path / "adapter"), "--base", str(llama_base), "--workspace", str(tmp_path / "runs"), "--quant", "q8_0"]
    assert export_main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert any("somebody/Other-7B" in warning for warning in json.loads(out)["warnings"])
    assert "somebody/Other-7B" in err


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (failure(401), "does not accept requests without a key"),
        (failure(429, headers={"Retry-After": "0"}), "limits the rate"),
        (failure(500, headers={"Retry-After": "0"}), "keeps failing"),
        (chat("I would rather not."), "None of the teacher's"),
        (Reply(body='{"x": 1}'), "no chat completion"),
        (Reply(body="<html><h1>It works!</h1></html>", headers={"Content-Type": "text/html"}), "a web page"),
    ],
)
def test_teachers_that_do_not_teach(reply: Reply, says: str, desk: Desk, finished: Desk, capsys: Capture) -> None:
    before = sha256_file(desk.run / ARTIFACT)
    with serving(lambda body: reply) as bad:
        argv = [*arguments_of(desk, finished, "--seed", 5), "--teacher-base-url", bad.url]  # 0 has its answers
        refused(argv, capsys, says)
    assert sha256_file(desk.run / ARTIFACT) == before
    assert export_main(arguments_of(desk, finished)) == 0  # and what was there before is still finished


def test_a_teacher_that_is_not_there(tmp_path: Path, finished: Desk, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    argv = [*finished.arguments(workspace=tmp_path / "runs"), "--teacher-base-url", f"http://127.0.0.1:{port}/v1"]
    refused(argv, capsys, "cannot be reached")


STAGES = ("history", "augment", "adapter", "gguf-q4_0")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("content", ["", '{"stage": "x"', "[]", '{"schema": 99}'])
def test_a_corrupted_manifest_is_named_and_redo_repairs_it(stage: str, content: str, desk: Desk, finished: Desk, capsys: Capture) -> None:
    before = sha256_file(desk.run / ARTIFACT)
    (desk.run / stage / "manifest.json").write_text(content)
    for more in ([], ["--dry-run"]):
        refused(arguments_of(desk, finished, *more), capsys, f"--redo {stage}")
    assert sha256_file(desk.run / ARTIFACT) == before
    if content == "":
        assert export_main(arguments_of(desk, finished, "--redo", stage)) == 0
        assert sha256_file(desk.run / ARTIFACT) == before


def test_a_corrupted_shared_base_is_built_anew(desk: Desk, finished: Desk) -> None:
    argv = arguments_of(desk, finished, "--format", "gguf-lora")
    assert export_main(argv) == 0
    manifest = next(desk.runs.glob("_shared/*/manifest.json"))
    manifest.write_text("{")
    assert export_main([*argv, "--redo", "export"]) == 0
    assert json.loads(manifest.read_text())["outputs"]


def test_a_changed_artifact_is_not_trusted(desk: Desk, finished: Desk, capsys: Capture) -> None:
    before = sha256_file(desk.run / ARTIFACT)
    with (desk.run / ARTIFACT).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    refused(["chat", str(desk.run), "--prompt", "hello"], capsys, "was changed", prog="cdcda chat")
    assert export_main(arguments_of(desk, finished)) == 0
    assert sha256_file(desk.run / ARTIFACT) == before


def test_a_second_process_on_the_same_user(desk: Desk, finished: Desk, capsys: Capture) -> None:
    with Workspace(desk.runs).locked(USER):
        refused(arguments_of(desk, finished), capsys, f"pid {os.getpid()}")
        refused(["forget", "--user", USER, "--workspace", str(desk.runs)], capsys, "Another process", prog="cdcda forget")
    assert export_main(arguments_of(desk, finished)) == 0


def test_another_source_or_base_in_the_same_workspace(desk: Desk, finished: Desk, capsys: Capture) -> None:
    before = sha256_file(desk.run / ARTIFACT)
    other = make_gguf(desk.folder / "other.gguf", seed=9)
    refused(arguments_of(desk, finished, "--base", other), capsys, "belongs to the base model")
    history = write_history(desk.folder / "other.jsonl")
    refused(arguments_of(desk, finished, "--data", history), capsys, "belongs to the data source")
    assert sha256_file(desk.run / ARTIFACT) == before


def limited(limit: int) -> Callable[[], None]:
    """What a full disk does to a process: writing on fails (a file may not grow over ``limit`` bytes)."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return prepare


@pytest.mark.parametrize(("limit", "redo"), [(2_000, "history"), (900, "augment"), (15_000, "adapter"), (60_000, "export")])
def test_no_room_left(limit: int, redo: str, desk: Desk, finished: Desk) -> None:
    before = sha256_file(desk.run / ARTIFACT)
    argv = command("export", *arguments_of(desk, finished, "--redo", redo))
    # Coverage's own data file would not fit either.
    measured_by_nobody = {key: value for key, value in environment().items() if not key.startswith("COV")}
    done = subprocess.run(
        argv, env=measured_by_nobody, preexec_fn=limited(limit), capture_output=True, text=True, timeout=120, check=False, cwd=desk.folder
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("cdcda export: ")
    assert "free some space" in done.stderr
    assert sha256_file(desk.run / ARTIFACT) == before
    assert export_main(arguments_of(desk, finished)) == 0
    assert sha256_file(desk.run / ARTIFACT) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_training_and_resumed(number: signal.Signals, tmp_path: Path, endpoint: FakeEndpoint, finished: Desk) -> None:
    desk = set_table(tmp_path, endpoint, finished.base, epochs=20)
    process = spawn(desk.arguments(), desk.folder)
    partial = desk.run / "adapter.partial"
    assert wait_until(lambda: any(partial.glob("checkpoint-*.safetensors")), process)
    process.send_signal(number)
    code, out, err = finish(process)
    assert (code, out) == (130, "")
    assert err.startswith("cdcda export: stopped.")
    assert "run the same command again" in err
    assert "Traceback" not in err
    assert any(partial.glob("checkpoint-*.safetensors"))
    asked = len(endpoint.requests)
    assert export_main(desk.arguments()) == 0
    assert len(endpoint.requests) == asked
    assert export_main(desk.arguments(workspace=tmp_path / "again")) == 0
    assert sha256_file(desk.run / ARTIFACT) == sha256_file(tmp_path / "again" / USER / ARTIFACT)
