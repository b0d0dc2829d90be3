"""The one exception of set-up, and the reading of other tools' logs into sentences."""

from __future__ import annotations

import re
from pathlib import Path


class SetupError(Exception):
    """Set-up cannot go on; the text is what the user reads."""


# Words of pip, uv and git on the left, ours on the right; the first match speaks.
CAUSES = (
    (
        r"No space left on device|os error 28\b",
        "the disk is full: free some space (a full set-up takes about 8 GB)",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|invalid peer certificate|UnknownIssuer",
        "the package index showed a certificate that is not trusted here: name your CA file in SSL_CERT_FILE",
    ),
    (
        r"name resolution|dns error|failed to lookup address|tcp connect error|error sending request|Could not connect"
        r"|NewConnectionError|ConnectTimeout|Read timed out|operation timed out|Network is unreachable|Connection refused"
        r"|Connection reset|ProxyError|Max retries exceeded|Failed to fetch",
        "the Python package index cannot be reached: check the network or the proxy settings",
    ),
)


def cause(log: str) -> str | None:
    """The reason for a failure, where the end of a log shows one of the known ones."""
    end = "\n".join(log.splitlines()[-200:])
    for pattern, sentence in CAUSES:
        if re.search(pattern, end, re.IGNORECASE):
            return sentence
    return None


def last_lines(log: str, count: int = 20) -> str:
    """The end of a log, indented, with endless command lines cut."""
    return "\n".join(f"    {line[:300]}" for line in log.splitlines()[-count:])


def failure_text(what: str, log: str, path: Path) -> str:
    """What to say when a step failed: one sentence for a known cause, else the end of its log and where the rest is."""
    known = cause(log)
    if known:
        return f"{what} failed because {known}, then run the same command again; what has arrived is kept (log: {path})."
    return f"{last_lines(log)}\n{what} failed; its last lines are above, all of them in {path}."
