"""How much memory a cohort takes: what ``--cohort auto`` divides by."""

from __future__ import annotations

from pathlib import Path

import torch

from cdcda_export.decoder import Decoder
from cdcda_export.runtime import cpu_threads
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.training.lora import Layout
from cdcda_mobile.training.packed import MOST_TOKENS

# Parameters, gradient, best, two moments, and a checkpoint while it is written: float32.
_COPIES = 6
_FLOAT = 4
# A row of this many tokens is taken for the usual one where a pass grows with the users.
_USUAL_ROW = 128


def bytes_of_user(decoder: Decoder, config: TrainConfig) -> int:
    """Return what one more user takes; on a GPU their rows too, which stand in the same pass."""
    layout = Layout(decoder, config.targets, config.rank, config.alpha, config.first_layer)
    # Autograd keeps about twice what the pass written by hand does.
    rows = 0 if decoder.device.type == "cpu" else 2 * bytes_of_token(decoder) * config.batch_size * _USUAL_ROW
    return layout.size * _FLOAT * _COPIES + rows


def bytes_of_passes(decoder: Decoder, config: TrainConfig) -> int:
    """Return what the passes take that run at the same time on CPU cores."""
    if decoder.device.type != "cpu":
        return 0
    return (config.threads or cpu_threads()) * bytes_of_token(decoder) * MOST_TOKENS


def bytes_of_token(decoder: Decoder) -> int:
    """Return what the backward of one token needs, summed over the layers."""
    shape = decoder.shape
    hidden = decoder.weights["model.norm.weight"].shape[0]
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim + shape.heads * _USUAL_ROW
    feed_forward = decoder.fused[0, "gate_up"].shape[0]
    return shape.layers * _FLOAT * (2 * hidden + attention + feed_forward)


def bytes_free(decoder: Decoder) -> int:
    """Return the memory that is free where the base lies: the GPU's, or the machine's within this process's limit (cgroup v2)."""
    if decoder.device.type != "cpu":
        return int(torch.cuda.mem_get_info(decoder.device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return free
    return min(free, limit)
