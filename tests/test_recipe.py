"""Recipes and flags: one home for every default, and a suggestion for every typo."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cdcda_export.errors import ConfigError
from cdcda_export.recipe import FORMATS, ExportConfig, build_config, read_recipe, shipped_recipes
from cdcda_mobile.cli import SECTIONS, _flag, export_parser
from cdcda_mobile.config import TrainConfig


def _recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    for section, values in read_recipe(name, SECTIONS).items():
        build_config(SECTIONS[section], values)


def test_default_recipe_spells_out_the_defaults() -> None:
    for section, values in read_recipe("default", SECTIONS).items():
        default = SECTIONS[section]()
        for key, value in values.items():
            actual = getattr(default, key)
            if (section, key) == ("export", "quant"):
                actual = FORMATS[default.format]
            assert value == actual, f"{section}.{key}"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[train]\nrnak = 4", "Did you mean 'rank'"),
        ("[trian]\nrank = 4", "Did you mean 'train'"),
        ("rank = 4", "no section"),
        ("[train]\nrank = 'four'", "must be of type int"),
        ("[train]\nrank = true", "must be of type int"),
        ("[train\n", "not valid TOML"),
    ],
)
def test_mistakes_are_errors_with_a_suggestion(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_recipe(_recipe(tmp_path, text), SECTIONS)


def test_unknown_recipe_is_suggested() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'quality'"):
        read_recipe("qualty", SECTIONS)


def test_flags_win_over_recipes_and_recipes_over_defaults(tmp_path: Path) -> None:
    recipe = read_recipe(_recipe(tmp_path, "[train]\nrank = 4\nlearning_rate = 1\n"), SECTIONS)
    config = build_config(TrainConfig, recipe["train"], {"rank": 2, "epochs": None})
    assert (config.rank, config.learning_rate, config.epochs) == (2, 1.0, TrainConfig().epochs)


def test_every_field_with_help_is_a_flag_and_flags_hold_no_defaults() -> None:
    options = {o: a for a in export_parser("cdcda-export")._actions for o in a.option_strings}
    for section, cls in SECTIONS.items():
        for item in dataclasses.fields(cls):
            flag = _flag(section, item.name)
            assert (flag in options) == bool(item.metadata.get("help")), flag
            if flag in options:
                assert options[flag].default is None


@pytest.mark.parametrize("values", [{"rank": 0}, {"epochs": 0}, {"targets": []}])
def test_senseless_training_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        TrainConfig(**values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"format": "ggfu"}, "Did you mean 'gguf'"),
        ({"importance": "users"}, "no importance 'users'.*Did you mean 'user'"),
        ({"importance": "user", "format": "gguf-lora"}, "needs --format gguf"),
        ({"importance": "user", "format": "onnx"}, "needs --format gguf"),
        ({"verify": "fast"}, "verification level 'fast'.*full, off, quick"),
        ({"verify": "quik"}, "Did you mean 'quick'"),
        ({"tensor_types": {"attn_v": "q8"}}, "Did you mean 'q8_0'"),
        ({"tensor_types": {"attn_(": "q8_0"}}, "no regular expression"),
        ({"tensor_types": {"attn_v": "q8_0"}, "format": "onnx"}, "needs --format gguf"),
    ],
)
def test_senseless_exports_are_refused_with_the_fix(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ExportConfig(**values)


@pytest.mark.parametrize(
    "text", ["tensor_types = {ffn_down = 'q5_0', attn_v = 'Q8_0'}", "[export.tensor_types]\nffn_down='q5_0'\nattn_v='Q8_0'"]
)
def test_recipes_name_the_types_of_tensors_in_order(tmp_path: Path, text: str) -> None:
    recipe = read_recipe(_recipe(tmp_path, text if text.startswith("[") else f"[export]\n{text}"), SECTIONS)
    config = build_config(ExportConfig, recipe["export"])
    assert list(config.tensor_types.items()) == [("ffn_down", "q5_0"), ("attn_v", "Q8_0")]


def test_tensor_types_of_a_recipe_must_be_a_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"export\.tensor_types.*of type dict"):
        read_recipe(_recipe(tmp_path, "[export]\ntensor_types = ['attn_v']"), SECTIONS)


def test_weighed_rounding_has_a_directory_of_its_own() -> None:
    assert ExportConfig(quant="q5_0").directory == "gguf-q5_0"
    assert ExportConfig(quant="q5_0", importance="user").directory == "gguf-q5_0-importance"
