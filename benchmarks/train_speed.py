"""How fast a cohort of real users is trained: ours against PEFT and transformers' Trainer, one user after another, on two CPU cores.

Journalists of the News Category Dataset (Misra 2022, CC BY 4.0), their newest 80 records, split by time. Both sides take the same
optimizer steps over the same rows with the same first values, rates, clipping and evaluations, in float32 (see ``peer_training.py``); the
peer reaches the 8 rows of a step by the batch size that suits it best. Every training is a fresh process; ours and the peer alternate.
Seconds are those of the trainings, evaluations and saved adapters included, loading the base not; the raw samples have both.

Stages: limit (of matrix products), sweep (of the peer's batch size), pairs (the comparison), grouping (Trainer's own ``group_by_length``),
profile, costs (by cohort size and records), upper (the recipe that trains upper layers only), ray. Results of stages that are not named
are kept, so that a stage can be measured again.

    CDCDA_DATA=... python benchmarks/train_speed.py [--quick] [--pairs N] [--steps N] [--stages NAME ...] [--ray]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cdcda_export.base import default_base
from headline_users import User, read_users
from laboratory import RESULTS, print_table, write_results
from plot import costs_svg
from quantization_kl import RECORDS, newest_records

HERE = Path(__file__).resolve().parent
COHORT, MOST_USERS, BATCHES = 8, 16, (1, 2, 4, 8)
ROWS_OF_A_STEP = 8
SIZES, HISTORIES = (1, 2, 4, 8, 16), (10, 20, 40, 80)
UPPER_LAYERS = 15
STAGES = ("limit", "sweep", "pairs", "grouping", "profile", "costs", "upper")
QUICK_STAGES = ("limit", "pairs", "profile")
FIGURES = (
    "cohort8_ratio",
    "cohort8_ratio_kept_memory",
    "loss_difference",
    "users_per_hour",
    "peer_users_per_hour",
    "fraction_of_limit",
    "effective_fraction_of_limit",
    "upper_layers_ratio",
    "upper_layers_loss_difference",
    "gpu_cohort64_ratio",
    "ray_efficiency",
)

Sample = dict[str, Any]


def median(samples: Sequence[Sample], key: str = "seconds") -> float:
    """Return the median of one measurement."""
    return statistics.median(sample[key] for sample in samples)


def busy_seconds() -> float:
    """Return the processor seconds of this machine since its start, without those of our finished children."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    own = os.times()
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK") - own.children_user - own.children_system


def mean_loss(sample: Sample) -> float:
    """Return the mean of the users' best validation losses, in nats per answer token."""
    return statistics.mean(sample["losses"])


class Laboratory:
    """The users and samples of one run.

    Args:
        data: the shared data.
        folder: for what exists during the run only; it holds what people wrote.
        arguments: of the command line.
        kept: figures and raw samples of an earlier run.
    """

    def __init__(self, data: Path, folder: Path, arguments: argparse.Namespace, kept: dict[str, Any]) -> None:
        self.data, self.folder, self.quick = data, folder, arguments.quick
        self.pairs_wanted = 1 if self.quick else arguments.pairs
        self.steps = 2 if self.quick and not arguments.steps else arguments.steps
        self.figures: dict[str, float | None] = dict.fromkeys(FIGURES) | kept.get("figures", {})
        self.raw: dict[str, Any] = kept.get("raw", {})
        self.cohort = 2 if self.quick else COHORT
        self.histories: dict[int, list[User]] = {}
        self.serial = 0

    # Trainings.

    def users(self, count: int, records: int = RECORDS) -> list[User]:
        """Return the first users, their histories cut where the run is to be short."""
        if records not in self.histories:
            self.histories[records] = read_users(self.data, MOST_USERS, records, self.folder / f"records-{records}")
        users = self.histories[records][:count]
        if not self.steps:
            return users
        return [{"train": user["train"][: self.steps * ROWS_OF_A_STEP], "validation": user["validation"]} for user in users]

    def start(self, who: str, users: Sequence[User] = (), cores: Sequence[int] = (), **more: Any) -> tuple[subprocess.Popen[bytes], Path]:
        """Start a measurement in a process of its own."""
        self.serial += 1
        specification, result = (self.folder / f"{self.serial}-{name}.json" for name in ("specification", "result"))
        train = {"epochs": 1} if self.steps else {}
        content = {"who": who, "base": str(default_base()), "users": users, "cores": list(cores), "profile": False, "quick": self.quick}
        specification.write_text(json.dumps({**content, **more, "train": {**train, **more.get("train", {})}}))
        command = [sys.executable, HERE / "training_child.py", specification, result]
        return subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}), result

    def measure(self, who: str, users: Sequence[User] = (), **more: Any) -> Sample:
        """Measure in a process of its own.

        Returns:
            What it says; ``process_seconds`` with imports and loading; ``others``, the cores that other programs kept busy meanwhile.
        """
        began, others = time.perf_counter(), busy_seconds()
        process, result = self.start(who, users, **more)
        if process.wait():
            raise SystemExit(f"{who} failed with {process.returncode}.")
        wall = time.perf_counter() - began
        sample: Sample = {**json.loads(result.read_text()), "process_seconds": wall, "others": (busy_seconds() - others) / wall}
        if "seconds" in sample:
            line = f"{who}, {len(users)} users {more or ''}: {sample['seconds']:.1f} s, loss {mean_loss(sample):.4f}"
            print(f"{line}; others kept {sample['others']:.2f} cores busy", flush=True)
        return sample

    def peer(self, users: Sequence[User], batch: int, kept: bool = False, own_grouping: bool = False, **more: Any) -> Sample:
        """Train with PEFT and Trainer; ``kept``: with glibc told to keep freed memory."""
        peer = {"batch": batch, "own_grouping": own_grouping, "keep_freed_memory": kept}
        return self.measure("peer", users, peer=peer, **more)

    # Stages.

    def limit(self) -> None:
        """Find what the machine's matrix products reach."""
        self.raw["limit"] = self.measure("limit")
        print(f"matrix products: {self.raw['limit']['limit']:.0f} GFLOP/s", flush=True)

    def sweep(self) -> None:
        """Find the batch size that suits the peer best, on one user, as it comes and with freed memory kept."""
        batches, ways = ((1, 8), (False,)) if self.quick else (BATCHES, (False, True))
        # Evaluations are not compared here: two records are enough of them.
        user = [{"train": user["train"], "validation": user["validation"][:2]} for user in self.users(1)]
        found: dict[str, Any] = {}
        for kept in ways:
            samples = {batch: self.peer(user, batch, kept, train={"epochs": 1}) for batch in batches}
            # The first step pays for what is made once.
            steps = {batch: statistics.median(sample["step_seconds"][0][1:]) for batch, sample in samples.items()}
            found["kept memory" if kept else "plain"] = {
                "step_seconds": steps,
                "samples": samples,
                "best": min(steps, key=lambda b: steps[b]),
            }
            print(f"peer's seconds per step by batch size{', freed memory kept' if kept else ''}: {steps}", flush=True)
        self.raw["sweep"] = found

    def best_batch(self, kept: bool = False) -> int:
        """Return what the sweep found."""
        if "sweep" not in self.raw:
            if self.quick:
                return BATCHES[-1]
            raise SystemExit("Run the stage sweep first: the peer is measured at its best batch size.")
        found = self.raw["sweep"]
        return int(found["kept memory" if kept and "kept memory" in found else "plain"]["best"])

    def pairs(self) -> None:
        """Compare, alternating."""
        users = self.users(self.cohort)
        samples: dict[str, list[Sample]] = {"ours": [], "peer": [], "peer, kept memory": []}
        for _ in range(self.pairs_wanted):
            samples["ours"].append(self.measure("ours", users))
            samples["peer"].append(self.peer(users, self.best_batch()))
            samples["peer, kept memory"].append(self.peer(users, self.best_batch(kept=True), kept=True))
        self.raw["pairs"] = {"users": len(users), "epochs": 1 if self.steps else 2, **samples}
        ours, peer = median(samples["ours"]), median(samples["peer"])
        losses = {name: statistics.mean(map(mean_loss, found)) for name, found in samples.items()}
        self.figures |= {
            "cohort8_ratio": peer / ours,
            "cohort8_ratio_kept_memory": median(samples["peer, kept memory"]) / ours,
            "loss_difference": losses["ours"] / losses["peer"] - 1,
            "users_per_hour": 3600 * len(users) / ours,
            "peer_users_per_hour": 3600 * len(users) / peer,
        }
        self.raw["pairs"]["train_loss_differences"] = train_loss_differences(samples["ours"][0], samples["peer"][0])
        if "limit" in self.raw:
            limit = self.raw["limit"]["limit"]
            self.figures["fraction_of_limit"] = median(samples["ours"], "computed_gflop") / ours / limit
            self.figures["effective_fraction_of_limit"] = median(samples["ours"], "row_gflop") / ours / limit

    def grouping(self) -> None:
        """Show what Trainer's own grouping does where it chooses the rows of a step."""
        user, batch = self.users(1), self.best_batch()
        self.raw["grouping"] = {"our steps": self.peer(user, batch), "own": self.peer(user, batch, own_grouping=True)}

    def profile(self) -> None:
        """Show where our time goes."""
        self.raw["profile"] = found = self.measure("ours", self.users(self.cohort), profile=True, train={"epochs": 1})
        for part, share in found["profile"]["shares"].items():
            print(f"  {part}: {share:.1%}", flush=True)

    def costs(self) -> None:
        """Measure one epoch by cohort size and by records per user."""
        sizes, histories = ((1, 2), (20, 80)) if self.quick else (SIZES, HISTORIES)
        by_size = {size: self.measure("ours", self.users(size), train={"epochs": 1}) for size in sizes}
        rest = [n for n in histories if n != RECORDS or self.cohort not in by_size]
        by_records = {n: self.measure("ours", self.users(self.cohort, n), train={"epochs": 1}) for n in rest}
        if len(rest) < len(histories):
            by_records[RECORDS] = by_size[self.cohort]
        self.raw["costs"] = {"by_size": by_size, "by_records": by_records, "users": self.cohort}

    def upper(self) -> None:
        """Measure the recipe that trains the upper layers only, beside the whole one."""
        users = self.users(self.cohort)
        whole = self.measure("ours", users)
        found = self.measure("ours", users, train={"first_layer": UPPER_LAYERS})
        self.raw["upper"] = {"whole": whole, "upper": found, "first_layer": UPPER_LAYERS}
        self.figures["upper_layers_ratio"] = whole["seconds"] / found["seconds"]
        self.figures["upper_layers_loss_difference"] = mean_loss(found) / mean_loss(whole) - 1

    def ray(self) -> None:
        """Compare two Ray workers of a core each with two pinned processes; imports, loading and Ray's start count."""
        count, records = (4, 20) if self.quick else (MOST_USERS, RECORDS)
        path, names = newest_records(self.data, self.folder / "ray", count, records)
        cores = sorted(os.sched_getaffinity(0))[:2]
        shared = {"records": str(path), "train": {"epochs": 1, "threads": 1}}
        found: dict[str, Any] = {"users": count, "records": records, "pinned": [], "fleet": []}
        for _ in range(self.pairs_wanted):
            halves = [{"who": "cohort", "names": names[at::2], "cores": [core], **shared} for at, core in enumerate(cores)]
            found["pinned"].append(self.together(halves))
            found["fleet"].append(self.together([{"who": "fleet", "names": names, "cores": cores, **shared}]))
        self.raw["ray"] = found
        print(f"pinned processes: {found['pinned']} s, Ray workers: {found['fleet']} s", flush=True)
        self.figures["ray_efficiency"] = statistics.median(found["pinned"]) / statistics.median(found["fleet"])

    def together(self, specifications: Sequence[dict[str, Any]]) -> float:
        """Run processes at the same time and return the seconds until all have ended."""
        began = time.perf_counter()
        for process, _ in [self.start(**specification) for specification in specifications]:
            if process.wait():
                raise SystemExit(f"A process ended with {process.returncode}.")
        return time.perf_counter() - began


def train_loss_differences(ours: Sample, peer: Sample) -> list[float]:
    """Return for each user the largest relative difference of a training loss at the same step: batches and losses are the same."""
    found = []
    for own, other in zip(ours["curves"], peer["curves"], strict=True):
        losses = {point["step"]: point["train_loss"] for point in other if "train_loss" in point}
        found.append(max(abs(p["train_loss"] / losses[p["step"]] - 1) for p in own if p.get("step") in losses and "train_loss" in p))
    return found


def table(raw: dict[str, Any]) -> list[list[Any]]:
    """Return the lines of the table."""
    rows: list[list[Any]] = []
    for name, samples in raw.get("pairs", {}).items():
        if isinstance(samples, list) and samples and isinstance(samples[0], dict):
            whole = [median(samples, key) for key in ("seconds", "process_seconds", "cpu_seconds", "peak_mb")]
            rows.append([name, *whole, statistics.mean(map(mean_loss, samples))])
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"two users, two steps, one pair; {', '.join(QUICK_STAGES)}")
    parser.add_argument("--pairs", type=int, default=2, metavar="N", help="repeat the comparison N times (default: 2)")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="one epoch of at most N steps (default: two whole epochs)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, metavar="NAME", help=f"of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--ray", action="store_true", help="only compare Ray workers with pinned processes")
    arguments = parser.parse_args()
    if "CDCDA_DATA" not in os.environ:
        parser.exit(1, "Name the folder of the shared data in CDCDA_DATA.\n")
    name = "train_speed" + ("-quick" if arguments.quick else "")
    stages = ("ray",) if arguments.ray else arguments.stages or (QUICK_STAGES if arguments.quick else STAGES)
    earlier = RESULTS / f"{name}.json"
    kept = json.loads(earlier.read_text()) if earlier.exists() else {}
    with tempfile.TemporaryDirectory(prefix="train-speed-") as folder:
        lab = Laboratory(Path(os.environ["CDCDA_DATA"]), Path(folder), arguments, kept)
        for stage in stages:
            getattr(lab, stage)()
            lab.raw[stage]["date"] = datetime.now(UTC).isoformat(timespec="seconds")
            # After every stage: an interrupted run keeps what it measured.
            write_results(name, lab.figures, lab.raw)
            if "costs" in lab.raw:
                (RESULTS / f"{name}.svg").write_text(costs_svg(lab.raw["costs"], lab.raw.get("pairs")), encoding="utf-8")
    print_table(["", "seconds", "with loading", "CPU seconds", "peak MB", "validation NLL"], table(lab.raw))


if __name__ == "__main__":
    main()
