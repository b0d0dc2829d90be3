"""Compile the engine: llama.cpp's own programs with zig, for phones and for this machine's emulator; once, kept in the cache folder.

The sources are those of the installed llama-cpp-python, so a phone runs the llama.cpp that verified the model. The programs are static
(musl) and stripped, their segments are aligned for pages of 16 KB, and the same inputs give the same bytes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cdcda_engine.variants import VARIANTS, Variant
from cdcda_export.cache import find
from cdcda_export.compiling import CMAKE, Build, compiled
from cdcda_export.converter import converter_version
from cdcda_export.errors import MissingDependency
from cdcda_export.manifest import sha256_file
from cdcda_export.progress import Progress

BUILD_COMMAND = "cdcda build-engine"
SERVER, BENCH, PERPLEXITY = PROGRAMS = ("llama-server", "llama-bench", "llama-perplexity")
_KIND = "engines"
_RECIPE = Path(__file__).with_name("engine.cmake")
_ALLOWED = Path(__file__).with_name("app_syscalls.json")
_HEADER = "libc/include/{}-linux-musl/bits/syscall.h"
# Where zig's library lists the system calls of x86_64: a part of a file, and a line of it that holds one of some names. A part of its libc
# is musl's, in C, the rest its own; the latter's table holds all processors, one after the other.
_CALLS = {
    _HEADER.format("x86_64"): [r".*", r"^#define (?:__NR|SYS)_(?:{})\s.*\n"],
    "std/os/linux/syscalls.zig": [r"pub const X64 = .*?\n}", r"^ *(?:{}) = .*\n"],
}
# Phones of 16 KB pages load no segment that is aligned to less.
_PAGE = 16384
_CMAKE = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DGGML_NATIVE=OFF",
    "-DGGML_OPENMP=OFF",
    "-DGGML_CPU_ARM_ARCH=",
    # What x86 has is said by -mcpu as well.
    *(f"-DGGML_{name}=OFF" for name in ("SSE42", "AVX", "AVX2", "AVX512", "BMI2", "FMA", "F16C")),
    "-DLLAMA_SUBPROCESS=OFF",  # an app starts nothing
    "-DLLAMA_BUILD_NUMBER=0",
    "-DLLAMA_BUILD_COMMIT=release",
    f"-DCMAKE_EXE_LINKER_FLAGS=-static -s -Wl,-z,max-page-size={_PAGE} -Wl,--build-id=none",
)


def _zig() -> tuple[Path, str]:
    """Return the compiler and its version.

    Raises:
        MissingDependency: the package ziglang is not installed.
    """
    try:
        found = importlib.util.find_spec("ziglang")
        if found is not None and found.origin is not None:
            return Path(found.origin).with_name("zig"), version("ziglang")
    except PackageNotFoundError:
        pass
    raise MissingDependency("ziglang (the compiler of the phone engine)", "phone")


def _inputs() -> dict[str, object]:
    """Return what decides the machine code."""
    recipe = {name: [variant.target, variant.cpu] for name, variant in VARIANTS.items()}
    files = {"hook": sha256_file(_RECIPE), "allowed": sha256_file(_ALLOWED)}
    return {"version": converter_version(), "zig": _zig()[1], "cmake": [*CMAKE, *_CMAKE], "calls": _CALLS, "variants": recipe, **files}


def engine() -> Path | None:
    """Return the folder of the engine, ``<variant>/<program>``, or None where it was not built yet (or cannot be)."""
    try:
        built = find(_KIND, _inputs())
    except MissingDependency:
        return None
    return built.directory if built else None


def build_engine(progress: Progress) -> Path:
    """Return the folder of the engine, ``<variant>/<program>``; compiled the first time, which takes about twenty minutes on two cores.

    Two processes compile it once, and one that was stopped leaves nothing that would be trusted. The compiler's words are in
    ``engines/build.log`` of the cache folder.

    Raises:
        MissingDependency: ziglang or llama-cpp-python is not installed.
        ConfigError: cmake or ninja is not there.
        FileError: the sources cannot be fetched, or the cache folder cannot be written.
        BuildError: it cannot be compiled.
        DiskFull: there is no room for it.
    """
    return compiled(_KIND, _inputs(), "the engine", progress, _make)


def _make(compiler: Build) -> dict[str, str]:
    zig, partial = _zig()[0], compiler.folder
    facts = compiler.unpack(("tools/server", "tools/llama-bench", "tools/perplexity", "licenses"))
    _keep_licences(compiler.sources, zig.parent, partial / "licences")
    library = _library_of_apps(zig.parent / "lib", partial / "zig" / "lib")
    # The plainest first: what all variants of a target share is compiled with it.
    for name, variant in reversed(VARIANTS.items()):
        compiler.what = f"the engine ({name})"
        environment = _environment(partial) | ({"ZIG_LIB_DIR": str(library)} if variant.abi == "x86_64" else {})
        made = compiler.make(variant.target, _options(zig, variant, partial), PROGRAMS, environment)
        (partial / name).mkdir()
        for program in PROGRAMS:
            shutil.copy2(made / program, partial / name / program)
    shutil.rmtree(partial / "zig")
    return facts


def _options(zig: Path, variant: Variant, partial: Path) -> list[str]:
    """Return cmake's options for a variant; the compilers are scripts of one line, because cmake wants programs without arguments."""
    folder = partial / "zig" / variant.target
    folder.mkdir(parents=True, exist_ok=True)
    # Paths of this machine would make other bytes elsewhere.
    plain = shlex.quote(f"-ffile-prefix-map={partial}=.")
    for name, words in {
        "cc": f"cc -target {variant.target} {plain}",
        "c++": f"c++ -target {variant.target} {plain}",
        "ar": "ar",
        "ranlib": "ranlib",
    }.items():
        script = folder / name
        if not script.exists():
            script.write_text(f'#!/bin/sh\nexec "{zig}" {words} "$@"\n')
            script.chmod(0o755)
    tools = {"C_COMPILER": "cc", "CXX_COMPILER": "c++", "AR": "ar", "RANLIB": "ranlib"}
    found = [f"-DCMAKE_{variable}={folder / name}" for variable, name in tools.items()]
    found += [f"-DCMAKE_SYSTEM_PROCESSOR={variant.target.partition('-')[0]}", f"-DCMAKE_PROJECT_INCLUDE={_RECIPE}"]
    return [*found, f"-DCDCDA_CPU={variant.cpu}", *_CMAKE]


def _library_of_apps(library: Path, target: Path) -> Path:
    """Return zig's library for x86_64 without the system calls that Android's sandbox forbids and that ARM never had.

    What libc does not know it does with a newer call, as on ARM: ``ppoll`` for ``poll``, ``openat`` for ``open``.
    """
    has = {machine: set(re.findall(r"__NR_(\w+)", (library / _HEADER.format(machine)).read_text())) for machine in ("x86_64", "aarch64")}
    old = "|".join(has["x86_64"] - has["aarch64"] - set(json.loads(_ALLOWED.read_text())["x86_64"]))
    shutil.copytree(library, target, copy_function=os.symlink)
    for name, (part, line) in _CALLS.items():
        text = (library / name).read_text()
        own = re.findall(part, text, re.DOTALL)[0]
        (target / name).unlink()  # a link to zig's
        (target / name).write_text(text.replace(own, re.sub(line.format(old), "", own, flags=re.MULTILINE)))
    return target


def _environment(partial: Path) -> dict[str, str]:
    """Return what zig and cmake are told: caches of zig's that end with the build, and no repository that the cache folder may lie in."""
    caches = {f"ZIG_{name}_CACHE_DIR": str(partial / "zig" / name.lower()) for name in ("GLOBAL", "LOCAL")}
    return {**caches, "GIT_CEILING_DIRECTORIES": str(partial.parent), "SOURCE_DATE_EPOCH": "0"}


def _keep_licences(sources: Path, zig: Path, target: Path) -> None:
    """Keep the licences of everything that is in the programs."""
    found = {"llama.cpp": sources / "LICENSE", "compiler-rt": zig / "LICENSE"}
    found |= {path.name.removeprefix("LICENSE-"): path for path in (sources / "licenses").iterdir()}
    found |= {path.parent.name: path for path in (sources / "vendor").glob("*/LICENSE")}
    library = zig / "lib"
    found |= {"musl": library / "libc" / "musl" / "COPYRIGHT"}
    found |= {name: library / name / "LICENSE.TXT" for name in ("libcxx", "libcxxabi", "libunwind")}
    target.mkdir()
    for name, path in found.items():
        (target / f"{name}.txt").write_bytes(path.read_bytes())
