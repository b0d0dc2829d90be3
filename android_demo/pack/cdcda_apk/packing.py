"""A shell, the engine and a bundle become an APK: packed the same way every time, then signed."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cdcda_apk import APPLICATION_ID
from cdcda_apk.axml import renamed
from cdcda_apk.signing import Key, sign
from cdcda_apk.zipping import add, add_file
from cdcda_engine.build import SERVER
from cdcda_engine.variants import VARIANTS
from cdcda_export.bundle import BUNDLE, LICENCES
from cdcda_export.cache import cached
from cdcda_export.errors import BuildError, ConfigError
from cdcda_export.folders import writing
from cdcda_export.manifest import sha256_file

_MANIFEST = "AndroidManifest.xml"
_ID = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)+")
# Bytes of a model. What is above 2 GiB with a twentieth on top of it gets ZIP64 headers from zipfile, which Android does not read.
_LARGEST = 2_000_000_000
# Letters of an application id: the engine's socket lies in the app's private folder, and sun_path holds 108 bytes with the zero behind it.
_LONGEST_ID = 107 - len("/data/user/999/") - len("/no_backup/engine.sock")
_RECIPE = 1  # raised whenever the same inputs are packed in another way


@dataclass(frozen=True)
class Cargo:
    """What is packed with the app.

    Attributes:
        bundle: its ``bundle.json``, flat: every file beside it.
        files: name -> file.
        licences: the bundle's.
    """

    bundle: dict[str, object]
    files: dict[str, Path]
    licences: Path

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def check_id(application: str) -> None:
    """Look whether Android takes an application id.

    Raises:
        ConfigError: it does not.
    """
    if not _ID.fullmatch(application):
        raise ConfigError(f"'{application}' is no application id; one looks like {APPLICATION_ID}.ann.")
    if len(application) > _LONGEST_ID:
        raise ConfigError(
            f"'{application}' is too long for an application id: above {_LONGEST_ID} letters the engine's socket has no name."
        )


def pack(shell: Path, engine: Path, cargo: Cargo | None, application: str, key: Key, out: Path, advance: Callable[[int], object]) -> None:
    """Write a signed APK; it has its name only when it is whole.

    Args:
        shell: the app without anything.
        engine: the folder of the built engine.
        cargo: the model; None for an app that waits for one.
        application: its id on the phone: two ids are two apps.
        key: who signs.
        out: the APK.
        advance: told of the model's bytes as they are packed.

    Raises:
        ConfigError: that is no application id, or the model is too large for a package.
        BuildError: the shell is none.
        DiskFull: there is no room.
        FileError: it cannot be written.
    """
    check_id(application)
    if cargo is not None and cargo.bytes > _LARGEST:
        raise ConfigError("Android installs no package above 2 GB: pack the app with --model-less, and send the model with `cdcda push`.")
    ready = cached("apps", _inputs(shell, engine, application), lambda folder: _assemble(folder, shell, engine, application)).directory
    unsigned, signed = (out.with_name(f".{out.name}.{os.getpid()}.{step}.partial") for step in ("unsigned", "signed"))
    try:
        with writing(out):
            for partial in (unsigned, signed):
                partial.touch(mode=0o600)  # it is the person's model
            shutil.copyfile(ready / "app.apk", unsigned)
            if cargo is not None:
                with zipfile.ZipFile(unsigned, "a") as archive:
                    add(archive, f"assets/model/{BUNDLE}", json.dumps(cargo.bundle, indent=1, sort_keys=True).encode(), compress=True)
                    add(archive, f"assets/model/{LICENCES}", cargo.licences.read_bytes(), compress=True)
                    for name, path in sorted(cargo.files.items()):
                        add_file(archive, f"assets/model/{name}", path, advance)
            sign(unsigned, signed, key)
            os.replace(signed, out)
    finally:
        for partial in (unsigned, signed):
            partial.unlink(missing_ok=True)


def _inputs(shell: Path, engine: Path, application: str) -> dict[str, object]:
    """Return what decides the bytes of an app without a model; the engine's folder is named by what it was made of."""
    return {"recipe": _RECIPE, "shell": sha256_file(shell), "engine": engine.name, "id": application}


def _assemble(folder: Path, shell: Path, engine: Path, application: str) -> dict[str, str]:
    """Put shell and engine together; the slow part, compressing the programs, is done once for all models."""
    with zipfile.ZipFile(folder / "app.apk", "w") as archive:
        for name, content in sorted(_read(shell).items()):
            # Android maps its resource table, and refuses one that is compressed.
            packed = renamed(content, APPLICATION_ID, application) if name == _MANIFEST else content
            add(archive, name, packed, compress=name != "resources.arsc")
        for name, variant in VARIANTS.items():
            program = (engine / name / SERVER).read_bytes()
            add(archive, f"lib/{variant.abi}/lib{SERVER}-{name}.so", program, compress=True)
        for licence in sorted((engine / "licences").iterdir()):
            add(archive, f"assets/licences/{licence.name}", licence.read_bytes(), compress=True)
    return {}


def _read(shell: Path) -> dict[str, bytes]:
    """Return the files of a shell.

    Raises:
        BuildError: it is none.
    """
    try:
        with zipfile.ZipFile(shell) as given:
            found = {info.filename: given.read(info) for info in given.infolist() if not info.is_dir()}
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        raise BuildError(f"{shell} cannot be read as an app ({error}); build it again.") from error
    missing = {_MANIFEST, "classes.dex", "resources.arsc"} - found.keys()
    if missing:
        raise BuildError(f"{shell} is no app: it has no {' and no '.join(sorted(missing))}.")
    if any(name.startswith(("assets/", "lib/")) for name in found):
        raise BuildError(f"{shell} was packed already; name the app as Maven leaves it (target/shell.apk), or leave --shell away.")
    return found
