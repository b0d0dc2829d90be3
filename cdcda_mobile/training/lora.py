"""The adapters of a cohort while they are trained: all parameters of all users in one tensor, and on disk as peft stores them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cdcda_export.adapter import CONFIG, WEIGHTS
from cdcda_export.decoder import FUSED, Decoder, Lora
from cdcda_export.errors import ConfigError, did_you_mean
from cdcda_export.manifest import write_atomic, write_json

# By layer and fused group: A of its adapted modules, stacked (modules * rank, in), and B of each, transposed (rank, out).
Views = dict[tuple[int, str], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class Part:
    """Where the adapted modules of one fused layer lie in a user's parameters.

    Attributes:
        names: the modules, such as ``model.layers.0.self_attn.q_proj``.
        inputs: width of what they all read.
        columns: where each writes in the fused output.
        start: of ``A`` of all of them, stacked: (modules * rank, inputs); after it ``B`` of each, transposed: (rank, out). BLAS is
            three to nine times faster on the gradient of B in this order.
    """

    names: tuple[str, ...]
    inputs: int
    columns: tuple[slice, ...]
    start: int


class Layout:
    """How one user's parameters are laid out in a flat vector: the same for every user of a cohort.

    Attributes:
        rank: of every module.
        scale: ``alpha / rank``.
        parts: by layer and fused group, in the order of the forward pass.
        size: number of parameters.
    """

    def __init__(self, decoder: Decoder, targets: Sequence[str], rank: int, alpha: float, first_layer: int = 0) -> None:
        known = {name.rsplit(".", 1)[1] for name in decoder.linear}
        for target in targets:
            if target not in known:
                raise ConfigError(f"train.targets names '{target}', which this base does not have.{did_you_mean(target, known)}")
        if not 0 <= first_layer < decoder.shape.layers:
            raise ConfigError(f"train.first_layer is {first_layer}, but this base has the layers 0 to {decoder.shape.layers - 1}.")
        self.rank, self.scale, self.first_layer = rank, alpha / rank, first_layer
        self.parts: dict[tuple[int, str], Part] = {}
        at = 0
        for layer in range(first_layer, decoder.shape.layers):
            for group, modules in FUSED.items():
                names, columns, column, inputs = [], [], 0, 0
                for module in modules:
                    name = f"model.layers.{layer}.{module}"
                    rows, inputs = decoder.weights[f"{name}.weight"].shape
                    if module.rsplit(".", 1)[1] in targets:
                        names.append(name)
                        columns.append(slice(column, column + rows))
                    column += rows
                if names:
                    self.parts[layer, group] = Part(tuple(names), inputs, tuple(columns), at)
                    at += rank * (len(names) * inputs + sum(c.stop - c.start for c in columns))
        self.size = at

    def views(self, flat: Tensor) -> Views:
        """Return ``A`` stacked and ``B`` of each module transposed, as views of one user's parameters (or gradients)."""
        found: Views = {}
        for key, part in self.parts.items():
            at = part.start + len(part.names) * self.rank * part.inputs
            down, ups = flat[part.start : at].view(-1, part.inputs), []
            for column in part.columns:
                width = column.stop - column.start
                ups.append(flat[at : at + width * self.rank].view(self.rank, width))
                at += width * self.rank
            found[key] = down, ups
        return found

    def layers(self, flat: Tensor) -> dict[str, Lora]:
        """Return a user's adapter by module name, views of ``flat``."""
        found = {}
        for key, (down, ups) in self.views(flat).items():
            for index, (name, up) in enumerate(zip(self.parts[key].names, ups, strict=True)):
                found[name] = Lora(down[index * self.rank : (index + 1) * self.rank], up.t(), self.scale)
        return found

    def initial(self, seed: int) -> Tensor:
        """Return A (kaiming-uniform) and B (zero) as peft initialises them: shape (size,)."""
        flat = torch.zeros(self.size)
        generator = torch.Generator().manual_seed(seed)
        for lora in self.layers(flat).values():
            bound = 1 / math.sqrt(lora.down.shape[1])  # kaiming_uniform_ with a=sqrt(5), as in peft
            lora.down.copy_((torch.rand(lora.down.shape, generator=generator) * 2 - 1) * bound)
        return flat


def save_adapter(layers: dict[str, Lora], base_name: str, directory: Path) -> list[str]:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as ``peft.PeftModel.from_pretrained`` reads them.

    Args:
        layers: the values to save (those of the best step, not of the last), by module name; all of one rank and scale.
        base_name: written as ``base_model_name_or_path``.
        directory: where to.

    Returns:
        The names of the files.

    Raises:
        ConfigError: ranks or scales differ, which this file format has no plain way to say.
    """
    from safetensors.numpy import save

    if len({(lora.down.shape[0], lora.scale) for lora in layers.values()}) > 1:
        raise ConfigError("An adapter whose modules differ in rank or scale cannot be saved as a plain one.")
    tensors = {}
    for name, lora in layers.items():
        for kind, part in (("lora_A", lora.down), ("lora_B", lora.up)):
            tensors[f"base_model.model.{name}.{kind}.weight"] = part.detach().cpu().contiguous().numpy().copy()
    write_atomic(directory / WEIGHTS, save(tensors))
    write_json(directory / CONFIG, peft_config(layers, base_name))
    return [CONFIG, WEIGHTS]


def peft_config(layers: dict[str, Lora], base_name: str) -> dict[str, object]:
    """Return the ``adapter_config.json`` of a plain LoRA."""
    first = next(iter(layers.values()))
    rank = first.down.shape[0]
    numbers = sorted({int(name.split(".")[2]) for name in layers})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in layers}),
        # Without it peft would look for adapters in the layers below too.
        "layers_to_transform": numbers if numbers[0] else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
