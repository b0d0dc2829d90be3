"""What the committed results say: writes ``benchmarks/README.md`` and the tables of the project's README from ``results/*.json``.

A table of a README stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` and is what ``readme_table`` of ``NAME.py`` makes of its result.

python benchmarks/summary.py [--check]
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

from laboratory import RESULTS

README = Path(__file__).with_name("README.md")
PROJECT = Path(__file__).parent.parent / "README.md"
_TABLE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
_HEAD = """# Benchmarks

One script for each claim; `python benchmarks/NAME.py` measures, prints a table and writes `results/NAME.json` (figures, raw samples,
versions, hardware); `--help` says what else it needs. `--quick` is a short look whose results do not count. Machines are shared and
noisy: what compares is measured in one run, in pairs, and given as a ratio of medians. This page is made by `python benchmarks/summary.py`.
"""


def _claim(name: str) -> str:
    """Return the first line of a script's docstring."""
    script = Path(__file__).with_name(f"{name}.py")
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) if script.exists() else None
    return (text or name).split("\n")[0]


def _where(result: dict[str, Any]) -> str:
    """Return where a result was measured: where it was written, unless it says otherwise."""
    elsewhere = [machine for machines in result["raw"].get("measured_on", {}).values() for machine in machines]
    machines = elsewhere or [result["hardware"]]
    return "; ".join(
        dict.fromkeys(f"{one.get('gpu') or one['processor']}, {one['cores']} cores, {one['memory_gb']} GB" for one in machines)
    )


def render() -> str:
    """Return the page."""
    parts = [_HEAD]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        where = f"{_where(result)}, {result['date']}"
        rows = [f"| {name} | {'not measured' if value is None else f'{value:.4g}'} |" for name, value in result["figures"].items()]
        plot = [f"![{path.stem}](results/{path.stem}.svg)", ""] if path.with_suffix(".svg").exists() else []
        parts.append("\n".join([f"## {path.stem}", "", _claim(path.stem), "", f"| {where} | |", "|---|---|", *rows, "", *plot]))
    return "\n".join(parts)


def with_tables(page: str) -> str:
    """Return a page whose tables are made anew from the results."""

    def table(found: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{found[2]}.json").read_text(encoding="utf-8"))
        return f"{found[1]}{importlib.import_module(found[2]).readme_table(result)}\n{found[3]}"

    return _TABLE.sub(table, page)


def main() -> None:
    """Write the pages, or say that one is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if a page is not what the results say")
    check = parser.parse_args().check
    for path, content in ((README, render()), (PROJECT, with_tables(PROJECT.read_text(encoding="utf-8")))):
        if not check:
            path.write_text(content, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != content:
            parser.exit(1, f"{path.parent.name}/{path.name} is out of date; run python benchmarks/summary.py.\n")


if __name__ == "__main__":
    main()
