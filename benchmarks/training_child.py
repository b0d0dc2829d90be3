"""One measurement of ``train_speed.py`` in a fresh process: a training, of ours or the peer's, a fleet, or the limit.

    python benchmarks/training_child.py SPECIFICATION.json RESULT.json

The specification holds the users as token ids, so it lives in a temporary folder; the result holds times and losses.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def peak_mb() -> float:
    """Return this program's peak resident memory in MB; ``ru_maxrss`` would also count what the parent held when it started us."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def orders_of(specification: dict[str, Any], folder: Path) -> list[Any]:
    """Return the users as orders."""
    from cdcda_export.verify import Probe
    from cdcda_mobile.training.schedule import Example, Order

    orders = []
    for at, user in enumerate(specification["users"]):
        train, validation = ([Probe("", "", tuple(p), tuple(a)) for p, a in user[part]] for part in ("train", "validation"))
        directory = folder / str(at)
        directory.mkdir(parents=True)
        orders.append(Order(f"user-{at}", [Example(probe) for probe in train], validation, directory, seed=at))
    return orders


def measured(work: Any) -> tuple[Any, dict[str, float]]:
    """Run something and return what it returned, with its wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def train_ours(specification: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train the cohort with ours, save every adapter, and count what was computed."""
    from cdcda_export.decoder import Decoder
    from cdcda_export.gguf import GgufFile
    from cdcda_export.progress import Silent
    from cdcda_mobile.config import TrainConfig
    from cdcda_mobile.training.cohort import train_cohort
    from cdcda_mobile.training.learner import TrainResult
    from cdcda_mobile.training.lora import save_adapter
    from training_profile import Counter, ExclusiveClock

    began = time.perf_counter()
    decoder = Decoder(GgufFile(Path(specification["base"])))
    config, orders = TrainConfig(**specification["train"]), orders_of(specification, folder)
    loaded = time.perf_counter() - began
    counter, clock = Counter(decoder, config), ExclusiveClock(decoder) if specification["profile"] else None

    def work() -> list[TrainResult]:
        results = []
        for outcome, order in zip(train_cohort(decoder, orders, config, Silent()), orders, strict=True):
            if not isinstance(outcome, TrainResult):
                raise outcome
            save_adapter(outcome.layers, "base", order.directory)
            results.append(outcome)
        return results

    results, cost = measured(work)
    metrics = [result.metrics() for result in results]
    found: dict[str, Any] = {
        **cost,
        "load_seconds": loaded,
        "losses": [m["best_validation_nll"] for m in metrics],
        "curves": [m["curve"] for m in metrics],
        "steps": [m["steps"] for m in metrics],
        "tokens": sum(m["tokens"] for m in metrics),
        "peak_mb": peak_mb(),
        **counter.counts(orders, metrics),
    }
    return found | ({"profile": clock.shares(cost["seconds"] * len(os.sched_getaffinity(0)))} if clock else {})


def train_peer(specification: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train the users one after another with PEFT and Trainer."""
    from cdcda_export.base_model import load_base_model
    from cdcda_export.decoder import keep_freed_memory
    from cdcda_export.gguf import GgufFile
    from cdcda_mobile.config import TrainConfig
    from peer_training import Peer, PeerOptions

    options = dict(specification["peer"])
    if options.pop("keep_freed_memory", False):
        keep_freed_memory()
    began = time.perf_counter()
    base = GgufFile(Path(specification["base"]))
    orders = orders_of(specification, folder)
    peer = Peer(base, load_base_model(base), TrainConfig(**specification["train"]), PeerOptions(**options))
    loaded = time.perf_counter() - began
    runs, cost = measured(lambda: [peer.train(order) for order in orders])
    return {
        "seconds": sum(run.seconds for run in runs),
        "cpu_seconds": cost["cpu_seconds"],
        "load_seconds": loaded,
        "losses": [run.best for run in runs],
        "curves": [run.curve for run in runs],
        "steps": [len(run.steps) for run in runs],
        "user_seconds": [run.seconds for run in runs],
        "step_seconds": [run.steps for run in runs],
        "peak_mb": peak_mb(),
    }


def find_limit(specification: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Measure the limit of the base's products on this machine; ``folder`` stays empty."""
    from cdcda_export.decoder import Decoder, keep_freed_memory
    from cdcda_export.gguf import GgufFile
    from training_profile import product_limits

    keep_freed_memory()
    return product_limits(Decoder(GgufFile(Path(specification["base"]))), specification["quick"])


def jobs_of(specification: dict[str, Any], folder: Path) -> list[Any]:
    """Return the users that are named as jobs of a workspace of their own."""
    from cdcda_mobile.config import AugmentConfig, TrainConfig
    from cdcda_mobile.pipeline import UserJob
    from headline_users import history_of

    history, train = history_of(Path(specification["records"])), TrainConfig(**specification["train"])
    return [UserJob(name, folder, history=history, augment=AugmentConfig(keep=0), train=train) for name in specification["names"]]


def run_jobs(specification: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train the users that are named as one cohort in this process, or as a fleet of Ray tasks."""
    from cdcda_export.base import Base
    from cdcda_export.progress import Silent
    from cdcda_mobile.cohorts import run_cohort
    from cdcda_mobile.fleet.driver import run_fleet

    jobs, work = jobs_of(specification, folder), functools.partial(run_cohort, until="adapter")
    fleet = specification["who"] == "fleet"
    outcomes = run_fleet(jobs, Base(), Silent(), work=work) if fleet else work(jobs, Silent(), Base())
    failed = [outcome.error for outcome in outcomes if outcome.error]
    if failed:
        raise SystemExit(failed[0])
    return {"users": len(outcomes)}


def main() -> None:
    """Train as the specification says."""
    specification = json.loads(Path(sys.argv[1]).read_text())
    if specification["cores"]:
        # Before torch and numpy are imported: their thread pools ask how many cores there are.
        os.sched_setaffinity(0, specification["cores"])
    work = {"ours": train_ours, "peer": train_peer, "limit": find_limit, "cohort": run_jobs, "fleet": run_jobs}[specification["who"]]
    found = work(specification, Path(sys.argv[2]).with_suffix(""))
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
