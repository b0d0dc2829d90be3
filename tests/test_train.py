"""Training on tiny models: the loss, the bits after a kill, the early stop, and the format on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cdcda_export.base_model import load_base_model
from cdcda_export.decoder import Decoder
from cdcda_export.errors import CdcdaError, ConfigError
from cdcda_export.gguf import GgufFile
from cdcda_export.progress import Silent
from cdcda_export.verify import Probe
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.dataset import check_token_ids, encoding_of
from cdcda_mobile.history import Record
from cdcda_mobile.lora import TrainableLora, save_adapter
from cdcda_mobile.train import Example, State, Trainer, flat_targets, mean_nll

TEXTS = ("a boat on the north shore", "rust again and again", "the cat is in the engine", "no invoice is ever on time")


def _records(count: int) -> list[Record]:
    return [
        Record(f"{i:03}", f"2024-01-{1 + i % 28:02}", "headline", f"{TEXTS[i % 4]} {i}", f"{TEXTS[-i % 4]}; {i} times")
        for i in range(count)
    ]


@pytest.fixture
def setting(llama_base: Path) -> tuple[Decoder, list[Probe]]:
    base = GgufFile(llama_base)
    encoding = encoding_of(base)
    probes = encoding.probes(_records(14), 256)
    check_token_ids(base, encoding, probes)
    return Decoder(base), probes


CONFIG = TrainConfig(rank=2, learning_rate=0.02, batch_size=4, epochs=3, checkpoint_steps=2, patience=99, threads=1)


def _train(setting: tuple[Decoder, list[Probe]], directory: Path, config: TrainConfig = CONFIG, seed: int = 0) -> Trainer:
    decoder, probes = setting
    directory.mkdir(exist_ok=True)
    return Trainer(decoder, [Example(p) for p in probes[:10]], probes[10:], config, seed, directory)


def test_loss_and_gradients_equal_peft_on_transformers(llama_base: Path, setting: tuple[Decoder, list[Probe]], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    decoder, probes = setting
    trainer = _train(setting, tmp_path / "t")
    model = get_peft_model(
        load_base_model(GgufFile(llama_base)),
        LoraConfig(r=2, lora_alpha=16, target_modules=CONFIG.targets, task_type="CAUSAL_LM"),
    )
    torch.manual_seed(0)
    for name, layer in trainer.lora.layers.items():
        layer.up.data.normal_(std=0.05)
        theirs = model.get_submodule(f"base_model.model.{name}")
        theirs.lora_A["default"].weight.data.copy_(layer.down.data)
        theirs.lora_B["default"].weight.data.copy_(layer.up.data)
    loss = trainer._loss([Example(p) for p in probes[:3]])
    loss.backward()
    losses = []
    for probe in probes[:3]:
        logits = model(torch.tensor([probe.ids[:-1]])).logits[0][probe.answer_positions()]
        losses.append(F.cross_entropy(logits, torch.tensor(probe.answer), reduction="sum"))
    expected = sum(losses) / sum(len(p.answer) for p in probes[:3])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, layer in trainer.lora.layers.items():
        theirs = model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.down.grad, theirs.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(layer.up.grad, theirs.lora_B["default"].weight.grad, rtol=1e-3, atol=1e-5)


def test_only_answer_tokens_are_targets() -> None:
    one, two = Probe("", "", (1, 2, 3), (4, 5)), Probe("", "", (6,), (7, 8, 9))
    positions, targets = flat_targets([one, two])
    assert targets.tolist() == [4, 5, 7, 8, 9]
    assert positions.tolist() == [2, 3, 4, 5, 6]  # rows are 1 2 3 4 | 6 7 8


def test_training_learns_and_the_same_seed_gives_the_same_bits(setting: tuple[Decoder, list[Probe]], tmp_path: Path) -> None:
    first = _train(setting, tmp_path / "a").run(Silent())
    second = _train(setting, tmp_path / "b").run(Silent())
    other = _train(setting, tmp_path / "c", seed=1).run(Silent())
    assert torch.equal(first.best, second.best)
    assert not torch.equal(first.best, other.best)
    curve = [point["validation_nll"] for point in first.state.curve]
    assert min(curve) < 0.8 * curve[0]


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5, 8])
def test_a_killed_run_continues_to_the_same_bits(setting: tuple[Decoder, list[Probe]], tmp_path: Path, stop_after: int) -> None:
    undisturbed = _train(setting, tmp_path / "a").run(Silent())

    class Killer(Silent):
        left = stop_after

        def advance(self, n: int = 1, note: str = "") -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(setting, tmp_path / "b").run(Killer())
    resumed = _train(setting, tmp_path / "b").run(Silent())
    assert torch.equal(resumed.best, undisturbed.best)
    assert torch.equal(resumed.lora.flat, undisturbed.lora.flat)
    assert [p["step"] for p in resumed.state.curve] == [p["step"] for p in undisturbed.state.curve]


def test_early_stop_keeps_the_best_step(setting: tuple[Decoder, list[Probe]], tmp_path: Path) -> None:
    config = TrainConfig(rank=2, learning_rate=0.5, batch_size=4, epochs=20, patience=2, evaluations_per_epoch=3, threads=1)
    trainer = _train(setting, tmp_path / "a", config)
    result = trainer.run(Silent())
    assert result.state.step < result.total_steps
    best = min(result.state.curve, key=lambda p: p["validation_nll"])
    assert result.state.best_step == best["step"]
    result.lora.flat.data.copy_(result.best)
    assert mean_nll(trainer.decoder, result.lora, trainer.validation) == pytest.approx(best["validation_nll"], rel=1e-4)


def test_a_diverging_run_says_so(setting: tuple[Decoder, list[Probe]], tmp_path: Path) -> None:
    trainer = _train(setting, tmp_path / "a")
    trainer.lora.flat.data.fill_(float("nan"))
    with pytest.raises(CdcdaError, match="learning_rate"):
        trainer.run(Silent())


def test_synthetic_weight_scales_its_part_of_the_loss(setting: tuple[Decoder, list[Probe]], tmp_path: Path) -> None:
    _, probes = setting
    trainer = _train(setting, tmp_path / "a")
    one, two = (float(trainer._loss([Example(p)]).detach()) for p in probes[:2])
    n, m = (len(p.answer) for p in probes[:2])
    both = float(trainer._loss([Example(probes[0]), Example(probes[1], 0.25)]).detach())
    assert both == pytest.approx((one * n + 0.25 * two * m) / (n + 0.25 * m), rel=1e-4)


def test_unknown_target_is_suggested(setting: tuple[Decoder, list[Probe]]) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'q_proj'"):
        TrainableLora(setting[0], ["q_prj"], 2, 4.0, 0)


def test_saved_adapters_load_in_peft_with_the_same_loss(llama_base: Path, setting: tuple[Decoder, list[Probe]], tmp_path: Path) -> None:
    from peft import PeftModel

    decoder, probes = setting
    result = _train(setting, tmp_path / "t").run(Silent())
    save_adapter(result.lora, result.best, CONFIG, "tiny-llama", tmp_path / "adapter")
    model = PeftModel.from_pretrained(load_base_model(GgufFile(llama_base)), str(tmp_path / "adapter"))
    result.lora.flat.data.copy_(result.best)
    row = probes[11].ids
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits([row], result.lora.layers), model(torch.tensor([row])).logits[0], rtol=1e-3, atol=1e-3)


def test_without_validation_the_last_step_is_kept(setting: tuple[Decoder, list[Probe]], tmp_path: Path) -> None:
    decoder, probes = setting
    trainer = Trainer(decoder, [Example(p) for p in probes[:8]], [], CONFIG, 0, tmp_path)
    result = trainer.run(Silent())
    assert result.state.best_step == result.total_steps
    assert torch.equal(result.best, result.lora.flat)
    assert result.metrics()["best_validation_nll"] is None


def test_state_round_trips() -> None:
    assert State(**vars(State(step=3, curve=[{"step": 1.0}]))).step == 3
