"""The Ray cluster that a fleet runs on: one that is there, or one of this machine's cores that nobody else can use."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cdcda_export.errors import ConfigError, MissingDependency
from cdcda_export.runtime import cpu_threads
from cdcda_mobile.pipeline import UserJob

# What a node's processes need and may know: Ray writes it into its logs.
_NOT_SECRET = ("GOMP_SPINCOUNT", "OPENBLAS_NUM_THREADS")
_OBJECT_STORE_BYTES = 100 << 20  # our objects are small: jobs in, outcomes out
_KNOCK_S = 10.0
_LONGEST_FOLDER = 40  # Ray's sockets lie 60 characters deeper, and 107 are the limit


@dataclass(frozen=True)
class Share:
    """What one worker gets: cores and GPUs; and how many workers there are, in all and on the largest node."""

    cores: int
    gpus: int
    workers: int
    beside: int


@contextlib.contextmanager
def cluster(address: str) -> Iterator[Any]:
    """Connect to a cluster, or start one and leave nothing of it; gives the module ``ray``.

    Args:
        address: ``auto`` or ``host:port`` of one that is there; '' starts one.

    Raises:
        ConfigError: there is no such cluster, or it runs another version.
        MissingDependency: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning about the future
    if not address and "RAY_AUTH_MODE" not in os.environ:
        # Its ports are open to the network, and who may talk to them may run anything. Ray would keep a token in the home folder.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        import ray
    except ImportError as error:
        raise MissingDependency("ray", "fleet") from error
    folder = "" if address else _short_folder()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _connect(ray, address, folder)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own one would end us without a word
        yield ray
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _connect(ray: Any, address: str, folder: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        if address:
            _probe(address)
            variables = {name: os.environ[name] for name in _NOT_SECRET if name in os.environ}
            ray.init(address, runtime_env={"env_vars": variables}, **quiet)
        else:
            own = {"include_dashboard": False, "_temp_dir": folder, "object_store_memory": _OBJECT_STORE_BYTES}
            ray.init("local", num_cpus=cpu_threads(), **own, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        what = f"the Ray cluster at {address}" if address else "Ray on this machine"
        hint = "; if it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" if isinstance(error, ConnectionError) else ""
        raise ConfigError(f"Cannot use {what} ({' '.join(str(error).split()).rstrip('.')}){hint}.") from error


def _probe(address: str) -> None:
    """Knock at an address: Ray itself would do so for eight minutes, with a warning every few seconds.

    Raises:
        OSError: nobody answers.
        ValueError: it is no address.
    """
    if "://" in address:
        raise ValueError("it is the address of a Ray client; name the cluster's own, as host:port, or auto on one of its nodes")
    host, colon, port = address.rpartition(":")
    if colon:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S):
            pass


def _short_folder() -> str:
    """Return a new private folder for what a local cluster writes."""
    above = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="cdcda-", dir=above if len(above) <= _LONGEST_FOLDER else "/tmp")


def share_of(ray: Any, jobs: Sequence[UserJob]) -> Share:
    """Return what a worker gets: a GPU where there are any, and the cores evenly, or as many as ``train.threads`` asks for.

    Raises:
        ConfigError: there is no core.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not nodes:
        raise ConfigError("The Ray cluster has no node with a core; start one with `ray start --num-cpus N`.")
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    fit = [node for node in nodes if node.get("GPU", 0) >= 1] if gpus else nodes
    cores, largest = sum(int(node["CPU"]) for node in fit), max(int(node["CPU"]) for node in fit)
    workers = max(1, min(gpus or cores, len(jobs)))
    threads = min(jobs[0].train.threads or max(1, cores // workers), largest)
    beside = int(max(node.get("GPU", 0) for node in fit)) if gpus else max(1, largest // threads)
    workers = min(workers, gpus or sum(int(node["CPU"]) // threads for node in fit)) or 1
    return Share(threads, 1 if gpus else 0, workers, min(beside, workers))
