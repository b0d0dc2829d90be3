"""What an adapter GGUF says about itself: the entries that llama.cpp's converter takes from the folder's name and the model card.

The rules are those of llama.cpp's ``gguf-py/gguf/metadata.py`` (MIT), so that the file is the one its users would have made. They
are guesses from names; nothing at run time depends on them.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from cdcda_export.gguf import pack_pair

_HUB = "https://huggingface.co"
_VERSION = re.compile(r"(v|iter)?\d+([.]\d+)*", re.IGNORECASE)
_TYPE = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
_SIZE = re.compile(r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl)", re.IGNORECASE)
_TUNE = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)


def describing_pairs(directory: Path, weights: int) -> list[bytes]:
    """Return the ``general.*`` entries that describe an adapter, in the converter's order.

    Args:
        directory: the adapter's folder; its ``README.md`` is read where there is one.
        weights: number of weights of the matrices that the adapter changes.
    """
    card = _front_matter(directory / "README.md")
    guessed = _guess(directory.name, weights)
    name = card.get("name") or card.get("model_name")
    facts = {"name": str(name) if name else _title(guessed["name"])}
    facts |= {key: guessed[key] for key in ("version", "finetune", "basename", "size_label") if guessed.get(key)}
    facts |= {key: str(card[key]) for key in ("license", "license_name", "license_link") if isinstance(card.get(key), str)}
    pairs = [pack_pair(f"general.{key}", value) for key, value in facts.items()]
    for kind, keys in (("base_model", ("base_model", "base_models")), ("dataset", ("datasets", "dataset"))):
        named = next((card[key] for key in keys if key in card), None)
        pairs += _origins(kind, _as_list(named), weights) if named is not None else []
    for key, sources in (("tags", ("tags", "pipeline_tag")), ("languages", ("languages", "language"))):
        values = [value for source in sources for value in _as_list(card.get(source))]
        pairs += [pack_pair(f"general.{key}", values)] if values else []
    return pairs


def _origins(kind: str, ids: list[str], weights: int) -> list[bytes]:
    pairs = [pack_pair(f"general.{kind}.count", len(ids))]
    for index, model_id in enumerate(ids):
        facts: dict[str, str] = {}
        found = re.fullmatch(rf"{_HUB}/([^/]+/[^/]+)", model_id)
        address = model_id.startswith(("http://", "https://", "ssh://"))
        if found or not address:
            guessed = _guess(found[1] if found else model_id, weights)
            facts = {"name": _title(guessed["name"])} | {key: guessed[key] for key in ("version",) if guessed.get(key)}
            if "organization" in guessed:
                facts["organization"] = _title(guessed["organization"])
                facts["repo_url"] = f"{_HUB}/{guessed['organization']}/{guessed['name']}"
        if address:
            facts["repo_url"] = model_id
        pairs += [pack_pair(f"general.{kind}.{index}.{key}", value) for key, value in facts.items() if value]
    return pairs


def _guess(model_id: str, weights: int) -> dict[str, str]:
    """Split ``org/name-7B-chat-v2`` into its parts (``Metadata.get_model_id_components``)."""
    if " " in model_id:
        return {"name": model_id}
    organization, slash, name = model_id.partition("/") if "/" in model_id else ("", "", model_id)
    facts = {"name": name}
    if slash and not organization.startswith("."):
        facts["organization"] = organization
    parts = [part for part in name.split("-") if part]
    kinds = [_kind(part, index, weights) for index, part in enumerate(parts)]
    parts = [_normalised(part, kind) for part, kind in zip(parts, kinds, strict=True)]
    if any(kind == "size_label" and re.search(r"\d", part) for part, kind in zip(parts, kinds, strict=True)):
        kinds = ["" if kind == "size_label" and part.isalpha() else kind for part, kind in zip(parts, kinds, strict=True)]
    labels = [{kind} if kind else set() for kind in kinds]
    at_start = True
    for part, label in zip(parts, labels, strict=True):
        if at_start and ((not label and part[0].isalpha()) or "version" in label):
            label.add("basename")
        else:
            at_start = False
            label |= set() if label else {"finetune"}
    for label in reversed(labels):
        if "basename" not in label or len(label) < 2:
            break
        label.remove("basename")
    chosen = list(zip(parts, labels, strict=True))
    facts["size_label"] = "-".join(dict.fromkeys(part for part, label in chosen if "size_label" in label))
    facts["finetune"] = "-".join(part for part, label in chosen if "finetune" in label)
    facts["version"] = "-".join(part for part, label in chosen if "version" in label and "basename" not in label)
    if any(facts[key] for key in ("size_label", "finetune", "version")):  # else it is too ambiguous to name a family
        facts["basename"] = "-".join(part for part, label in chosen if "basename" in label)
    return facts


def _kind(part: str, index: int, weights: int) -> str:
    if _VERSION.fullmatch(part):
        return "version"
    if _TYPE.fullmatch(part):
        return "type"
    if index and _SIZE.fullmatch(part):
        return "finetune" if _is_context_length(part, weights) else "size_label"
    if index and _TUNE.fullmatch(part):
        return "type" if part.lower() == "lora" else "finetune"
    return ""


def _sized(part: str) -> str:
    part = part.replace("_", ".")
    if part[-1].isdecimal():  # bloom's 7b1
        part = f"{part[:-2]}.{part[-1]}{part[-2]}"
    return part[:-1] + part[-1].upper() if len(part) > 1 and part[-2].isdecimal() and part[-1] in "kmbt" else part


def _is_context_length(part: str, weights: int) -> bool:
    sized = _sized(part)
    try:
        claimed = float(sized[:-1]) * 1000.0 ** " KMBT".find(sized[-1])
    except ValueError:
        return False
    return bool(weights) and claimed < weights // 8


def _normalised(part: str, kind: str) -> str:
    if kind == "type" and part.lower() != "lora":
        return part.upper()
    if kind == "size_label":
        return _sized(part)
    if kind == "finetune" and _SIZE.fullmatch(part):
        return _sized(part)[:-1] + _sized(part)[-1].lower()
    return part


def _title(name: str) -> str:
    words = name.strip().replace("-", " ").split()
    return " ".join(word.title() if word.islower() and not re.match(r"^(v\d+(?:\.\d+)*|\d.*)$", word) else word for word in words)


def _as_list(value: Any) -> list[str]:
    return list(value) if isinstance(value, list) else [value] if isinstance(value, str) else []


def _front_matter(path: Path) -> dict[str, str | list[str]]:
    """Return a model card's simple entries: ``key: text`` and ``key:`` with a list of texts below."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    if lines[:1] != ["---"]:
        return {}
    entries: dict[str, str | list[str]] = {}
    key = ""
    for line in itertools.takewhile(lambda line: line != "---", lines[1:]):
        entry, item = re.fullmatch(r"([\w-]+):\s*(.*)", line), re.fullmatch(r"\s*-\s+(.*)", line)
        if entry:
            key = entry[1]
            entries[key] = _text(entry[2]) if entry[2] else []
        elif item and isinstance(values := entries.get(key), list):
            values.append(_text(item[1]))
    return entries


def _text(value: str) -> str:
    value = value.strip()
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
