"""Every sample user's model, after quantization, on every sample user's test records: is it the person, or the format?

Runs the default job for each sample user (``--quick``: the quick recipe), then measures the test NLL per answer token of user i's records
under user j's artifact and under the base. The bar: the diagonal is the lowest of its row, and lower than the base.

    python benchmarks/sample_users.py [--quick] [--workspace DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cdcda_export.base import Base
from cdcda_export.progress import Plain
from cdcda_export.recipe import build_config, read_recipe
from cdcda_export.runtime import LlamaCpp
from cdcda_export.verify import Probe, nll_of
from cdcda_mobile.cli import SECTIONS
from cdcda_mobile.config import HistoryConfig
from cdcda_mobile.dataset import encoding_of
from cdcda_mobile.history import list_users
from cdcda_mobile.pipeline import Pipeline, UserJob
from laboratory import print_table, write_results

_CONTEXT = 512


def run_jobs(workspace: Path, recipe: str, base: Base) -> dict[str, Pipeline]:
    """Run the job of every sample user and return the pipelines."""
    values = read_recipe(recipe, SECTIONS)
    configs = {name: build_config(cls, values.get(name, {})) for name, cls in SECTIONS.items()}
    pipelines = {}
    for user in sorted(list_users(HistoryConfig())):
        pipelines[user] = Pipeline(UserJob(user=user, workspace=workspace, **configs), Plain(), base)
        pipelines[user].run()
    return pipelines


def nll_table(models: dict[str, Path], probes: dict[str, list[Probe]]) -> dict[str, dict[str, float]]:
    """Return user -> model -> mean negative log likelihood per answer token, in nats."""
    table: dict[str, dict[str, float]] = {user: {} for user in probes}
    for name, path in models.items():
        with LlamaCpp(path, n_ctx=_CONTEXT) as runtime:
            for user, texts in probes.items():
                total = sum(float(nll_of(runtime.logits(p.ids)[p.answer_positions()], p.answer).sum()) for p in texts)
                table[user][name] = total / sum(len(p.answer) for p in texts)
    return table


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the quick recipe: real records only")
    parser.add_argument("--workspace", type=Path, default=None)
    arguments = parser.parse_args()
    recipe = "quick" if arguments.quick else "default"
    workspace = arguments.workspace or Path("runs") / f"_benchmark-{recipe}"
    base = Base()
    pipelines = run_jobs(workspace, recipe, base)
    encoding = encoding_of(base.file)
    probes = {user: encoding.probes(p.records("test"), _CONTEXT) for user, p in pipelines.items()}
    models = {"base": base.file.path} | {u: p.directory / p.job.export.directory / "model.gguf" for u, p in pipelines.items()}
    table = nll_table(models, probes)
    print_table(["test records of", *models], [[user, *(table[user][m] for m in models)] for user in probes])
    margins = {user: min(v for m, v in row.items() if m != user) - row[user] for user, row in table.items()}
    figures = {
        "users": len(table),
        "smallest_margin_nll": min(margins.values()),
        "users_won": sum(m > 0 for m in margins.values()),
    }
    write_results("sample_users", figures, {"recipe": recipe, "nll": table, "margins": margins})


if __name__ == "__main__":
    main()
