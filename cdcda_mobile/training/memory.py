"""How much memory a cohort takes: what ``--cohort auto`` divides by."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from cdcda_export.decoder import Decoder
from cdcda_export.runtime import cpu_threads
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.training.lora import Layout
from cdcda_mobile.training.packed import MOST_KEPT, MOST_TOKENS

# Parameters, gradient, a second gradient, best, two moments, and a checkpoint while it is written: float32.
_COPIES = 7
_FLOAT = 4
# A row of this many tokens is taken for the usual one where a pass grows with the users.
_USUAL_ROW = 128
# Autograd keeps about twice what the pass written by hand does.
_AUTOGRAD = 2


def bytes_of_user(decoder: Decoder, config: TrainConfig) -> int:
    """Return what one more user takes, for all the mixes that are tried; on a GPU their rows too, which stand in the same pass."""
    layout = Layout(decoder, config.targets, config.rank, config.alpha, config.first_layer)
    mixes = len(config.synthetic_weight) * len(config.synthetic_schedule)
    rows = 0 if decoder.device.type == "cpu" else _AUTOGRAD * bytes_of_token(decoder) * config.batch_size * _USUAL_ROW
    return mixes * (layout.size * _FLOAT * _COPIES + rows)


def bytes_of_passes(decoder: Decoder, config: TrainConfig) -> int:
    """Return what is needed whatever the number of users: passes and kept states of the groups at work, copies of the base."""
    base = sum(weight.nbytes for weight in decoder.fused.values())
    needed = base if config.warm_start else 0
    if decoder.device.type != "cpu":
        return needed + base // 2  # in bfloat16
    kept = MOST_KEPT if config.first_layer else 0
    return needed + (config.threads or cpu_threads()) * (bytes_of_token(decoder) * MOST_TOKENS + kept)


def bytes_of_token(decoder: Decoder) -> int:
    """Return what the backward of one token needs, summed over the layers."""
    shape = decoder.shape
    hidden = decoder.weights["model.norm.weight"].shape[0]
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim + shape.heads * _USUAL_ROW
    feed_forward = decoder.fused[0, "gate_up"].shape[0]
    return shape.layers * _FLOAT * (2 * hidden + attention + feed_forward)


def tokens_of_pass(decoder: Decoder) -> int:
    """Return how many tokens a pass on this GPU may have: half of its free memory."""
    return max(1024, bytes_free(decoder) // 2 // (_AUTOGRAD * bytes_of_token(decoder)))


def bytes_free(decoder: Decoder) -> int:
    """Return the memory that is free where the base lies: the GPU's, or the machine's within this container's limit (cgroup v2)."""
    if decoder.device.type != "cpu":
        return int(torch.cuda.mem_get_info(decoder.device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
        used = int((group / "memory.current").read_text())
        # Files that were read are given up when room is wanted.
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, int((group / "memory.max").read_text()) - used + int(stat.get("inactive_file", 0)))
    return free
