"""Talk to an artifact in its real runtime."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cdcda_export.artifact import Artifact, open_artifact
from cdcda_export.bundle import BUNDLE, read_bundle
from cdcda_export.errors import ConfigError, FileError, did_you_mean
from cdcda_export.manifest import MANIFEST
from cdcda_export.verify import Runtime

_CONTEXT, _ANSWER = 2048, 256


def find_artifact(path: Path, formats: Sequence[str] = ()) -> Path:
    """Return an artifact directory: the path itself, or the newest finished one inside a user's run.

    Args:
        path: either.
        formats: what an artifact inside a run may be; empty for anything.

    Raises:
        FileError: there is none, or one of the run was changed.
    """
    if (path / BUNDLE).exists():
        return path if path.name else path.absolute()  # a dot has no name and no run around it
    found = [
        p.parent
        for p in path.glob(f"*/{BUNDLE}")
        if (p.parent / MANIFEST).exists() and not p.parent.name.endswith((".partial", ".old")) and (not formats or _format(p) in formats)
    ]
    if not found:
        kind = formats[0] if formats else "gguf"
        what = f"finished {' or '.join(formats)} artifact" if formats else "finished artifact"
        raise FileError(f"{path} holds no {what}; make one with `cdcda-export --user {path.name} --format {kind}`.")
    return max(found, key=lambda directory: (directory / MANIFEST).stat().st_mtime)


def _format(bundle: Path) -> str:
    try:
        return str(json.loads(bundle.read_text(encoding="utf-8"))["format"])
    except (ValueError, TypeError, KeyError) as error:
        raise FileError(f"{bundle.parent} was changed since it was exported; run cdcda-export again.") from error


def read_artifact(directory: Path) -> Artifact:
    """Return the artifact of a finished, unchanged directory.

    Raises:
        FileError: it is unfinished, was changed, or its shared base is gone.
    """
    bundle = read_bundle(directory)
    files = {role: directory / entry["path"] for role, entry in bundle["files"].items()}
    main = files["adapter"] if "adapter" in files else files["model"]
    return Artifact(bundle["format"], bundle["quant"], main, files, [], bundle["tensor_types"], None)


def wrap(text: str, presets: dict[str, str]) -> str:
    """Return the user's turn: ``/headline some text`` puts the text into that task's instruction, anything else stays as it is.

    Raises:
        ConfigError: there is no such task.
    """
    if not text.startswith("/"):
        return text
    name, _, rest = text[1:].partition(" ")
    if name not in presets:
        raise ConfigError(f"There is no task '/{name}'.{did_you_mean(name, presets)}")
    return presets[name].replace("{input}", rest.strip())


def answer(runtime: Runtime, prompt: list[int], write: Callable[[str], object]) -> None:
    """Write an answer as it comes."""
    stream = getattr(runtime, "stream", None)
    if stream is None:
        write(runtime.decode(runtime.greedy(prompt, _ANSWER)))
        return
    ids: list[int] = []
    shown = 0
    for token in stream(prompt, _ANSWER):
        ids.append(token)
        text = runtime.decode(ids)
        if not text.endswith("\ufffd"):  # half of a multi-byte character: wait for the rest
            write(text[shown:])
            shown = len(text)


def chat(path: Path, prompt: str | None = None) -> None:
    """Answer one prompt, or read prompts until the input ends."""
    directory = find_artifact(path)
    artifact = read_artifact(directory)
    bundle = json.loads((directory / BUNDLE).read_text(encoding="utf-8"))
    presets = {preset["task"]: preset["instruction"] for preset in bundle["presets"]}

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    with open_artifact(artifact, _CONTEXT) as (runtime, template):
        if prompt is not None:
            answer(runtime, runtime.encode(template.prompt(wrap(prompt, presets))), write)
            write("\n")
            return
        names = "  ".join(f"/{name} TEXT" for name in presets)
        sys.stderr.write(f"{artifact.main} is listening. {names + '  or ' if names else ''}plain text; end with Ctrl-D.\n")
        while True:
            sys.stderr.write("> ")
            sys.stderr.flush()
            line = sys.stdin.readline()
            if not line:
                break
            if not line.strip():
                continue
            try:
                answer(runtime, runtime.encode(template.prompt(wrap(line.strip(), presets))), write)
                write("\n")
            except ConfigError as error:
                sys.stderr.write(f"{error}\n")
