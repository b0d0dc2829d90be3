"""The recipe of the phone engine: what the compiler is told, that shared parts are compiled once, and that nothing half-made is trusted."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cdcda_engine import build
from cdcda_engine.variants import VARIANTS
from cdcda_export.cache import cache_folder
from cdcda_export.converter import SDIST_VARIABLE, converter_version
from cdcda_export.errors import BuildError, MissingDependency
from cdcda_export.progress import Silent
from cdcda_mobile.cli import main

# Scripts in the place of the tools: cmake notes what it is told, ninja "compiles" programs that say for which cores.
CMAKE = """
args = dict(word[2:].partition("=")[::2] for word in sys.argv if word.startswith("-D"))
target = pathlib.Path(sys.argv[sys.argv.index("-B") + 1])
assert os.access(args["CMAKE_C_COMPILER"], os.X_OK) and "-march" not in " ".join(sys.argv)
assert pathlib.Path(args["CMAKE_PROJECT_INCLUDE"]).read_text().count("target_compile_options") == 1
told = {"target": target.name, "cpu": args["CDCDA_CPU"], "cc": open(args["CMAKE_C_COMPILER"]).read(), "args": args}
library = os.environ.get("ZIG_LIB_DIR")
tables = ("libc/include/x86_64-linux-musl/bits/syscall.h", "std/os/linux/syscalls.zig")
told = json.dumps(told | {"calls": [open(f"{library}/{table}").read() for table in tables] if library else None})
open(ran, "a").write(told + "\\n")
target.mkdir(exist_ok=True)
(target / "cpu").write_text(args["CDCDA_CPU"])
"""
NINJA = """
target = pathlib.Path(sys.argv[sys.argv.index("-C") + 1])
fails = {fails!r}
if fails and fails in (target / "cpu").read_text():
    sys.exit("a.c:1:1: error: unknown target CPU")
(target / "bin").mkdir(exist_ok=True)
for name in ("llama-server", "llama-bench", "llama-perplexity"):
    (target / "bin" / name).write_text((target / "cpu").read_text())
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Lays out the tools and the sources; returns the file in which cmake notes its runs."""
    python, ran, folder = sys.executable, tmp_path / "ran", tmp_path / "tools"

    def lay_out(fails: str = "") -> Path:
        folder.mkdir(exist_ok=True)
        for name, body in (("cmake", CMAKE), ("ninja", NINJA.format(fails=fails))):
            (folder / name).write_text(f"#!{python}\nimport json, os, pathlib, sys\nran = {str(ran)!r}\n{body}")
            (folder / name).chmod(0o755)
        return ran

    zig = tmp_path / "ziglang"
    for machine, calls in (("aarch64", ("ppoll", "mount")), ("x86_64", ("poll", "ppoll", "mount", "arch_prctl"))):
        header = zig / f"lib/libc/include/{machine}-linux-musl/bits/syscall.h"
        header.parent.mkdir(parents=True)
        header.write_text("".join(f"#define {kind}_{call} {n}\n" for kind in ("__NR", "SYS") for n, call in enumerate(calls)))
    for name in ("LICENSE", "lib/libc/musl/COPYRIGHT", *(f"lib/{one}/LICENSE.TXT" for one in ("libcxx", "libcxxabi", "libunwind"))):
        (zig / name).parent.mkdir(parents=True, exist_ok=True)
        (zig / name).write_text(name)
    enums = (f"pub const {name} = enum(usize) {{\n    poll = 7,\n    ppoll = 271,\n}};\n" for name in ("X86", "X64", "X32"))
    (zig / "lib" / "std" / "os" / "linux").mkdir(parents=True)
    (zig / "lib" / "std" / "os" / "linux" / "syscalls.zig").write_text("".join(enums))
    root = f"llama_cpp_python-{converter_version()}/vendor/llama.cpp"
    names = ("CMakeLists.txt", "LICENSE", "licenses/LICENSE-jsonhpp", "vendor/cpp-httplib/LICENSE")
    with tarfile.open(tmp_path / "sources.tar.gz", "w:gz") as archive:
        for name in (*names, *(f"tools/{tool}/main.cpp" for tool in ("server", "llama-bench", "perplexity"))):
            member = tarfile.TarInfo(f"{root}/{name}")
            member.size = 9
            archive.addfile(member, io.BytesIO(b"int main;"))
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr(build, "_zig", lambda: (zig / "zig", "9.9"))
    monkeypatch.setenv(SDIST_VARIABLE, str(tmp_path / "sources.tar.gz"))
    monkeypatch.setenv("CDCDA_CACHE", str(tmp_path / "cache"))
    return lay_out


def test_every_variant_is_made_in_the_tree_of_its_target_and_kept(tools: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    ran = tools()
    assert build.engine() is None
    assert main(["build-engine", "--quiet"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder == build.engine() == build.build_engine(Silent())
    told = [json.loads(line) for line in ran.read_text().splitlines()]
    # The plainest of each target first; the others compile in the same tree what differs.
    assert [(one["target"], one["cpu"]) for one in told] == [(v.target, v.cpu) for v in reversed(VARIANTS.values())]
    for name, variant in VARIANTS.items():
        assert {(folder / name / program).read_text() for program in build.PROGRAMS} == {variant.cpu}
    assert f'cc -target aarch64-linux-musl -ffile-prefix-map={folder}.partial=. "$@"' in told[1]["cc"]
    # For emulators without the old calls, of which Android's sandbox knows none; for phones with zig's library as it is.
    (header, table), *of_phones = [one["calls"] for one in told]
    assert re.findall(r"(\w+) \d", header) == [f"{kind}_{call}" for kind in ("__NR", "SYS") for call in ("ppoll", "mount", "arch_prctl")]
    assert re.findall(r"X\d\d|p{1,2}oll", table) == ["X86", "poll", "ppoll", "X64", "ppoll", "X32", "poll", "ppoll"]
    assert of_phones == [None, None, None]
    linked = told[0]["args"]["CMAKE_EXE_LINKER_FLAGS"]
    assert "-static" in linked and "max-page-size=16384" in linked and told[0]["args"]["GGML_NATIVE"] == "OFF"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*VARIANTS, "facts.json", "licences"])
    assert {path.name for path in (folder / "licences").iterdir()} >= {"llama.cpp.txt", "musl.txt", "jsonhpp.txt", "cpp-httplib.txt"}


def test_a_variant_that_cannot_be_compiled_leaves_nothing(tools: Callable[..., Path]) -> None:
    tools(fails="i8mm")
    with pytest.raises(BuildError, match=r"the engine \(arm64-i8mm\) cannot be compiled \(a.c:1:1: error: unknown target CPU\)"):
        build.build_engine(Silent())
    assert build.engine() is None
    assert [path.name for path in (cache_folder() / "engines").iterdir() if path.is_dir()] == []


def test_without_a_compiler_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert build.engine() is None
    with pytest.raises(MissingDependency, match=r"ziglang .*cdcda-mobile\[phone\]"):
        build.build_engine(Silent())
