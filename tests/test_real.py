"""The main job on the real base model: the card, the chat, the second run, and whose model it is."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from cdcda_export.adapter import read_adapter
from cdcda_export.base import open_base
from cdcda_export.gguf import GgufFile
from cdcda_export.merge import merge_to_gguf
from cdcda_export.progress import Silent
from cdcda_export.quantization import choose_types, get_quant
from cdcda_export.runtime import LlamaCpp
from cdcda_export.tokenizer import bpe_tokenizer
from cdcda_export.verify import Probe
from cdcda_mobile.cli import export_main, main
from cdcda_mobile.config import AugmentConfig, HistoryConfig, TrainConfig
from cdcda_mobile.dataset import encoding_of
from cdcda_mobile.history import list_users, read_history
from cdcda_mobile.pipeline import Pipeline, UserJob

pytestmark = pytest.mark.model
USERS = ("17", "42", "63", "88")
# One pass over the real records: enough to tell the person, and four users fit into a test run.
RECIPE = "[augment]\nkeep = 0\n[train]\nepochs = 1\nlearning_rate = 4e-3\nbatch_size = 4\n"
TRAIN = TrainConfig(epochs=1, learning_rate=4e-3, batch_size=4)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which every sample user has an adapter."""
    root = tmp_path_factory.mktemp("real") / "runs"
    for user in USERS:
        Pipeline(UserJob(user=user, workspace=root, augment=AugmentConfig(keep=0), train=TRAIN), Silent()).run(until="adapter")
    return root


def test_the_job_ends_in_a_card_an_artifact_that_answers_and_an_instant_second_run(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "one-pass.toml"
    recipe.write_text(RECIPE)
    arguments = ["--user", "42", "--format", "gguf", "--workspace", str(workspace), "--recipe", str(recipe)]
    assert export_main(arguments) == 0
    printed = capsys.readouterr().out
    assert "gguf-q4_0/model.gguf" in printed
    assert "quantized twice" in printed
    card = json.loads((workspace / "42" / "card.json").read_text())
    assert card["verification"]["passed"]
    assert card["stages"][1]["reused"]  # the adapter of the fixture
    assert len(card["samples"]) == 3
    test = Pipeline(UserJob(user="42", workspace=workspace), Silent()).records("test")
    assert [s["user"] for s in card["samples"]] == [r.output for r in test[:3]]
    gain = card["personal_gain"]
    assert gain["nll_personal"] < gain["nll_base"]
    began = time.monotonic()
    assert export_main([*arguments, "--json"]) == 0
    assert time.monotonic() - began < 3
    again = json.loads(capsys.readouterr().out)
    assert again["artifact"] == card["artifact"]
    assert all(stage["reused"] for stage in again["stages"])
    assert main(["chat", str(workspace / "42"), "--prompt", "/headline The winch jammed again."]) == 0
    assert len(capsys.readouterr().out.strip()) > 5


def _nll(runtime: LlamaCpp, probes: list[Probe]) -> float:
    return sum(runtime.nll_many(probes)) / sum(len(p.answer) for p in probes)


def test_after_quantization_every_model_knows_its_own_user_best(workspace: Path, tmp_path: Path) -> None:
    base = open_base(None)
    encoding, quant = encoding_of(base), get_quant("q4_0")
    probes = {u: encoding.probes(Pipeline(UserJob(user=u, workspace=workspace), Silent()).records("test"), 512) for u in USERS}
    models = {"base": base.path}
    for user in USERS:
        models[user] = tmp_path / f"{user}.gguf"
        adapter = read_adapter(workspace / user / "adapter", base)
        merge_to_gguf(base, adapter, choose_types(base, quant), quant, models[user])
    table: dict[str, dict[str, float]] = {user: {} for user in USERS}
    for name, path in models.items():
        with LlamaCpp(path, n_ctx=512) as runtime:
            for user in USERS:
                table[user][name] = _nll(runtime, probes[user])
    for user, row in table.items():
        assert min(row, key=lambda name: row[name]) == user, json.dumps(table, indent=1)


def test_token_ids_of_every_sample_text_equal_llama_cpps(real_base: Path) -> None:
    base = GgufFile(real_base)
    tokenizer = bpe_tokenizer(base)
    with LlamaCpp(real_base, vocab_only=True) as runtime:
        for user in list_users(HistoryConfig()):
            for record in read_history(user, HistoryConfig()).records:
                for text in (record.input, record.output):
                    assert tokenizer.encode(text) == runtime.encode(text), record.id
        hard = "naïve café 漢字 🙂👩‍👩‍👧 1234567 don't  stop\n\n\tnow <|im_start|>x<|im_end|> \u00a0\u200b…"
        assert tokenizer.encode(hard) == runtime.encode(hard)
