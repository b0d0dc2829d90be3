"""What is done with phones, as verbs of ``cdcda``: measure on them, push a model onto one, pack an app."""

from __future__ import annotations

import argparse
from pathlib import Path

_BENCH_EXAMPLES = """\
examples:
  cdcda bench runs/42                              the newest artifact of user 42, on all cores of this machine
  cdcda bench runs/42 --phone galaxy-s23           with that phone's cores and memory, and its speed predicted
  cdcda bench runs/42/onnx-int4 --sustained 3      three minutes of decode without a pause
  cdcda bench runs/42 --arm                        in the phones' own engine under QEMU: is ARM's arithmetic the same?
  cdcda bench runs/42 --device                     on the phone that hangs on the cable (USB debugging)
  cdcda bench runs/42 --table                      all exports of user 42: size, speed on phones, quality
  cdcda bench runs/42 --recommend --phone pixel-7a which of them to put on it (--min-tok-s 8: at least so fast)
  cdcda bench --list-phones                        what is known of which phone
"""


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Give ``cdcda bench`` its options."""
    parser.usage = f"{parser.prog} ARTIFACT [--phone PHONE] [options]\n       {parser.prog} --list-phones"
    parser.description = "How fast and how big: measured here within a phone's limits, predicted for the phone.\n\n" + _BENCH_EXAMPLES
    parser.add_argument("artifact", type=Path, nargs="?", help="a user's run (runs/42) or an artifact's directory")
    parser.add_argument("--phone", default="", metavar="PHONE", help="a phone of --list-phones")
    parser.add_argument("--list-phones", action="store_true", help="list the phones and stop")
    parser.add_argument("--table", action="store_true", help="everything exported in a user's run or a workspace, on phones (--phone A,B)")
    parser.add_argument("--recommend", action="store_true", help="which artifact of a user's run to put on --phone")
    parser.add_argument(
        "--min-tok-s", type=float, default=0.0, metavar="N", help="with --recommend: decode no slower than this (default: 0)"
    )
    parser.add_argument(
        "--arm", nargs="?", const="arm64-i8mm", metavar="VARIANT", help="execute it in the phones' engine under QEMU and compare"
    )
    parser.add_argument("--device", nargs="?", const="", metavar="SERIAL", help="measure on a real phone over adb")
    parser.add_argument(
        "--protocol", default="llama-bench", metavar="NAME", help="llama-bench: pp512 and tg128 (default); pocketpal: pp256+tg64"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of each test (default: 5)")
    parser.add_argument("--sustained", type=float, default=0.0, metavar="MIN", help="minutes of decode without a pause (default: 0)")
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="default: the smaller of the phone's fast cores and this machine's"
    )
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="tokens that have to go into memory (default: 2048)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")

    def run(arguments: argparse.Namespace) -> int:
        from cdcda_mobile.bench_command import run

        return run(arguments)

    parser.set_defaults(function=run)


_PUSH_EXAMPLES = """\
examples:
  cdcda push --user 42                             the newest artifact of user 42, into the app on the phone
  cdcda push --bundle runs/42/gguf-q4_0            this one
"""


def add_push(parser: argparse.ArgumentParser) -> None:
    """Give ``cdcda push`` its options."""
    parser.usage = f"{parser.prog} --user ID | --bundle DIR [options]"
    parser.description = (
        "Put a verified model where the app finds it, over adb (USB debugging); the app has to be installed and opened once before.\n\n"
        + _PUSH_EXAMPLES
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--user", metavar="ID", help="whose newest artifact")
    what.add_argument("--bundle", type=Path, metavar="DIR", help="an artifact's directory")
    parser.add_argument("--workspace", type=Path, default=Path("runs"), metavar="DIR", help="where runs are kept (default: runs)")
    parser.add_argument("--device", default="", metavar="SERIAL", help="which phone, where several are connected")
    parser.add_argument("--application-id", default="", metavar="ID", help="of an app that was packed with another one")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")

    def run(arguments: argparse.Namespace) -> None:
        from cdcda_mobile.push_command import run

        run(arguments)

    parser.set_defaults(function=run)


_APK_EXAMPLES = """\
examples:
  cdcda apk --user 42                              user 42's model, merged and in q4_0
  cdcda apk --user 42 --compare                    base and personal side by side
  cdcda apk --model-less                           models come later, with cdcda push
  cdcda apk --user ann --application-id org.cdcda.app.ann
"""


def add_apk(parser: argparse.ArgumentParser) -> None:
    """Give ``cdcda apk`` its options."""
    parser.usage = f"{parser.prog} --user ID | --bundle DIR | --model-less [options]"
    parser.description = "Make an app of a verified model: one file that a phone installs and that needs no network.\n\n" + _APK_EXAMPLES
    parser.add_argument("--user", default="", metavar="ID", help="whose merged q4_0, else the newest GGUF")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="an artifact's directory")
    parser.add_argument("--model-less", action="store_true", help="an app that waits for `cdcda push` or for picked files")
    parser.add_argument(
        "--compare", action="store_true", help="the user's gguf-lora export: the app shows the base model beside the personal one"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: USER-ARTIFACT.apk")
    parser.add_argument("--application-id", default="", metavar="ID", help="another id is another app: two users on one phone")
    parser.add_argument(
        "--keystore", type=Path, metavar="FILE", help="PKCS #12, password in CDCDA_KEYSTORE_PASSWORD; default: this machine's own"
    )
    parser.add_argument("--shell", type=Path, metavar="FILE", help="the app without a model; default: built once from android_demo/app")
    parser.add_argument("--workspace", type=Path, default=Path("runs"), metavar="DIR", help="where runs are kept (default: runs)")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")

    def run(arguments: argparse.Namespace) -> None:
        from cdcda_mobile.apk_command import run

        run(arguments)

    parser.set_defaults(function=run)
