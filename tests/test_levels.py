"""How much is checked is said everywhere, and only what was checked in full may leave for a phone; importance from a person's own text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cdcda_export.adapter import base_warning, read_adapter, read_peft
from cdcda_export.arrival import check_merged
from cdcda_export.artifact import gate_of, types_of
from cdcda_export.base import Base
from cdcda_export.bundle import require_verified
from cdcda_export.errors import ConfigError, FileError, VerificationFailed
from cdcda_export.export import AdapterJob, export_adapter
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import Stage
from cdcda_export.merge import merge_to_gguf
from cdcda_export.progress import Silent
from cdcda_export.quantization import choose_types, get_quant
from cdcda_export.recipe import ExportConfig
from cdcda_mobile.chat import read_artifact
from cdcda_mobile.cli import export_main
from tiny import make_adapter, make_gguf


@pytest.fixture
def job(tmp_path: Path) -> AdapterJob:
    base = make_gguf(tmp_path / "base.gguf")
    return AdapterJob(make_adapter(tmp_path / "adapter", base, rank=2, alpha=2.0), base, workspace=tmp_path / "runs")


def _with(job: AdapterJob, **config: object) -> AdapterJob:
    return replace(job, config=ExportConfig(quant="q8_0", **config))  # type: ignore[arg-type]


def test_full_may_leave_and_the_other_levels_may_not(job: AdapterJob) -> None:
    for level, state in (("off", None), ("quick", True)):
        asked = _with(job, verify=level)
        card = export_adapter(asked, Silent())
        assert card["verification"]["level"] == level and card["verification"]["passed"] is state
        bundle = json.loads((asked.directory / "bundle.json").read_text())
        assert bundle["verification"]["level"] == level
        manifest = json.loads((asked.directory / "manifest.json").read_text())
        assert manifest["metrics"]["verify"] == level
        with pytest.raises(VerificationFailed, match=f"--verify {level}.*--verify full"):
            require_verified(asked.directory)
    full = _with(job)
    export_adapter(full, Silent())
    assert require_verified(full.directory)["verification"]["level"] == "full"
    # Asking for less afterwards is answered with what is there.
    assert export_adapter(_with(job, verify="quick"), Silent())["verification"]["level"] == "full"
    assert require_verified(full.directory)
    (full.directory / "model.gguf").write_bytes(b"GGUF of somebody else")
    with pytest.raises(FileError, match="was changed"):
        require_verified(full.directory)


def test_quick_reads_every_rewritten_tensor_back(job: AdapterJob) -> None:
    card = export_adapter(_with(job, verify="quick"), Silent())
    found = card["verification"]
    assert found["tensors"] == 14 and found["token_ids"]["equal"] == found["token_ids"]["texts"] > 0
    assert 0 < found["worst_tensor"]["error"] < found["worst_tensor"]["bound"]
    assert found["kl_mean"] is None and card["samples"] == []


@pytest.mark.parametrize("level", ["quick", "full"])
def test_one_ruined_tensor_is_found(level: str, job: AdapterJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor whose rows are shifted by one keeps its statistics and its file loads: only reading it back tells."""
    import cdcda_export.artifact as artifact

    right = artifact._WRITERS["gguf"]

    def write(order: artifact.Order, progress: Silent) -> artifact.Artifact:
        made = right(order, progress)
        tensor = GgufFile(made.main)["blk.1.ffn_down.weight"]
        row = tensor.data.nbytes // tensor.rows
        content = bytearray(made.main.read_bytes())
        content[tensor.start : tensor.start + tensor.data.nbytes] = np.roll(tensor.data, row).tobytes()
        made.main.write_bytes(content)
        return made

    monkeypatch.setitem(artifact._WRITERS, "gguf", write)
    asked = _with(job, verify=level, max_kl=50.0, min_top1=0.01, max_arrival_error=50.0)
    with pytest.raises(VerificationFailed, match=r"1 of 14 rewritten tensors .* blk\.1\.ffn_down\.weight"):
        export_adapter(asked, Silent())
    assert not asked.directory.exists()


@pytest.mark.parametrize("level", ["quick", "full"])
@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_one_change_left_out_among_many_is_found(level: str, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixteen layers one lacks its change: too little for the mean of its kind, and within the rounding error of four bits."""
    import cdcda_export.artifact as artifact

    path = make_gguf(tmp_path / "base.gguf", layers=16)
    job = AdapterJob(make_adapter(tmp_path / "adapter", path, rank=2, alpha=0.3), path, workspace=tmp_path / "runs")
    right = artifact._WRITERS["gguf"]

    def write(order: artifact.Order, progress: Silent) -> artifact.Artifact:
        name = "blk.7.ffn_down.weight"
        delta = order.adapter.deltas[name]
        wrong = {**order.adapter.deltas, name: replace(delta, scale=delta.scale * factor)}
        return right(replace(order, adapter=replace(order.adapter, deltas=wrong)), progress)

    open_gates = {"max_kl": 50.0, "min_top1": 0.01, "max_arrival_error": 0.3}
    asked = replace(job, config=ExportConfig(quant="q4_0", verify=level, **open_gates))
    export_adapter(asked, Silent())
    monkeypatch.setitem(artifact._WRITERS, "gguf", write)
    with pytest.raises(VerificationFailed, match=r"in 1 of 112 rewritten tensors .* is in blk\.7\.ffn_down\.weight"):
        export_adapter(replace(asked, redo=True), Silent())


def test_every_rewritten_tensor_is_checked_whole_ones_too(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "base.gguf")
    directory = make_adapter(tmp_path / "adapter", path, targets=("v_proj",))
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.weight"] = np.linspace(0.5, 1.5, 64, dtype=np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    base, quant = GgufFile(path), get_quant("q8_0")
    merge_to_gguf(base, read_adapter(directory, base), choose_types(base, quant), quant, tmp_path / "m.gguf")
    checks = {check.tensor: check for check in check_merged(base, GgufFile(tmp_path / "m.gguf"), read_peft(directory))}
    assert set(checks) == {"blk.0.attn_v.weight", "blk.1.attn_v.weight", "output_norm.weight"}
    assert checks["output_norm.weight"].error == 0 and checks["output_norm.weight"].arrived == pytest.approx(1)


def test_importance_of_an_adapter_needs_its_own_text(job: AdapterJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "own.txt"
    text.write_text("The lock keeper sleeps until nine and the geese know it.\n\nNobody has paid for the winch in a year.\n")
    common = ["--adapter", str(job.adapter), "--base", str(job.base), "--workspace", str(tmp_path / "runs"), "--quiet", "--verify", "quick"]
    weighed = [*common, "--importance", "user"]
    assert export_main(weighed) == 2
    assert "--calibration" in capsys.readouterr().err
    assert export_main([*weighed, "--calibration", str(text), "--text", str(text)]) == 2
    assert "must not calibrate" in capsys.readouterr().err
    assert export_main([*weighed, "--quant", "q8_0", "--calibration", str(text)]) == 2
    assert "changes nothing at q8_0" in capsys.readouterr().err
    assert export_main([*weighed, "--calibration", str(text)]) == 0
    assert export_main(common) == 0
    folder = tmp_path / "runs" / "_adapters" / "adapter"
    one, other = (GgufFile(folder / name / "model.gguf") for name in ("gguf-q4_0-importance", "gguf-q4_0"))
    assert bytes(one["blk.1.ffn_down.weight"].data) != bytes(other["blk.1.ffn_down.weight"].data)


def test_a_base_of_many_users_is_not_changed_by_any_of_them(tmp_path: Path) -> None:
    """What one adapter replaces must not be in the reference of the next."""
    path = make_gguf(tmp_path / "base.gguf")
    whole = make_adapter(tmp_path / "whole", path, targets=("v_proj",), rank=2, alpha=2.0)
    tensors = load_file(whole / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.weight"] = np.full(64, 3.0, np.float32)
    save_file(tensors, whole / "adapter_model.safetensors")
    plain = make_adapter(tmp_path / "plain", path, rank=2, alpha=2.0)
    alone, shared = Base(path), Base(path)
    jobs = {a: AdapterJob(a, path, out=tmp_path / f"out-{a.name}", config=ExportConfig(quant="q8_0")) for a in (whole, plain)}
    export_adapter(jobs[whole], Silent(), shared)
    after = export_adapter(jobs[plain], Silent(), shared)["verification"]
    expected = export_adapter(AdapterJob(plain, path, out=tmp_path / "alone", config=ExportConfig(quant="q8_0")), Silent(), alone)
    assert after["kl_mean"] == pytest.approx(expected["verification"]["kl_mean"], abs=1e-9)


def test_base_keeps_every_untouched_tensor_bit_for_bit(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "base.gguf", kind="Q8_0", **{"general.file_type": 7})
    adapter = make_adapter(tmp_path / "adapter", path, targets=("v_proj",), rank=2, alpha=2.0)
    job = AdapterJob(adapter, path, workspace=tmp_path / "runs", config=ExportConfig(quant="base"))
    card = export_adapter(job, Silent())
    base, made = GgufFile(path), GgufFile(job.directory / "model.gguf")
    assert card["artifact"]["double_quantized"] is None
    for name in base:
        assert (bytes(base[name].data) == bytes(made[name].data)) == ("attn_v" not in name), name
        assert base[name].type == made[name].type


def test_an_unknown_level_is_suggested() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'quick'"):
        ExportConfig(verify="quik")


def test_the_shared_base_of_an_adapter_gguf_is_looked_at(job: AdapterJob, tmp_path: Path) -> None:
    asked = replace(job, out=tmp_path / "elsewhere" / "lora", config=ExportConfig(format="gguf-lora", quant="q8_0"))
    export_adapter(asked, Silent())
    artifact = read_artifact(asked.directory)
    (shared,) = (tmp_path / "runs" / "_shared").glob("*/model.gguf")
    assert artifact.files["model"].resolve() == shared.resolve()
    other = replace(asked, out=tmp_path / "other", config=ExportConfig(format="gguf-lora", quant="q8_0", tensor_types={"attn_v": "f16"}))
    export_adapter(other, Silent())
    assert require_verified(asked.directory) and require_verified(other.directory)  # neither has replaced the other's base
    shared.write_bytes(b"GGUF of nobody")
    with pytest.raises(FileError, match="shared base"):
        require_verified(asked.directory)
    card = export_adapter(asked, Silent())
    assert not card["stages"][0]["reused"] and require_verified(asked.directory)


def test_an_adapter_gguf_is_stale_when_its_card_changes(job: AdapterJob) -> None:
    asked = replace(job, config=ExportConfig(format="gguf-lora", quant="q8_0", verify="off"))
    export_adapter(asked, Silent())
    (job.adapter / "README.md").write_text("---\nlicense: mit\n---\n# Another card\n")
    assert not export_adapter(asked, Silent())["stages"][0]["reused"]


def test_an_artifact_never_replaces_its_adapter_or_that_of_another(job: AdapterJob, tmp_path: Path) -> None:
    for out in (job.adapter, job.adapter.parent):
        with pytest.raises(ConfigError, match="over the adapter"):
            export_adapter(replace(job, out=out), Silent())
    assert (job.adapter / "adapter_model.safetensors").exists()
    off = _with(job, verify="off")
    export_adapter(off, Silent())
    namesake = make_adapter(tmp_path / "bob" / "adapter", job.base, seed=9)
    with pytest.raises(ConfigError, match="another adapter of that name.*--out"):
        export_adapter(replace(off, adapter=namesake), Silent())


@pytest.mark.parametrize("stage", ["adapter", "history"])
def test_what_is_no_artifact_is_not_verified(stage: str, tmp_path: Path) -> None:
    made = Stage(tmp_path / stage, {}, {})
    (made.begin() / "x").write_text("x")
    made.finish({}, ["x"])
    with pytest.raises(FileError, match="no finished artifact"):
        require_verified(made.directory)


def test_a_recipe_that_sets_every_bound_needs_no_measured_gate(llama_base: Path) -> None:
    bounds = {"max_kl": 0.5, "min_top1": 0.5, "max_arrival_error": 0.5}
    assert gate_of(ExportConfig(quant="q2_k", **bounds), GgufFile(llama_base)).kl == 0.5


def test_small_norms_of_gemma_are_exact(tmp_path: Path) -> None:
    """They are stored with 1 added: what float32 loses there is no error of the file."""
    path = make_gguf(tmp_path / "base.gguf", "gemma3")
    directory = make_adapter(tmp_path / "adapter", path, targets=("v_proj",), rank=2, alpha=2.0)
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.weight"] = np.random.default_rng(0).normal(0, 0.01, 64).astype(np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    job = AdapterJob(directory, path, workspace=tmp_path / "runs", config=ExportConfig(quant="q8_0", verify="quick"))
    assert export_adapter(job, Silent())["verification"]["passed"]


def test_a_converted_base_keeps_its_name(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "model.gguf")
    base = GgufFile(path)
    adapter = read_adapter(make_adapter(tmp_path / "a", path, base_model_name_or_path="org/Other-1B"), base)
    assert "trained on 'org/Other-1B', the base is 'Mine-135M'" in str(base_warning(adapter, base, "Mine-135M"))
    assert base_warning(adapter, base, "Other-1B") is None


@pytest.mark.parametrize(("kind", "first"), [("Q4_1", "Q4_0"), ("F16", "Q4_1")])
def test_importance_takes_no_type_that_would_find_the_bases_grid_again(kind: str, first: str, tmp_path: Path) -> None:
    base = GgufFile(make_gguf(tmp_path / "base.gguf", kind=kind, layers=16))
    types = types_of(ExportConfig(quant="q4_0", importance="user"), base)
    assert types["blk.0.ffn_down.weight"].name == first and types["blk.9.ffn_down.weight"].name == "Q4_0"


@pytest.mark.gpu
def test_the_reference_on_a_gpu_is_that_on_the_cpu(job: AdapterJob) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU with CUDA")
    assert export_adapter(_with(job), Silent())["verification"]["passed"]
