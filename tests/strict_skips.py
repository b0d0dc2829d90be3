"""A pytest plugin: where CI is set, a skipped test is a failed one, but for a missing GPU or missing shared data."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from typing import Any

import pytest

# What a CI machine may lack. Everything else that a test needs is for `make test` to install.
ALLOWED = re.compile(r"\b(GPU|CUDA|CDCDA_DATA)\b")


def is_allowed(reason: str) -> bool:
    """Whether a test may be skipped in CI for this reason."""
    return ALLOWED.search(reason) is not None


def skip_reason(longrepr: object) -> str:
    """The words of a skip, out of pytest's (file, line, reason)."""
    return str(longrepr[2]) if isinstance(longrepr, tuple) and len(longrepr) == 3 else str(longrepr)


def fail_if_forbidden(report: Any) -> None:
    """Turn a skip that CI does not allow into a failure that says why."""
    if not os.environ.get("CI") or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = skip_reason(report.longrepr)
    if not is_allowed(reason):
        report.outcome = "failed"
        report.longrepr = f"{reason}\nIn CI only a missing GPU or missing shared data (CDCDA_DATA) may skip a test."


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Judge skips of single tests."""
    report = yield
    fail_if_forbidden(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Judge skips of whole modules (``pytest.importorskip`` at the top)."""
    report = yield
    fail_if_forbidden(report)
    return report
