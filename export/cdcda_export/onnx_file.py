"""Writing ONNX files tensor by tensor: a whole one, and a copy of one in which some tensors are others.

A tensor's size depends on its shape alone, so every place in the file is known before any weight is: a model is streamed, never held,
and a user's file is the base's with other bytes at the places of what the adapter changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from cdcda_export.errors import DiskFull, ExportError, FileError, is_disk_full
from cdcda_export.onnx_quant import Blocks, quantize_blocks
from cdcda_export.onnx_rewrite import Plan
from cdcda_export.runtime import cpu_threads

MODEL, DATA = "model.onnx", "model.onnx.data"
# One message must stay below 2 GB. Tensors beside the graph can be mapped, which wants whole pages.
_LIMIT, _PAGE = 1_500_000_000, 4096

# A parameter -> its new weights in float32.
Weights = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Places:
    """Where the tensors of a written model lie (JSON-serialisable through ``asdict``).

    ``file`` holds them all; ``parameters`` maps each parameter, in the order of the file, to the offset and size in bytes of its parts;
    ``blocks`` maps it to bits, block size and symmetry, or to None where it is float32.
    """

    file: str
    parameters: dict[str, list[list[int]]]
    blocks: dict[str, list[int] | None]


def parts_of(weights: np.ndarray, blocks: Blocks | None) -> list[np.ndarray]:
    """Return a parameter's initializers in the order of the file.

    Raises:
        ExportError: a weight is NaN or infinite.
    """
    if blocks is not None:
        return list(quantize_blocks(weights, blocks).values())
    if not np.isfinite(weights).all():
        raise ExportError("A merged weight is not a finite number, so the adapter is broken and nothing can be quantized.")
    return [np.ascontiguousarray(weights, np.float32)]


def write_model(plan: Plan, weights: Weights, directory: Path, limit: int = _LIMIT) -> Places:
    """Write a whole model: one file, or with its tensors beside it in ``model.onnx.data`` above ``limit`` bytes.

    Raises:
        DiskFull: no room is left.
        ExportError: a weight is NaN or infinite.
    """
    sizes = {parameter: [_bytes_of(name, shape) for name, shape in plan.parts(parameter).items()] for parameter in plan.stored}
    external = sum(map(sum, sizes.values())) > limit
    graph, headers = _beside(plan, sizes) if external else _inside(plan, sizes)
    places = Places(DATA if external else MODEL, {}, {name: _as_list(blocks) for name, blocks in plan.stored.items()})
    if external:
        with _writing(directory / MODEL) as file:
            file.put(graph)
    with _writing(directory / places.file) as file:
        file.put(b"" if external else graph)
        for parameter, parts in _made(places, weights, plan.stored):
            places.parameters[parameter] = []
            for header, part in zip(headers[parameter], parts, strict=True):
                file.put(header)
                places.parameters[parameter].append([file.at, part.nbytes])
                file.put(part)
    return places


def write_changed(source: Path, places: Places, changed: Iterable[str], weights: Weights, target: Path) -> dict[str, str]:
    """Copy a written model, with other weights for some parameters.

    Args:
        source: the directory of the model that ``write_model`` wrote.
        places: what it returned.
        changed: the parameters whose weights are others.
        weights: returns them; called from several threads.
        target: the directory to write to.

    Returns:
        The names written, and their SHA-256.

    Raises:
        DiskFull: no room is left.
        ExportError: a weight is NaN or infinite.
    """
    wanted = set(changed)
    order = [parameter for parameter in places.parameters if parameter in wanted]
    hashes = {}
    for name in sorted({MODEL, places.file}):
        old, at = _mapped(source / name), 0
        with _writing(target / name) as file:
            for parameter, parts in _made(places, weights, order) if name == places.file else ():
                for (offset, size), part in zip(places.parameters[parameter], parts, strict=True):
                    file.put(old[at:offset])
                    file.put(part)
                    at = offset + size
            file.put(old[at:])
        hashes[name] = file.hexdigest()
    return hashes


def _made(places: Places, weights: Weights, order: Iterable[str]) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Make parameters on every core, a few ahead of the one that is written."""

    def make(parameter: str) -> tuple[str, list[np.ndarray]]:
        layout = places.blocks[parameter]
        return parameter, parts_of(weights(parameter), None if layout is None else Blocks(layout[0], layout[1], bool(layout[2])))

    waiting: list[Future[tuple[str, list[np.ndarray]]]] = []
    with ThreadPoolExecutor(cpu_threads(), thread_name_prefix="onnx") as pool:
        try:
            for parameter in order:
                waiting.append(pool.submit(make, parameter))
                if len(waiting) > 2 * cpu_threads():
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def _as_list(blocks: Blocks | None) -> list[int] | None:
    return None if blocks is None else [blocks.bits, blocks.block, int(blocks.symmetric)]


def _is_bytes(name: str) -> bool:
    return name.endswith((".int8", ".int4", ".zeros"))


def _bytes_of(name: str, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * (1 if _is_bytes(name) else 4)


def _tensor(name: str, shape: tuple[int, ...]) -> Any:
    import onnx

    return onnx.TensorProto(name=name, dims=shape, data_type=onnx.TensorProto.UINT8 if _is_bytes(name) else onnx.TensorProto.FLOAT)


def _field(number: int, size: int) -> bytes:
    """Return what protobuf writes before ``size`` bytes of a field: number and wire type 2, then the length, as varints."""
    out = bytearray()
    for value in (number << 3 | 2, size):
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


def _inside(plan: Plan, sizes: Mapping[str, list[int]]) -> tuple[bytes, dict[str, list[bytes]]]:
    """Return the beginning of a file that holds its tensors, and what precedes the bytes of each of them.

    Fields of a message may come in any order, so the initializers can follow the rest of the graph, and the graph the rest of the model.
    """
    import onnx

    headers: dict[str, list[bytes]] = {}
    total = 0
    for parameter in plan.stored:
        headers[parameter] = []
        for (name, shape), size in zip(plan.parts(parameter).items(), sizes[parameter], strict=True):
            own = _tensor(name, shape).SerializeToString(deterministic=True) + _field(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, size)
            header = _field(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(own) + size) + own
            headers[parameter].append(header)
            total += len(header) + size
    rest = onnx.ModelProto()
    rest.CopyFrom(plan.model)
    rest.ClearField("graph")
    graph = plan.model.graph.SerializeToString(deterministic=True)
    outer = rest.SerializeToString(deterministic=True)
    return outer + _field(onnx.ModelProto.GRAPH_FIELD_NUMBER, len(graph) + total) + graph, headers


def _beside(plan: Plan, sizes: Mapping[str, list[int]]) -> tuple[bytes, dict[str, list[bytes]]]:
    """Return a file that refers to tensors in another, and the padding before each of them there."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(plan.model)
    paddings: dict[str, list[bytes]] = {}
    at = 0
    for parameter in plan.stored:
        paddings[parameter] = []
        for (name, shape), size in zip(plan.parts(parameter).items(), sizes[parameter], strict=True):
            padding = -at % _PAGE
            tensor = _tensor(name, shape)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", DATA), ("offset", at + padding), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))
            model.graph.initializer.append(tensor)
            paddings[parameter].append(bytes(padding))
            at += padding + size
    return model.SerializeToString(deterministic=True), paddings


class _Writer:
    """A file being written, hashed as it grows."""

    def __init__(self, stream: FileIO) -> None:
        self._stream, self._hash, self.at = stream, hashlib.sha256(), 0

    def put(self, data: Any) -> None:
        """Append the bytes of a buffer."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self.at += len(view)
        while view:
            view = view[self._stream.write(view) :]

    def hexdigest(self) -> str:
        """Return the SHA-256 of what was written."""
        return self._hash.hexdigest()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[_Writer]:
    """Open a private file that takes its name when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as stream:
            yield _Writer(stream)
            os.fsync(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(f"No room left to write {path}; free some space and run the same command again.") from error
        raise FileError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _mapped(path: Path) -> memoryview:
    try:
        with path.open("rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise FileError(f"Cannot read {path}: {error}.") from error
