"""The table of all committed results: writes ``benchmarks/README.md`` from ``benchmarks/results/*.json``.

python benchmarks/summary.py [--check]
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path

from laboratory import RESULTS

README = Path(__file__).with_name("README.md")
_HEAD = """# Benchmarks

One script for each claim; `python benchmarks/NAME.py` measures, prints a table and writes `results/NAME.json` (figures, raw samples,
versions, hardware). `--quick` is a short look whose results do not count. Machines are shared and noisy: what compares is measured in one
run, in pairs, and given as a ratio of medians. This page is made by `python benchmarks/summary.py`.
"""


def _claim(name: str) -> str:
    """Return the first line of a script's docstring."""
    script = Path(__file__).with_name(f"{name}.py")
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) if script.exists() else None
    return (text or name).split("\n")[0]


def render() -> str:
    """Return the page."""
    parts = [_HEAD]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        hardware = result["hardware"]
        where = f"{hardware['processor']}, {hardware['cores']} cores, {hardware['memory_gb']} GB, {result['date']}"
        rows = [f"| {name} | {'not measured' if value is None else f'{value:.4g}'} |" for name, value in result["figures"].items()]
        plot = [f"![{path.stem}](results/{path.stem}.svg)", ""] if path.with_suffix(".svg").exists() else []
        parts.append("\n".join([f"## {path.stem}", "", _claim(path.stem), "", f"| {where} | |", "|---|---|", *rows, "", *plot]))
    return "\n".join(parts)


def main() -> None:
    """Write the page, or say that it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is not what the results say")
    if not parser.parse_args().check:
        README.write_text(render(), encoding="utf-8")
    elif not README.exists() or README.read_text(encoding="utf-8") != render():
        parser.exit(1, "benchmarks/README.md is out of date; run python benchmarks/summary.py.\n")


if __name__ == "__main__":
    main()
