"""Put a verified bundle where the app finds it: in the app's own folder of the phone's shared storage, which needs no permission."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cdcda_apk.packing import check_id
from cdcda_export.bundle import BUNDLE, LICENCES, require_verified
from cdcda_export.errors import ConfigError, DeviceError
from cdcda_mobile.phone.device import Device

RUNS = ("gguf", "gguf-lora")  # what the app runs


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        folder: on the phone.
        sent: names of the files that went.
        kept: names of those that were there already.
    """

    folder: str
    sent: list[str]
    kept: list[str]


@dataclass(frozen=True)
class Parcel:
    """A verified bundle on its way.

    Attributes:
        bundle: its ``bundle.json``.
        files: name on the phone -> file, the largest first, ``bundle.json`` left out.
    """

    bundle: dict[str, Any]
    files: dict[str, Path]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def parcel_of(directory: Path) -> Parcel:
    """Return what of an artifact goes onto a phone.

    Raises:
        FileError: there is no finished artifact, or it was changed.
        VerificationFailed: it was not verified in full.
        ConfigError: the app does not run this format.
    """
    bundle = require_verified(directory)
    if bundle["format"] not in RUNS:
        raise ConfigError(f"The app runs GGUF, and {directory} is {bundle['format']}; export one with --format gguf.")
    found = {entry["file"]: directory / entry["path"] for entry in bundle["files"].values()}
    found[LICENCES] = directory / LICENCES
    return Parcel(bundle, dict(sorted(found.items(), key=lambda item: -item[1].stat().st_size)))


def push_bundle(device: Device, parcel: Parcel, name: str, application: str, sent: Callable[[int], object]) -> Pushed:
    """Put a bundle on a phone; what is there already is not sent again, and the app sees it only when it is whole.

    Args:
        device: the phone.
        parcel: what goes.
        name: what its folder is called there; what is no letter, digit, ``.``, ``_`` or ``-`` becomes ``-``.
        application: the app's id.
        sent: told of bytes that went, or need not go.

    Raises:
        ConfigError: that is no application id.
        DeviceError: the app is not there or was never opened, or the phone refuses.
        DiskFull: the phone has no room.
    """
    check_id(application)
    if not device.try_run(f"pm path {application}"):
        raise DeviceError(f"The app {application} is not on the phone: install it with `adb install`, open it once, and push again.")
    own = f"/sdcard/Android/data/{application}/files"
    # Android makes it for the app; one that the shell had made would be closed to the app.
    if not device.try_run(f"test -d {own} && echo there"):
        raise DeviceError(f"The app {application} was never opened on the phone, and has no folder yet: open it once, and push again.")
    folder = f"{own}/models/{re.sub('[^A-Za-z0-9._-]+', '-', name)}"
    device.run(f"mkdir -p {folder}")
    # Taken away first and put back last: a model without it is none to the app.
    device.run(f"rm -f {folder}/{BUNDLE}")
    hashes = {entry["file"]: entry["sha256"] for entry in parcel.bundle["files"].values()}
    done = Pushed(folder, [], [])
    for file, path in parcel.files.items():
        target = f"{folder}/{file}"
        if file in hashes and device.sha256(target) == hashes[file]:
            done.kept.append(file)
            sent(path.stat().st_size)
            continue
        device.run(f"rm -f {shlex.quote(target)}")  # an old model is in the way of a new one where there is room for one
        device.deliver(path, target, sent)
        done.sent.append(file)
    with TemporaryDirectory() as place:
        written = Path(place) / BUNDLE
        written.write_text(json.dumps(flat(parcel.bundle)), encoding="utf-8")
        device.deliver(written, f"{folder}/{BUNDLE}", lambda count: None)
    return done


def flat(bundle: dict[str, Any]) -> dict[str, Any]:
    """Return a bundle whose files all lie beside it, as they do on a phone."""
    files = {role: {**entry, "path": entry["file"], "beside": True} for role, entry in bundle["files"].items()}
    return {**bundle, "files": files}
