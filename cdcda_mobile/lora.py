"""One user's adapter while it is trained: all parameters in one flat tensor, and on disk as peft stores it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cdcda_export.adapter import CONFIG, WEIGHTS
from cdcda_export.decoder import Decoder, Lora
from cdcda_export.errors import ConfigError, did_you_mean
from cdcda_export.manifest import write_atomic, write_json

if TYPE_CHECKING:
    from cdcda_mobile.config import TrainConfig


class TrainableLora:
    """A (kaiming-uniform) and B (zero) of every adapted layer, as peft initialises them.

    Attributes:
        flat: every parameter, float32, shape (n,): one tensor for the optimizer, the norm and the checkpoint.
        gradient: its gradient, same shape, accumulated in place by autograd.
        layers: module name -> the layer, views of ``flat``.
    """

    def __init__(self, decoder: Decoder, targets: Sequence[str], rank: int, alpha: float, seed: int) -> None:
        known = {name.rsplit(".", 1)[1] for name in decoder.linear}
        for target in targets:
            if target not in known:
                raise ConfigError(f"train.targets names '{target}', which this base does not have.{did_you_mean(target, known)}")
        names = [name for name in decoder.linear if name.rsplit(".", 1)[1] in targets]
        shapes = [tuple(decoder.weights[f"{name}.weight"].shape) for name in names]
        total = sum(rank * (rows + columns) for rows, columns in shapes)
        self.flat = torch.zeros(total, device=decoder.device)
        self.gradient = torch.zeros_like(self.flat)
        self.layers: dict[str, Lora] = {}
        generator = torch.Generator().manual_seed(seed)
        at = 0
        for name, (rows, columns) in zip(names, shapes, strict=True):
            down, at = self._view(at, (rank, columns))
            up, at = self._view(at, (rows, rank))
            bound = 1 / math.sqrt(columns)  # kaiming_uniform_ with a=sqrt(5), as in peft
            with torch.no_grad():
                down.copy_((torch.rand(rank, columns, generator=generator) * 2 - 1) * bound)
            self.layers[name] = Lora(down, up, alpha / rank)

    def _view(self, at: int, shape: tuple[int, int]) -> tuple[torch.nn.Parameter, int]:
        end = at + shape[0] * shape[1]
        parameter = torch.nn.Parameter(self.flat[at:end].view(shape))
        parameter.grad = self.gradient[at:end].view(shape)
        return parameter, end


def save_adapter(lora: TrainableLora, flat: torch.Tensor, config: TrainConfig, base_name: str, directory: Path) -> list[str]:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as ``peft.PeftModel.from_pretrained`` reads them.

    Args:
        lora: the layers' names and shapes.
        flat: the parameter values to save (those of the best step, not of the last).
        config: rank, alpha, targets.
        base_name: written as ``base_model_name_or_path``.
        directory: where to.

    Returns:
        The names of the files.
    """
    from safetensors.numpy import save

    tensors, at = {}, 0
    for name, layer in lora.layers.items():
        for kind, part in (("lora_A", layer.down), ("lora_B", layer.up)):
            values = flat[at : at + part.numel()].view(part.shape)
            tensors[f"base_model.model.{name}.{kind}.weight"] = values.detach().cpu().numpy().copy()
            at += part.numel()
    write_atomic(directory / WEIGHTS, save(tensors))
    write_json(directory / CONFIG, peft_config(config, base_name))
    return [CONFIG, WEIGHTS]


def peft_config(config: TrainConfig, base_name: str) -> dict[str, object]:
    """Return the ``adapter_config.json`` of a plain LoRA."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
