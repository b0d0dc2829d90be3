"""``cdcda push``: find the bundle and the phone, put the one on the other."""

from __future__ import annotations

import argparse

from cdcda_apk import APPLICATION_ID
from cdcda_export.progress import choose_progress, progress_of_bytes
from cdcda_mobile.chat import find_artifact
from cdcda_mobile.phone.device import connect
from cdcda_mobile.phone.push import RUNS, parcel_of, push_bundle
from cdcda_mobile.workspace import Workspace


def run(arguments: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        CdcdaError: there is no verified bundle, no phone, no app on it, or no room.
    """
    place = arguments.bundle or Workspace(arguments.workspace).user_directory(arguments.user)
    directory = find_artifact(place, RUNS)
    parcel = parcel_of(directory)
    device = connect(arguments.device)
    progress = choose_progress(arguments.quiet)
    sent = progress_of_bytes(progress, f"{directory.name} to the phone", parcel.bytes)
    name = f"{directory.resolve().parent.name}-{directory.name}"
    done = push_bundle(device, parcel, name, arguments.application_id or APPLICATION_ID, sent)
    progress.done()
    print(f"{directory} is on the phone ({len(done.sent)} files sent, {len(done.kept)} were there); choose it in the app under Models.")
