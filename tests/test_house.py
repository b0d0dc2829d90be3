"""The rules of the house that no linter knows: import direction, light imports, what ships, what must never be committed."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "cdcda_mobile": ROOT / "cdcda_mobile",
    "cdcda_export": ROOT / "export" / "cdcda_export",
    "cdcda_engine": ROOT / "android_demo" / "engine" / "cdcda_engine",
    "cdcda_apk": ROOT / "android_demo" / "pack" / "cdcda_apk",
}
HEAVY = {
    "cryptography", "fsspec", "llama_cpp", "onnx", "onnxruntime", "openai", "optimum", "pandas", "peft", "pyarrow", "ray", "rich", "spacy",
    "sqlalchemy", "tokenizers", "torch", "transformers",
}  # fmt: skip
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS: dict[str, str] = PYPROJECT["project"]["scripts"]


def committed_files() -> list[Path]:
    """What git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def imports_of(path: Path) -> Iterator[str]:
    """Top-level names of all that a file imports, wherever in it; relative imports stay inside their package."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def clean_env(**more: str) -> dict[str, str]:
    """Our environment without the coverage hooks, which import things and cost time."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("COV")}, **more}


def test_imports_run_one_way() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package in ("cdcda_export", "cdcda_engine", "cdcda_apk")
        for path in sorted(PACKAGES[package].rglob("*.py"))
        for name in imports_of(path)
        if name == "cdcda_mobile"
    ]
    assert wrong == []


def test_nothing_imports_the_laboratory() -> None:
    files = [path for path in committed_files() if path.suffix == ".py" and "benchmarks" not in path.relative_to(ROOT).parts[:1]]
    assert len(files) > 5
    assert [str(path) for path in files if "benchmarks" in set(imports_of(path))] == []


# These are made of torch; they are imported inside the verbs that train or verify.
MADE_OF_TORCH = {
    "cdcda_export.decoder",
    *(f"cdcda_mobile.training.{path.stem}" for path in (PACKAGES["cdcda_mobile"] / "training").glob("*.py") if path.stem != "__init__"),
}


def test_importing_any_module_loads_nothing_heavy() -> None:
    modules = [
        ".".join((name, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
        for name, folder in PACKAGES.items()
        for path in sorted(folder.rglob("*.py"))
        if path.name != "__main__.py"
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {[name for name in modules if name not in MADE_OF_TORCH]!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = sorted({HEAVY!r} & set(sys.modules))\n"
        "    if heavy: sys.exit(f'{name} imports {heavy}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_env(), check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once_and_imports_nothing_heavy(script: str) -> None:
    module, _, function = SCRIPTS[script].partition(":")
    code = (
        f"import sys, {module}\n"
        f"sys.argv = [{script!r}, '--help']\n"
        f"try: {module}.{function}(['--help'])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"print('heavy:', sorted({HEAVY!r} & set(sys.modules)))\n"
    )
    times = []
    for _ in range(5):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_env(), check=False)
        times.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "heavy: []"
    assert min(times) < 0.5, times


@pytest.mark.parametrize("script", SCRIPTS)
def test_console_scripts_are_installed_and_answer(script: str) -> None:
    command = Path(sys.executable).parent / script
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower() and script in done.stdout


# Put together from halves, so that this file passes its own test.
FORBIDDEN = {
    "a path of one machine": r"/work/(main|shared|\.library)\b|/root/|/home/[a-z]\w*/|/Users/[A-Za-z]\w*/",
    "the address of a package registry": "|".join(
        re.escape(host + end)
        for host, end in (
            ("pypi", ".org"), ("pythonhosted", ".org"), ("registry.npmjs", ".org"), ("crates", ".io"), ("proxy.golang", ".org"),
            ("repo.maven.apache", ".org"), ("repo1.maven", ".org"), ("maven.google", ".com"), ("deb.debian", ".org"),
        )
    ),
    "an address to download a model from": re.escape("huggingface" + ".co") + r"/\S+/resolve/",
}  # fmt: skip


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_committed_text_holds(what: str) -> None:
    pattern, found = re.compile(FORBIDDEN[what]), []
    for path in committed_files():
        if path == Path(__file__).resolve():
            continue  # holds the patterns themselves
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}" for match in pattern.finditer(text)]
    assert found == []


def test_the_newest_version_of_the_changelog_is_ours() -> None:
    headings = re.findall(r"^## \[?(\d+\.\d+\.\d+)\]?", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == PYPROJECT["project"]["version"]
    assert headings == sorted(headings, key=Version, reverse=True)


def test_constraints_pin_all_that_pyproject_asks_for() -> None:
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            assert pin.url is None and [spec.operator for spec in pin.specifier] == ["=="], line
            pins[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    project = PYPROJECT["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name != project["name"]:
            assert requirement.specifier.contains(pins[name]), f"{requirement} against {pins[name]}"


def test_all_is_every_other_extra() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    assert everything.extras == set(extras) - {"all"}


def test_make_lists_its_targets() -> None:
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    # MAKEFLAGS of an outer `make test` must not reach this one.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    shown = subprocess.run(["make"], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert [target for target in targets if f"make {target} " not in shown] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network from a copy of what is committed."""
    source = tmp_path_factory.mktemp("source")
    for path in committed_files():
        relative = path.relative_to(ROOT)
        if relative.parts[0] in {"cdcda_mobile", "export", "android_demo"} or len(relative.parts) == 1:
            (source / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, source / relative)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_env(), check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in committed_files()
        if path.is_relative_to(folder)
    }
    assert names == expected
    for needed in (
        r"cdcda_mobile/samples/.*\.jsonl",
        r"cdcda_export/recipes/.*\.toml",
        r"cdcda_export/.*gates.*\.json",
        r".*/py\.typed",
    ):
        assert any(re.fullmatch(needed, name) for name in names), f"nothing like {needed}"


def test_the_wheel_names_licence_and_commands(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (licence,) = [name for name in archive.namelist() if name.endswith("LICENSE")]
    assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert all(f"{name} = {target}" in archive.read(entry_points).decode() for name, target in SCRIPTS.items())
    (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    bare = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==).*$", archive.read(metadata).decode(), re.MULTILINE)
    assert set(bare).isdisjoint(HEAVY - {"rich"}), "the bare install is the export half, without torch"


def test_the_wheel_installs_and_imports_from_where_it_was_put(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_env(), check=False)
    assert done.returncode == 0, done.stderr
    code = "import cdcda_export.errors as a, cdcda_mobile.config as b; print(a.__file__); print(b.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=clean_env(PYTHONPATH=str(target)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [Path(line).is_relative_to(target) for line in done.stdout.splitlines()] == [True, True]
