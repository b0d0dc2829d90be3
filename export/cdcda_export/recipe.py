"""Recipes: TOML files whose sections are config dataclasses, so that every default has one home.

A recipe may set any field of any section it is read for; an unknown section or key is an error with a suggestion.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from cdcda_export.errors import ConfigError, did_you_mean

FORMATS: dict[str, str] = {"gguf": "q4_0", "gguf-lora": "q4_0", "onnx": "int8"}
"""Export format -> its default quantization."""
IMPORTANCES = ("none", "user")
VERIFICATIONS = ("full", "quick", "off")

_Config = TypeVar("_Config")


@dataclass(frozen=True)
class ExportConfig:
    """What artifact is made and what it must reach."""

    format: str = field(default="gguf", metadata={"help": "gguf, gguf-lora or onnx", "choices": tuple(FORMATS)})
    quant: str = field(
        default="",
        metadata={
            "help": "f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl, q2_k ... q6_k, base (keeps the base's types); "
            "for onnx int8, int4 (default: q4_0, for onnx int8)",
            "metavar": "TYPE",
        },
    )
    allow_fallback: bool = field(default=False, metadata={"help": "let a K-quant fall back where rows are no multiple of 256"})
    importance: str = field(
        default="none", metadata={"help": "none or user: weigh rounding by the squared activations on the user's training records"}
    )
    verify: str = field(default="full", metadata={"help": "full, quick or off: how much is checked before the artifact is called finished"})
    tensor_types: dict[str, str] = field(default_factory=dict, metadata={})
    """Regular expression -> type, as llama-quantize's ``--tensor-type``: the first one found in a tensor's name decides its type."""
    max_kl: float = field(default=0.0, metadata={})
    min_top1: float = field(default=0.0, metadata={})
    max_arrival_error: float = field(default=0.0, metadata={})
    max_tokens: int = field(default=512, metadata={})
    answer_tokens: int = field(default=48, metadata={})

    def __post_init__(self) -> None:
        for what, value, known in (
            ("export format", self.format, tuple(FORMATS)),
            ("importance", self.importance, IMPORTANCES),
            ("verification level", self.verify, VERIFICATIONS),
        ):
            if value not in known:
                raise ConfigError(f"There is no {what} '{value}'.{did_you_mean(value, known)}")
        if self.importance != "none" and self.format != "gguf":
            raise ConfigError(f"--importance {self.importance} weighs the rounding of merged weights, so it needs --format gguf.")
        if self.tensor_types:
            if self.format == "onnx":
                raise ConfigError("tensor_types names GGUF types, so it needs --format gguf or gguf-lora.")
            # Only here: it brings numpy, and --help must not wait for that.
            from cdcda_export.quantization import compile_overrides

            compile_overrides(self.tensor_types)

    @property
    def resolved_quant(self) -> str:
        """The quantization asked for, or the format's default."""
        return self.quant or FORMATS[self.format]

    def settings(self) -> dict[str, Any]:
        """Return what decides an artifact's bytes, for a stage's fingerprint.

        The order of ``tensor_types`` counts, for the first match decides. How much is checked afterwards changes no byte.
        """
        found = dataclasses.asdict(self) | {"tensor_types": [list(item) for item in self.tensor_types.items()]}
        del found["verify"]
        return found

    @property
    def directory(self) -> str:
        """Name of the artifact's directory in ``runs/<user>/``."""
        return f"{self.format}-{self.resolved_quant}" + ("-importance" if self.importance == "user" else "")


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("cdcda_export").joinpath("recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_recipe(name: str, sections: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """Read a recipe by path or by the name of a shipped one.

    Args:
        name: ``FILE.toml`` or a name from ``shipped_recipes``.
        sections: section name -> config dataclass.

    Returns:
        Section name -> the fields it sets, checked for name and type.

    Raises:
        ConfigError: no such file, not TOML, an unknown section or key, or a value of the wrong type.
    """
    path = Path(name)
    if not path.is_file():
        if name not in shipped_recipes():
            raise ConfigError(f"There is no recipe {name}.{did_you_mean(name, shipped_recipes())}")
        text = resources.files("cdcda_export").joinpath("recipes", f"{name}.toml").read_text(encoding="utf-8")
    else:
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The recipe {name} is not valid TOML: {error}.") from error
    return {section: _checked(name, section, values, sections) for section, values in raw.items()}


def _checked(recipe: str, section: str, values: Any, sections: Mapping[str, type]) -> dict[str, Any]:
    if section not in sections or not isinstance(values, dict):
        raise ConfigError(f"The recipe {recipe} has no section to put '{section}' in.{did_you_mean(section, sections)}")
    known = {item.name: item for item in dataclasses.fields(sections[section])}
    hints = typing.get_type_hints(sections[section])
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"The recipe {recipe} sets '{section}.{key}', which does not exist.{did_you_mean(key, known)}")
        expected = typing.get_origin(hints[key]) or hints[key]
        fits = isinstance(value, expected) and not (expected is int and isinstance(value, bool))
        if expected is float and isinstance(value, int) and not isinstance(value, bool):
            values[key], fits = float(value), True
        if not fits:
            raise ConfigError(f"The recipe {recipe} sets '{section}.{key}' to {value!r}; it must be of type {expected.__name__}.")
    return dict(values)


def build_config(cls: type[_Config], *layers: Mapping[str, Any]) -> _Config:
    """Build a config from layers of values, the last one winning; None means "not set"."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= {key: value for key, value in layer.items() if value is not None}
    return cls(**merged)
