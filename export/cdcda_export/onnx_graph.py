"""The graph of a base without its weights: traced by optimum once, then read from the cache by every user of that base.

Tracing takes 40 s and needs torch, transformers and optimum; what is cached is all that later exports need of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdcda_export.base_model import load_base_model
from cdcda_export.cache import cached
from cdcda_export.errors import DiskFull, FileError, MissingDependency, UnsupportedArchitecture, is_disk_full
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import write_atomic
from cdcda_export.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Raise it with every change of what is cached here, or of the code that decides it.
_FORMAT = 1
_TRACERS = ("torch", "transformers", "optimum", "optimum-onnx", "onnx")
_NOISY = ("optimum", "transformers", "torch.onnx", "onnxruntime", "root")
_GRAPH = "graph.onnx"


@dataclass(frozen=True)
class Skeleton:
    """A traced graph whose parameters are named as in the model but not stored.

    ``graph`` is a serialised ModelProto, ``parameters`` maps names to shapes, ``config`` is transformers' ``config.json``.
    """

    graph: bytes
    parameters: dict[str, tuple[int, ...]]
    config: dict[str, Any]


def graph_inputs(base: GgufFile) -> dict[str, Any]:
    """Return all that decides a base's graph: hyperparameters, special tokens, shapes and rotary factors, but no weights."""
    digest = hashlib.sha256()
    for key in sorted(base.keys_of_metadata()):
        if key.startswith(f"{base.architecture}.") or key.endswith("_token_id"):
            digest.update(base.raw_pair(key))
    digest.update(json.dumps({name: base[name].shape for name in sorted(base)}).encode())
    if "rope_freqs.weight" in base:
        digest.update(base["rope_freqs.weight"].data.tobytes())
    return {"format": _FORMAT, "architecture": base.architecture, "shape": digest.hexdigest(), "tracers": _versions()}


def _versions() -> dict[str, str]:
    found = {}
    for name in _TRACERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def skeleton_of(base: GgufFile, progress: Progress) -> Skeleton:
    """Return a base's graph, traced only if no base of this shape was exported on this machine before.

    Raises:
        MissingDependency: it is not cached, and torch or optimum are not installed.
        UnsupportedArchitecture: optimum cannot export this architecture.
        DiskFull: no room is left.
    """

    def build(directory: Path) -> dict[str, Any]:
        progress.start("exporting the graph, once for this base")
        skeleton = trace(load_base_model(base), directory / ".trace")
        write_atomic(directory / _GRAPH, skeleton.graph)
        progress.done()
        return {"parameters": skeleton.parameters, "config": skeleton.config}

    entry = cached("onnx-graphs", graph_inputs(base), build)
    parameters = {name: tuple(shape) for name, shape in entry.facts["parameters"].items()}
    return Skeleton((entry.directory / _GRAPH).read_bytes(), parameters, entry.facts["config"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracer's warnings and the libraries' chatter off the user's screen."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def trace(model: PreTrainedModel, scratch: Path) -> Skeleton:
    """Export a model's graph with optimum: one graph that takes a key-value cache of any length, zero included.

    Args:
        model: float32, on the CPU.
        scratch: a directory of our own; made here and removed again.

    Raises:
        MissingDependency: optimum or onnxruntime are not installed.
        UnsupportedArchitecture: optimum cannot export this architecture.
        DiskFull: the traced graph, weights included, does not fit on the disk.
    """
    try:
        with _quiet():
            import onnx
            import optimum.exporters.onnx.model_configs  # noqa: F401  # registers the architectures
            from optimum.exporters.onnx.convert import export
            from optimum.exporters.tasks import TasksManager
    except ImportError as error:
        raise MissingDependency("optimum and onnxruntime", "onnx") from error
    kind = model.config.model_type
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        with _quiet():
            make = TasksManager.get_exporter_config_constructor(
                "onnx", model=model, task="text-generation-with-past", library_name="transformers"
            )
            settings = make(model.config, use_past=True, use_past_in_inputs=True)
            # Folding would turn every weight into an anonymous transposed copy; unfolded, it keeps its parameter's name.
            # The axes fix runs a session on the whole float32 model to name output axes that are named already.
            export(model, settings, scratch / "graph.onnx", do_constant_folding=False, disable_dynamic_axes_fix=True)
        # The weights are not read: the base has them. Without them any size of model fits into one message.
        graph = onnx.load(str(scratch / "graph.onnx"), load_external_data=False)
        stripped = _stripped(graph, set(parameters), scratch)
    except (KeyError, ValueError, NotImplementedError) as error:
        raise UnsupportedArchitecture(f"optimum cannot export the architecture '{kind}' to ONNX: {error}.") from error
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(f"No room left to trace the ONNX graph in {scratch.parent}; free some space and run again.") from error
        raise FileError(f"Cannot write the ONNX graph in {scratch.parent}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Skeleton(stripped, parameters, _config(model))


def _config(model: PreTrainedModel) -> dict[str, Any]:
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__]}
    config.pop("_name_or_path", None)
    return dict(config)


def _stripped(model: Any, parameters: set[str], scratch: Path) -> bytes:
    from onnx import external_data_helper as external

    kept = [tensor for tensor in model.graph.initializer if tensor.name not in parameters]
    for tensor in kept:
        if external.uses_external_data(tensor):  # constants of a model above 2 GB lie beside it too
            external.load_external_data_for_tensor(tensor, str(scratch))
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    # Parameters of equal value (norms that are all ones) come out as one and its Identities; other weights need not be equal.
    nodes = [node for node in model.graph.node if not (node.op_type == "Identity" and node.output[0] in parameters)]
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    for node in model.graph.node:
        # The tracer leaves source lines here: paths of this machine.
        node.doc_string = ""
        del node.metadata_props[:]
        if not node.name.startswith("/"):
            node.name = node.output[0]  # numbered by the tracer, Identities included
    return bytes(model.SerializeToString(deterministic=True))
