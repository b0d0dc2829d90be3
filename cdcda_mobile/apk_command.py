"""``cdcda apk``: find the bundle, the app and the engine, and make one file of them that a phone installs."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from cdcda_apk import APPLICATION_ID
from cdcda_apk.packing import Cargo, check_id, pack
from cdcda_apk.shell import find_shell
from cdcda_apk.signing import key_of, own_key
from cdcda_engine.build import build_engine
from cdcda_export.bundle import LICENCES
from cdcda_export.card_values import size
from cdcda_export.errors import ConfigError
from cdcda_export.manifest import MANIFEST
from cdcda_export.progress import choose_progress, progress_of_bytes
from cdcda_mobile.chat import find_artifact
from cdcda_mobile.phone.push import RUNS, flat, parcel_of
from cdcda_mobile.workspace import Workspace

_USUAL = "gguf-q4_0"  # the smallest and fastest; another one is named with --bundle


def run(arguments: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ConfigError: it is said too little, or too much.
        CdcdaError: there is no verified bundle, or something cannot be built.
    """
    named = [bool(arguments.user), bool(arguments.bundle), arguments.model_less]
    if sum(named) != 1:
        raise ConfigError("Name whose model goes into the app with --user, or --bundle DIR, or --model-less for an app that waits for one.")
    if arguments.compare and not arguments.user:
        raise ConfigError("--compare goes with --user: it packs the user's gguf-lora export, base and adapter.")
    application = arguments.application_id or APPLICATION_ID
    check_id(application)
    cargo, name = (None, "model-less") if arguments.model_less else _cargo(arguments)
    out = arguments.out or Path(f"{name}.apk")
    if not out.parent.is_dir() or (out.exists() and not out.is_file()):
        raise ConfigError(f"--out names the file to write, in a folder that is there, and {out} is not one.")
    progress = choose_progress(arguments.quiet)
    key = key_of(arguments.keystore) if arguments.keystore else own_key(_own_keystore())
    shell, engine = find_shell(arguments.shell, progress), build_engine(progress)
    advance = progress_of_bytes(progress, f"packing {out}", cargo.bytes if cargo else 0)
    pack(shell, engine, cargo, application, key, out, advance)
    progress.done()
    model = f", {size(cargo.bytes)} of it the model" if cargo else ", without a model: `cdcda push` sends one"
    print(f"{out}: {size(out.stat().st_size)}{model}.\nadb install -r {out}")


def _cargo(arguments: argparse.Namespace) -> tuple[Cargo, str]:
    place = arguments.bundle or Workspace(arguments.workspace).user_directory(arguments.user)
    directory = newest = find_artifact(place, ("gguf-lora",) if arguments.compare else RUNS)
    if arguments.user and not arguments.compare and (place / _USUAL / MANIFEST).exists():
        directory = place / _USUAL
    parcel = parcel_of(directory)
    print(f"Packing {directory}" + (f"; {newest} is newer: --bundle {newest} packs that." if newest != directory else "."))
    files = {name: path for name, path in parcel.files.items() if name != LICENCES}
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{directory.resolve().parent.name}-{directory.name}")
    return Cargo(flat(parcel.bundle), files, parcel.files[LICENCES]), name


def _own_keystore() -> Path:
    """Return where this machine's own key lies: not in the cache folder, which anybody may empty."""
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return home / "cdcda" / "apk.p12"
