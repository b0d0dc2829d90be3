"""A Ray cluster in a process of its own, as an administrator would have started it; run as a script."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# The cluster's own token: whoever connects must bring it.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def hosted(folder: Path, cores: int, env: Mapping[str, str]) -> Iterator[str]:
    """Serve a cluster of one node and give its address."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder), str(cores)],
        env={**env, **TOKEN},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, "Ray did not start"
        yield address
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


if __name__ == "__main__":
    import ray

    os.environ.update(TOKEN)
    context = ray.init(
        "local",
        num_cpus=int(sys.argv[2]),
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=sys.argv[1],
        object_store_memory=100 << 20,
    )
    print(context.address_info["address"], flush=True)
    sys.stdin.read()
    ray.shutdown()
