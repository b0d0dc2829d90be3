"""The set-up scripts: the wheel's key, progress, messages, the stamp, and the rule about skips."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import llama_wheel  # noqa: E402
import set_up  # noqa: E402
import setup_errors  # noqa: E402
import strict_skips  # noqa: E402
import system_packages  # noqa: E402
from llama_wheel import WheelJob, WheelKey  # noqa: E402

KEY = WheelKey("0.3.36", "-DLLAVA_BUILD=OFF", "", "x86_64", "model=2", "g++ 12.2.0", "glibc 2.36")
CPUINFO = "processor\t: {n}\nvendor_id\t: GenuineIntel\nmodel\t\t: 143\ncpu MHz\t\t: {mhz}\nflags\t\t: {flags}\n"


@pytest.mark.parametrize("field", ["version", "cmake_args", "flags", "machine", "cpu", "compiler", "libc"])
def test_key_changes_with_everything_that_changes_the_machine_code(field: str) -> None:
    assert KEY.digest() == replace(KEY).digest()
    assert KEY.digest() != replace(KEY, **{field: "another"}).digest()


def test_cpu_identity_ignores_clock_and_core_number_but_not_instructions() -> None:
    one = llama_wheel.cpu_identity(CPUINFO.format(n=0, mhz=2000, flags="avx avx2"))
    two = llama_wheel.cpu_identity(CPUINFO.format(n=0, mhz=2100, flags="avx2 avx") + "\n" + CPUINFO.format(n=1, mhz=3000, flags="avx avx2"))
    assert one == two
    assert one != llama_wheel.cpu_identity(CPUINFO.format(n=0, mhz=2000, flags="avx avx2 amx_int8"))


def test_key_of_this_machine_sees_the_users_cmake_arguments() -> None:
    plain = llama_wheel.key_of_this_machine("1", {"PATH": os.environ["PATH"]})
    cuda = llama_wheel.key_of_this_machine("1", {"PATH": os.environ["PATH"], "CMAKE_ARGS": "-DGGML_CUDA=on"})
    assert plain.cmake_args == "-DLLAVA_BUILD=OFF"
    assert cuda.cmake_args == "-DLLAVA_BUILD=OFF -DGGML_CUDA=on"
    assert plain.compiler != "none"


def test_the_compiler_leaves_amx_out_and_takes_the_users_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = llama_wheel.key_of_this_machine("1", {"PATH": os.environ["PATH"]})
    tuned = llama_wheel.key_of_this_machine("1", {"PATH": os.environ["PATH"], "CXXFLAGS": "-g"})
    assert (plain.flags, tuned.flags) == ("-U__AMX_INT8__", "-U__AMX_INT8__ -g")
    monkeypatch.setenv("CXXFLAGS", "-g")
    seen = tmp_path / "seen"
    body = f"import os\nopen({str(seen)!r}, 'w').write(os.environ['CXXFLAGS'])\n{BUILDS}"
    wait(WheelJob(KEY, tmp_path / "cache", fake_pip(tmp_path, body), tmp_path / "log"))
    assert seen.read_text() == "-U__AMX_INT8__ -g"


def test_the_llama_cpp_here_is_one_without_amx() -> None:
    import llama_cpp

    libraries = [*Path(llama_cpp.__file__).parent.glob("lib/libggml-cpu*")]
    assert libraries and all(b"amx_mul_mat" not in library.read_bytes() for library in libraries)


def test_pinned_version_reads_the_constraints_and_misses_lookalikes() -> None:
    text = "llama-cpp-python-extra==9\nllama-cpp-python==0.3.36 ; python_version >= '3.11'\n"
    assert llama_wheel.pinned_version(text) == "0.3.36"
    with pytest.raises(setup_errors.SetupError, match="does not pin"):
        llama_wheel.pinned_version("llama-cpp-python>=0.3\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  [57/140] /usr/bin/g++ -DGGML_BUILD -c ggml.c", (57, 140)),
        ("[ 41%] Building CXX object ggml.cpp.o", (41, 100)),
        ("  -- Installing: /tmp/x/libllama.so", None),
        ("warning: array[3/4]", None),
    ],
)
def test_progress_is_read_from_the_compilers_lines(line: str, expected: tuple[int, int] | None) -> None:
    assert llama_wheel.parse_progress(line) == expected


def test_progress_text_says_how_far_and_how_long() -> None:
    assert llama_wheel.progress_text(0, 0, 7, 0) == "llama.cpp: fetching the sources, 0:07"
    assert llama_wheel.progress_text(2, 140, 15, 3) == "llama.cpp: compiled 2 of 140 files, 0:15 gone"
    assert llama_wheel.progress_text(70, 140, 110, 100) == "llama.cpp: compiled 70 of 140 files, 1:50 gone, about 1:40 left"


def make_wheel(folder: Path) -> Path:
    """A file that passes for the wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llama_cpp/__init__.py", "")
    return wheel


def fake_pip(tmp_path: Path, body: str) -> Path:
    """An executable in the place of the venv's Python; ``pip wheel`` is then this script."""
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport sys, time, zipfile, pathlib\nargs = sys.argv\n{body}\n")
    script.chmod(0o755)
    return script


BUILDS = """
print("  [1/2] g++ a.cpp", flush=True)
print("  [2/2] g++ b.cpp", flush=True)
out = pathlib.Path(args[args.index("--wheel-dir") + 1])
out.mkdir()
with zipfile.ZipFile(out / "llama_cpp_python-0.3.36-py3-none-any.whl", "w") as archive:
    archive.writestr("a", "b")
"""


def wait(job: WheelJob, seconds: float = 20) -> None:
    """Poll a job to its end."""
    end = time.monotonic() + seconds
    while not job.poll():
        assert time.monotonic() < end, job.note
        time.sleep(0.02)


def test_a_wheel_in_the_cache_is_taken_and_nothing_runs(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / KEY.digest())
    job = WheelJob(KEY, tmp_path, tmp_path / "no-such-python", tmp_path / "log")
    assert job.poll()
    assert job.wheel == wheel


def test_a_truncated_wheel_is_not_trusted(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    wheel.write_bytes(wheel.read_bytes()[:-30])
    assert llama_wheel.find_wheel(tmp_path) is None


def test_a_compile_ends_as_one_wheel_with_its_key_beside_it(tmp_path: Path) -> None:
    job = WheelJob(KEY, tmp_path / "cache", fake_pip(tmp_path, BUILDS), tmp_path / "log")
    (job.folder / "build-of-a-killed-set-up").mkdir(parents=True)
    wait(job)
    assert job.wheel is not None and zipfile.is_zipfile(job.wheel)
    assert sorted(path.name for path in job.folder.iterdir()) == ["key.json", job.wheel.name, "lock"]
    assert json.loads((job.folder / "key.json").read_text())["compiler"] == "g++ 12.2.0"


def test_two_set_ups_compile_once(tmp_path: Path) -> None:
    marker = tmp_path / "runs"
    python = fake_pip(tmp_path, f"open({str(marker)!r}, 'a').write('x')\ntime.sleep(0.5)\n{BUILDS}")
    first, second = (WheelJob(KEY, tmp_path / "cache", python, tmp_path / name) for name in ("log1", "log2"))
    assert not first.poll() and not second.poll()
    assert "another set-up" in second.note
    wait(first)
    wait(second)
    assert first.wheel == second.wheel
    assert marker.read_text() == "x"


def test_a_failed_compile_shows_the_end_of_its_log_and_leaves_no_wheel(tmp_path: Path) -> None:
    python = fake_pip(tmp_path, "for n in range(30): print('line', n)\nsys.exit(1)")
    job = WheelJob(KEY, tmp_path / "cache", python, tmp_path / "log")
    with pytest.raises(setup_errors.SetupError) as caught:
        wait(job)
    job.stop()
    lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines[:-1]] == [f"line {n}" for n in range(10, 30)]
    assert str(tmp_path / "log") in lines[-1]
    assert sorted(path.name for path in job.folder.iterdir()) == ["key.json", "lock"]


def test_stopping_ends_the_compiler_and_lets_the_next_one_in(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    body = f"import os\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    job = WheelJob(KEY, tmp_path / "cache", fake_pip(tmp_path, body), tmp_path / "log")
    job.poll()
    while not (pid_file.exists() and pid_file.read_text()):
        time.sleep(0.02)
    job.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert list(job.folder.glob("build-*")) == []
    following = WheelJob(KEY, tmp_path / "cache", fake_pip(tmp_path, BUILDS), tmp_path / "log")
    wait(following)
    assert following.wheel is not None


def test_missing_packages_are_named_in_one_sentence() -> None:
    sentence = system_packages.missing_sentence(["python3-venv", "g++"], has_apt=True)
    assert "sudo apt-get install python3-venv g++" in sentence
    assert "\n" not in sentence and sentence.count(". ") == 0
    assert "Debian calls postgresql" in system_packages.missing_sentence(["postgresql"], has_apt=False)


def test_a_bare_machine_lacks_compiler_and_server(tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path)}
    assert not system_packages.has_compiler(env)
    assert not system_packages.has_postgresql(env, pattern=str(tmp_path / "*/initdb"))
    assert "g++" in system_packages.missing_packages(env, for_tests=False)
    for name in ("cc", "c++", "initdb", *system_packages._FOR_TESTS):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert system_packages.has_compiler(env)
    assert system_packages.has_postgresql(env, pattern="")
    assert system_packages.missing_packages(env, for_tests=True) == []


def test_without_rights_nothing_is_installed_and_the_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # neither apt-get nor sudo
    with pytest.raises(setup_errors.SetupError, match="postgresql"):
        system_packages.ensure(["postgresql"], io.StringIO())


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("error: Failed to fetch: `x`\n  Caused by: dns error: failed to lookup address", "cannot be reached"),
        ("WARNING: Retrying ... NewConnectionError: Temporary failure in name resolution", "cannot be reached"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("  invalid peer certificate: UnknownIssuer", "SSL_CERT_FILE"),
    ],
)
def test_known_causes_become_one_sentence(log: str, words: str) -> None:
    text = setup_errors.failure_text("Installing packages", f"before\n{log}\nafter", Path("setup.log"))
    assert words in text and "\n" not in text and "setup.log" in text


def test_unknown_causes_show_the_log() -> None:
    assert setup_errors.failure_text("Compiling", "boom", Path("x.log")).splitlines()[0].strip() == "boom"


def make_checkout(root: Path) -> set_up.Venv:
    """A checkout whose venv looks complete."""
    (root / "pyproject.toml").write_text("[project]\n")
    (root / "constraints.txt").write_text("numpy==2\n")
    venv = set_up.Venv(root)
    venv.python.parent.mkdir(parents=True)
    venv.python.write_text("")
    (venv.folder / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.7\n")
    stamp = {"root": str(root), "fingerprint": set_up.fingerprint(venv, {}), "extras": ["train"]}
    venv.stamp.write_text(json.dumps(stamp))
    return venv


def test_the_stamp_is_believed_until_something_changes(tmp_path: Path) -> None:
    venv = make_checkout(tmp_path)
    assert set_up.is_current(venv, ["train"], {})
    assert not set_up.is_current(venv, ["data"], {}), "an extra that was never installed"
    assert not set_up.is_current(venv, ["train"], {"CMAKE_ARGS": "-DGGML_CUDA=on"})
    assert not set_up.is_current(venv, ["train"], {"CXXFLAGS": "-g"})
    (tmp_path / "constraints.txt").write_text("numpy==3\n")
    assert not set_up.is_current(venv, ["train"], {})
    assert venv.usable(), "new constraints are installed on top"


def test_a_half_written_moved_or_old_venv_is_not_used(tmp_path: Path) -> None:
    venv = make_checkout(tmp_path)
    venv.incomplete.touch()
    assert not venv.usable()
    venv.incomplete.unlink()
    venv.stamp.write_text(json.dumps({"root": "/elsewhere"}))
    assert not venv.usable()
    venv.stamp.write_text("{ not json")
    assert venv.usable()
    (venv.folder / "pyvenv.cfg").write_text("version = 3.9.2\n")
    assert not venv.usable()


def test_the_mark_survives_a_kill_but_not_an_installers_own_failure(tmp_path: Path) -> None:
    venv = make_checkout(tmp_path)
    with pytest.raises(setup_errors.SetupError), set_up.half_written(venv):
        raise setup_errors.SetupError("no network")
    assert venv.usable()
    with pytest.raises(KeyboardInterrupt), set_up.half_written(venv):
        raise KeyboardInterrupt
    assert not venv.usable()


def test_uv_learns_what_pip_was_told(tmp_path: Path) -> None:
    config = ":env:.disable-pip-version-check='1'\nglobal.cert='/ca.pem'\nglobal.index-url='/srv/index/simple'\n"
    env = set_up.uv_environment(config, {"SSL_CERT_FILE": "/own.pem"}, same_disk=False)
    assert env["UV_DEFAULT_INDEX"] == "/srv/index/simple"
    assert env["SSL_CERT_FILE"] == "/own.pem", "what is set for uv wins"
    assert env["UV_LINK_MODE"] == "copy"
    assert "UV_DEFAULT_INDEX" not in set_up.uv_environment("", {}, same_disk=True)


def test_uv_leaves_llama_out_until_the_wheel_is_there(tmp_path: Path) -> None:
    venv = make_checkout(tmp_path)
    before = set_up.uv_command(venv, ["train"], None)
    override = Path(before[before.index("--overrides") + 1])
    assert override.read_text().startswith("llama-cpp-python; ")
    after = set_up.uv_command(venv, ["train", "dev"], Path("/cache/key/llama.whl"))
    assert after[-1] == f"{tmp_path}[train,dev]"
    assert after[after.index("--only-binary") + 1] == "llama-cpp-python", "uv must never start a second compile"
    assert after[after.index("--reinstall-package") + 1] == "llama-cpp-python", "what is there may have been compiled with other flags"


def test_a_terminal_gets_one_live_line_and_a_file_gets_few() -> None:
    live, plain = io.StringIO(), io.StringIO()
    screen = set_up.Screen(live, live=True)
    screen.update("one")
    screen.update("two")
    screen.say("done")
    assert live.getvalue() == "\r\033[Kone\r\033[Ktwo\r\033[Kdone\n"
    quiet = set_up.Screen(plain, live=False)
    for _ in range(50):
        quiet.update("working")
    quiet.say("done")
    assert plain.getvalue() == "done\n"


def test_a_second_set_up_answers_at_once() -> None:
    """Runs the real script on this checkout; only the stamp of `make test` makes that cheap."""
    venv = set_up.Venv(ROOT)
    if not set_up.is_current(venv, ["all"], os.environ):
        pytest.skip("this checkout was not set up by `make test`")
    began = time.monotonic()
    done = subprocess.run([ROOT / "scripts" / "setup.sh", "--extras", "train"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - began < 2


def test_an_unknown_extra_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "set_up.py", "--extras", "trian"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "trian" in done.stderr


def test_no_python_is_one_sentence(tmp_path: Path) -> None:
    for tool in ("dirname", "id"):
        (tmp_path / tool).symlink_to(Path("/usr/bin") / tool)
    done = subprocess.run(
        ["/bin/sh", ROOT / "scripts" / "setup.sh"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Python 3.11 or newer is needed") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("reason", "allowed"),
    [
        ("Skipped: needs a GPU", True),
        ("Skipped: CUDA is not available", True),
        ("Skipped: CDCDA_DATA is not set", True),
        ("Skipped: could not import 'pyarrow'", False),
        ("Skipped: no PostgreSQL here", False),
    ],
)
def test_which_skips_ci_allows(reason: str, allowed: bool) -> None:
    assert strict_skips.is_allowed(reason) is allowed


SKIPPING = """
import pytest

@pytest.mark.skip(reason="needs a GPU")
def test_gpu(): pass

@pytest.mark.skip(reason="too slow today")
def test_slow(): pass

@pytest.mark.xfail(reason="known")
def test_known(): assert False

def test_good(): pass
"""


@pytest.mark.parametrize(("ci", "outcome"), [("true", "1 passed, 1 skipped, 1 xfailed, 1 error"), ("", "1 passed, 2 skipped, 1 xfailed")])
def test_a_skip_fails_in_ci_only(tmp_path: Path, ci: str, outcome: str) -> None:
    (tmp_path / "test_x.py").write_text(SKIPPING)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    env = {**os.environ, "CI": ci, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "pytest", "-p", "strict_skips", "-p", "no:cacheprovider", "-rs", "--no-header", "-q", "."]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert outcome in done.stdout, done.stdout
    assert done.returncode == (1 if ci else 0)


def test_a_module_that_skips_itself_fails_in_ci(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    env = {**os.environ, "CI": "true", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "pytest", "-p", "strict_skips", "-p", "no:cacheprovider", "-q", "."]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert "1 error" in done.stdout and done.returncode != 0


def test_the_tests_need_programs_of_llama_cpp_and_say_so(tmp_path: Path) -> None:
    venv = make_checkout(tmp_path)
    command = venv.folder / "bin" / "cdcda"
    command.write_text(f"#!{sys.executable}\nimport sys\nopen({str(tmp_path / 'told')!r}, 'a').write(sys.argv[1])\n")
    command.chmod(0o755)
    set_up.build_programs(venv)
    assert (tmp_path / "told").read_text() == "build-serverbuild-engine"
    command.write_text(f"#!{sys.executable}\nraise SystemExit(1)\n")
    with pytest.raises(setup_errors.SetupError, match="need what `cdcda build-server` makes"):
        set_up.build_programs(venv)


def test_sigterm_to_a_set_up_cleans_up(tmp_path: Path) -> None:
    """The whole script on a made-up checkout whose pip never ends: SIGTERM must end the compiler and leave the mark."""
    venv = make_checkout(tmp_path)
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for source in (ROOT / "scripts").iterdir():
        if source.is_file():
            (scripts / source.name).write_bytes(source.read_bytes())
    (tmp_path / "constraints.txt").write_text("llama-cpp-python==0.3.36\nuv==1\n")
    sleeper = f"#!{sys.executable}\nimport sys, time\nif 'config' in sys.argv: sys.exit()\ntime.sleep(60)\n"
    for path in (venv.python, venv.uv):
        path.write_text(sleeper)
        path.chmod(0o755)
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, str(scripts / "set_up.py")], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("cache/cdcda/wheels/*/build-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.startswith("Stopped.") and "Traceback" not in stderr
    assert venv.incomplete.exists() and not venv.usable()
    assert list(tmp_path.glob("cache/cdcda/wheels/*/build-*")) == []
