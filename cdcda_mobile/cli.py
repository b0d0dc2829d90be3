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
from typing import Any, NoReturn

from cdcda_export.errors import CdcdaError, DiskFull, did_you_mean, is_disk_full
from cdcda_export.recipe import ExportConfig, build_config, read_recipe, shipped_recipes
from cdcda_mobile.config import AugmentConfig, HistoryConfig, TeacherConfig, TrainConfig
from cdcda_mobile.phone_verbs import add_apk, add_bench, add_push

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
  cdcda-export --users all --export-only          every user of runs/ who has an adapter, in one process
  cdcda-export --users all --engine ray           every user of the source, cohorts as Ray tasks
  cdcda-export --adapter DIR --base base.gguf     any PEFT LoRA adapter, no user, no torch
  cdcda chat runs/42                              talk to what was exported
"""


_TRAIN_EXAMPLES = """\
examples:
  cdcda train --user 42                            one user
  cdcda train --users all                          every user of the source, as many at once as memory holds
  cdcda train --shared --users agreed.txt          one adapter of those who agreed; prints its DIR
  cdcda train --user 42 --warm-start DIR           the person on top of that one; exported as one adapter
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, with a suggestion for a mistyped flag."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse here what is unknown: a verb's own flags are nearer to a mistyped one than those of ``cdcda``."""
        found, rest = super().parse_known_args(args, namespace)
        if rest and self._subparsers is None:
            self.error("unrecognized arguments: " + " ".join(rest))
        return found, rest

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            wrong = message.split(":", 1)[1].split()[0]
            known = [option for action in self._actions for option in action.option_strings]
            message = f"there is no option {wrong}.{did_you_mean(wrong, known) if wrong.startswith('-') else ''}"
        self.exit(2, f"{self.prog}: {message.rstrip('.')}{'' if message.endswith('?') else '.'} See `{self.prog} --help`.\n")


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
    what.add_argument("--base", type=Path, metavar="BASE", help="GGUF, Hugging Face directory or hub id (default: SmolLM2-135M-Instruct)")
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
        usage=f"{prog} --user ID [options]\n       {prog} --users FILE|all [options]\n       {prog} --adapter DIR... --base BASE [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make a personal language model for the phone: augment, train, merge, quantize, verify.\n\n" + _EXAMPLES,
    )
    _add_section(parser, "export", "artifact")
    adapter = parser.add_argument_group("an adapter from elsewhere (instead of --user)")
    adapter.add_argument("--adapter", type=Path, nargs="+", metavar="DIR", help="PEFT LoRA directories, one or many of the same base")
    adapter.add_argument("--out", type=Path, metavar="DIR", help="where to (default: WORKSPACE/_adapters/NAME/FORMAT-QUANT)")
    adapter.add_argument("--text", type=Path, metavar="FILE", help="paragraphs to verify on (default: a neutral text that ships)")
    adapter.add_argument("--calibration", type=Path, metavar="FILE", help="training paragraphs, for --importance user")
    _add_common(parser, user=False)
    many = parser.add_argument_group("many users (instead of --user)")
    many.add_argument("--users", metavar="FILE|all", help="a file with one id per line, or all; failures are named, the others finish")
    many.add_argument("--export-only", action="store_true", help="never train: use the adapters that are there (all: all who have one)")
    many.add_argument("--engine", choices=("local", "ray"), default="local", help="in this process, or as Ray tasks (default: local)")
    many.add_argument("--address", metavar="ADDRESS", help="Ray cluster: auto or host:port (default: one on this machine's cores)")
    many.add_argument("--upload", metavar="URL", help="put finished artifacts there too: anything that fsspec knows")
    return parser


def _configs(arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = read_recipe(arguments.recipe, SECTIONS) if arguments.recipe else {}
    given: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, value in vars(arguments).items():
        section, dot, name = key.partition(".")
        if dot and value is not None:
            given[section][name] = value
    return {section: build_config(cls, recipe.get(section, {}), given[section]) for section, cls in SECTIONS.items()}


def _augment(arguments: argparse.Namespace) -> None:
    from cdcda_mobile.export_command import run_stage

    run_stage(arguments, _configs(arguments), "augment")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} --user ID [options]\n       {parser.prog} --users FILE|all [--shared] [options]"
    parser.description = "Train LoRA adapters (augments first where that is missing).\n\n" + _TRAIN_EXAMPLES
    _add_common(parser, user=False)
    many = parser.add_argument_group("many users (instead of --user)")
    many.add_argument("--users", metavar="FILE|all", help="a file with one id per line, or all; they are trained as cohorts")
    many.add_argument("--shared", action="store_true", help="one adapter of all of them, for --warm-start; needs a file of who agreed")

    def run(arguments: argparse.Namespace) -> int:
        from cdcda_mobile.train_command import train

        return train(arguments, _configs(arguments))

    parser.set_defaults(function=run)


_EVAL_EXAMPLES = """\
examples:
  cdcda eval --user 42                             base, rule, retrieval, real records only, CDCDA; each also quantized
  cdcda eval --users all --seeds 3                 the same over users, with paired intervals
  cdcda eval --users all --warm-start DIR          on top of a shared adapter, and that adapter alone
  cdcda eval --user 42 --canary                    does the model give planted secrets back?
"""


# A test holds the names to evaluation/arms.py, which imports too much for --help.
_ARMS = (
    "comma-separated, of: base, rule, bm25, shared, personal, cdcda, cdcda-other, shared+personal, shared+cdcda; the last model is "
    "compared with every other arm (default: base,rule,bm25,personal,cdcda, "
    "with --warm-start base,rule,bm25,shared,shared+personal,shared+cdcda)"
)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} --user ID [options]\n       {parser.prog} --users FILE|all [options]"
    parser.description = "Measure the personal model against what is cheaper, on held-out records.\n\n" + _EVAL_EXAMPLES
    what = parser.add_argument_group("what is measured")
    what.add_argument("--arms", default="", metavar="LIST", help=_ARMS)
    what.add_argument("--seeds", type=int, default=1, metavar="N", help="trainings of each arm (default: 1)")
    what.add_argument("--canary", action="store_true", help="plant secrets in a copy of the training records and ask the artifact for them")
    what.add_argument("--predictions", type=Path, metavar="DIR", help="write answers to LaMP's questions in its own format")
    _add_section(parser, "export", "artifact")
    _add_common(parser, user=False)
    parser.add_argument_group("many users (instead of --user)").add_argument(
        "--users", metavar="FILE|all", help="a file with one id per line, or all"
    )

    def run(arguments: argparse.Namespace) -> int:
        from cdcda_mobile.eval_command import evaluate

        return evaluate(arguments, _configs(arguments))

    parser.set_defaults(function=run)


def _chat(arguments: argparse.Namespace) -> None:
    from cdcda_mobile.chat import chat

    chat(arguments.path, arguments.prompt)


def _forget(arguments: argparse.Namespace) -> None:
    from cdcda_mobile.shared import shared_with
    from cdcda_mobile.workspace import Workspace

    for directory in shared_with(arguments.workspace, arguments.user):
        print(f"{directory} was learned from this user's records too; remove it, or train it again without them.")
    removed = Workspace(arguments.workspace).forget(arguments.user)
    print(f"Removed {len(removed)} files of user {arguments.user} from {arguments.workspace}.")
    print("What was uploaded, pushed to a phone or packed into an app (.apk) is elsewhere.")


def _users(arguments: argparse.Namespace) -> None:
    from cdcda_mobile.history import list_users

    for user in list_users(_configs(arguments)["history"]):
        print(user)


def _doctor(arguments: argparse.Namespace) -> int:
    from cdcda_mobile.doctor import examine

    findings = examine(arguments.workspace)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{'ok     ' if finding.ok else 'MISSING'}  {finding.what:<17} {finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 1


def _build_server(arguments: argparse.Namespace) -> None:
    from cdcda_export.progress import choose_progress
    from cdcda_mobile.teachers.native_server import build_native_server

    print(build_native_server(choose_progress(arguments.quiet)))


def _build_engine(arguments: argparse.Namespace) -> None:
    from cdcda_engine.build import build_engine
    from cdcda_export.progress import choose_progress

    print(build_engine(choose_progress(arguments.quiet)))


def main_parser() -> argparse.ArgumentParser:
    """Return the parser of ``cdcda``."""
    parser = _Parser(
        prog="cdcda",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Personal language models that live on the phone.\n\n" + _EXAMPLES,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    text = "let the teacher write synthetic records for a user"
    augment = verbs.add_parser("augment", help=text, description=text)
    _add_common(augment, user=True)
    augment.add_argument("--show-requests", action="store_true", help="print what would be sent to the teacher, as JSON lines, and stop")
    augment.set_defaults(function=_augment)
    _add_train(verbs.add_parser("train", help="train LoRA adapters", formatter_class=argparse.RawDescriptionHelpFormatter))
    _add_eval(verbs.add_parser("eval", help="measure a personal model", formatter_class=argparse.RawDescriptionHelpFormatter))
    add_bench(verbs.add_parser("bench", help="how fast, how big, on which phone", formatter_class=argparse.RawDescriptionHelpFormatter))
    add_push(verbs.add_parser("push", help="put a model into the app on a phone", formatter_class=argparse.RawDescriptionHelpFormatter))
    add_apk(verbs.add_parser("apk", help="an app with the model in it", formatter_class=argparse.RawDescriptionHelpFormatter))
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
    server = verbs.add_parser("build-server", help="compile llama.cpp's server, which makes a local teacher faster (once, 10 minutes)")
    server.add_argument("--quiet", action="store_true", help="no progress")
    server.set_defaults(function=_build_server)
    engine = verbs.add_parser("build-engine", help="compile the engine of phones, which bench --device puts there (once, 20 minutes)")
    engine.add_argument("--quiet", action="store_true", help="no progress")
    engine.set_defaults(function=_build_engine)
    return parser


def _guarded(prog: str, work: Callable[[], int | None]) -> int:
    """Run a verb; turn every intended error into one sentence and an exit code."""

    def terminate(_signal: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    # OpenMP threads that spin long while they wait slow everything down as soon as another process wants a core; short spins cost 2 %.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    # numpy's products run inside threads of our own, one for each core; a second layer of threads in each of them only gets in the way.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
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

    def run() -> int:
        from cdcda_mobile.export_command import export

        return export(arguments, _configs(arguments))

    return _guarded(prog, run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``cdcda`` and return its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["export"]:
        return export_main(given[1:], prog="cdcda export")
    arguments = main_parser().parse_args(given)
    return _guarded(f"cdcda {arguments.verb}", lambda: arguments.function(arguments))


if __name__ == "__main__":
    sys.exit(main())
