"""A program that ends when the process that started it does: ``python -m cdcda_mobile.teachers.bound PARENT PROGRAM ARGUMENTS``.

What a process asks Linux for here outlives ``exec``, so the program need not know of it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Let Linux kill this process when the process ``parent`` ends, SIGKILL included; end it now if it did already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked to be told
        os._exit(1)


def main() -> None:
    """Become the program."""
    end_with_parent(int(sys.argv[1]))
    try:
        os.execv(sys.argv[2], sys.argv[2:])
    except OSError as error:
        sys.exit(f"{sys.argv[2]}: {error.strerror}")


if __name__ == "__main__":
    main()
