"""How long an adapter takes to become a phone file: ours against the standard route, from process start to fsync, and what it costs.

The standard route is PEFT's merge, llama.cpp's converter and its quantizer (``standard_route.py``). Both start from the same float32
Hugging Face directory of the default 135M model and the same adapter (every linear layer, rank 8); their tensors are compared byte for
byte. Ours is the whole command, manifest and report included, with the base's cache warm; cold runs stand beside it.

    python benchmarks/export_speed.py [--quick] [--pairs N] [--skip-onnx] [--skip-large]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from cdcda_export.base import default_base
from cdcda_export.cache import cache_folder
from cdcda_export.gguf import GgufFile
from laboratory import print_table, write_results
from standard_route import copy_tokenizer

HERE = Path(__file__).resolve().parent
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH = 20
_BPE = """
import json, sys
from pathlib import Path
from cdcda_export.base import default_base
from cdcda_export.base_model import load_base_model
from cdcda_export.gguf import GgufFile
from cdcda_export.tokenizer import bpe_tokenizer
base, out = GgufFile(default_base()), Path(sys.argv[1])
load_base_model(base).save_pretrained(out)
bpe_tokenizer(base).save(out / "tokenizer.json")
tokens = base.get_value("tokenizer.ggml.tokens")
named = {k + "_token": tokens[base.get_value(f"tokenizer.ggml.{k}_token_id")] for k in ("bos", "eos")}
template = base.get_value("tokenizer.chat_template")
settings = {**named, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
(out / "tokenizer_config.json").write_text(json.dumps(settings))
"""
# The shape of Qwen2.5-0.5B with random weights: what grows with size is bytes, not their values.
_LARGE = """
import sys, torch, transformers
torch.manual_seed(0)
config = transformers.Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
    num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32768)
transformers.Qwen2ForCausalLM(config).save_pretrained(sys.argv[1])
"""
_LAUNCH = """
import os, sys, time
began = time.monotonic()
_, status, usage = os.wait4(os.spawnv(os.P_NOWAIT, sys.argv[2], sys.argv[2:]), 0)
with open(sys.argv[1], "w") as file:
    file.write(f"{time.monotonic() - began} {usage.ru_maxrss}")
sys.exit(os.waitstatus_to_exitcode(status))
"""
_WRITE = """
import os, sys, time
from pathlib import Path
contents = [Path(name).read_bytes() for name in sys.argv[2:]]
began = time.monotonic()
for at, content in enumerate(contents):
    with open(os.path.join(sys.argv[1], f"{at}.bin"), "wb", buffering=0) as stream:
        stream.write(content)
        os.fsync(stream.fileno())
print(time.monotonic() - began)
"""
_OPTIMUM = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], sys.argv[2], task="text-generation-with-past")
"""


def environment(**changes: str) -> dict[str, str]:
    """Return the children's environment: compiled bytecode is kept, as on every user's machine."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"HF_HUB_OFFLINE": "1"} | changes


def timed(command: list[Any], **changes: str) -> dict[str, float]:
    """Run a command and return its wall time in seconds and its peak resident memory in MB (its largest descendant included).

    Through a small process, for a child's peak is never below what its parent held when it was made.
    """
    with tempfile.TemporaryFile() as said, tempfile.NamedTemporaryFile("r") as measured:
        words = [sys.executable, "-S", "-c", _LAUNCH, measured.name, *map(str, command)]
        code = subprocess.run(words, env=environment(**changes), stdout=said, stderr=said, check=False).returncode
        if code:
            said.seek(0)
            raise SystemExit(f"{command} failed:\n{said.read().decode(errors='replace')}")
        seconds, kilobytes = measured.read().split()
    return {"seconds": float(seconds), "peak_mb": int(kilobytes) / 1e3}


def ours(adapter: Path, base: Path, out: Path, *options: str, **changes: str) -> dict[str, float]:
    """Time ``cdcda-export`` on one adapter."""
    shutil.rmtree(out, ignore_errors=True)
    command = [Path(sys.executable).with_name("cdcda-export"), "--adapter", adapter, "--base", base, "--out", out, "--quiet", *options]
    return timed(command, **changes)


def theirs(hf: Path, adapter: Path, out: Path, quant: str) -> dict[str, float]:
    """Time the standard route."""
    return timed([sys.executable, HERE / "standard_route.py", hf, adapter, out, quant])


def make_adapter(folder: Path, base: Mapping[str, Any], layers: int, rank: int, seed: int) -> Path:
    """Write a random adapter on every linear layer, in the size of a trained one."""
    rng = np.random.default_rng(seed)
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    tensors = {}
    for layer in range(layers):
        for module in TARGETS:
            rows, columns = base[f"blk.{layer}.{parts[module]}.weight"].shape
            place = "self_attn" if parts[module].startswith("attn") else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{place}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = rng.normal(0, columns**-0.5, (rank, columns)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = rng.normal(0, 0.02, (rows, rank)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def compared(one: Path, other: Path) -> dict[str, Any]:
    """Return how many tensors of two files have the same type and bytes."""
    first, second = GgufFile(one), GgufFile(other)
    differing = [n for n in second if n not in first or first[n].type != second[n].type or bytes(first[n].data) != bytes(second[n].data)]
    return {
        "tensors": len(second),
        "equal": len(second) - len(differing),
        "differing": differing[:10],
        "extra": len(set(first) - set(second)),
    }


def written_again(files: list[Path], folder: Path) -> float:
    """Return how long writing and syncing the same bytes takes, in seconds; they are in memory before the clock starts.

    In a process of its own: a child's peak memory is never below what its parent held when it was made.
    """
    done = subprocess.run([sys.executable, "-c", _WRITE, folder, *files], capture_output=True, text=True, check=True)
    return float(done.stdout)


def median(samples: list[dict[str, float]], key: str = "seconds") -> float:
    """Return the median of one measurement."""
    return statistics.median(sample[key] for sample in samples)


class Laboratory:
    """The models, adapters and samples of one run."""

    def __init__(self, folder: Path, pairs: int) -> None:
        self.folder, self.pairs = folder, pairs
        self.raw: dict[str, Any] = {}
        self.figures: dict[str, float | None] = {}
        self.rows: list[list[Any]] = []
        self.gguf = GgufFile(default_base())
        self.hf = folder / "smollm2-135m"
        timed([sys.executable, "-c", _BPE, self.hf])
        layers = int(self.gguf.hparam("block_count"))
        self.adapters = [make_adapter(folder / f"user-{i:02}", self.gguf, layers, 8, i) for i in range(BATCH)]
        self.high_rank = make_adapter(folder / "rank-64", self.gguf, layers, 64, 99)

    def record(self, name: str, samples: list[dict[str, float]], ratio: float | None = None) -> None:
        """Keep the samples and a line of the table."""
        self.raw[name] = samples
        seconds = [s["seconds"] for s in samples]
        self.rows.append([name, statistics.median(seconds), min(seconds), max(seconds), median(samples, "peak_mb"), ratio or ""])
        print(f"{name}: {statistics.median(seconds):.2f} s", flush=True)

    def routes(self) -> None:
        """Compare the routes for q4_0 and q8_0, in pairs."""
        adapter = self.adapters[0]
        for quant in ("q4_0", "q8_0"):
            out, reference = self.folder / "out", self.folder / f"standard-{quant}.gguf"
            options = ("--quant", quant)
            ours(adapter, self.hf, out, *options, "--verify", "off")  # fills the cache
            theirs(self.hf, adapter, reference, quant)  # compiles its bytecode too
            samples: dict[str, list[dict[str, float]]] = {"off": [], "quick": [], "standard": []}
            for _ in range(self.pairs):
                samples["standard"].append(theirs(self.hf, adapter, reference, quant))
                for level in ("off", "quick"):
                    samples[level].append(ours(adapter, self.hf, out, *options, "--verify", level))
            self.raw[f"{quant} bytes"] = compared(out / "model.gguf", reference)
            pairs = list(zip(samples["standard"], samples["off"], samples["quick"], strict=True))
            plain = statistics.median(s["seconds"] / o["seconds"] for s, o, _ in pairs)
            quick = statistics.median(s["seconds"] / q["seconds"] for s, _, q in pairs)
            self.record(f"standard route, {quant}", samples["standard"])
            self.record(f"ours, {quant}", samples["off"], plain)
            self.record(f"ours, {quant}, quick verification", samples["quick"], quick)
            self.figures[f"{quant}_ratio"] = plain
            if quant == "q4_0":
                self.figures["quick_verify_ratio"] = quick
            print(f"bytes: {self.raw[f'{quant} bytes']}", flush=True)

    def cold(self) -> None:
        """Measure the first user of a base: nothing in the cache but the converter."""
        for name, base in (("Hugging Face base", self.hf), ("GGUF base", default_base())):
            samples = []
            for _ in range(min(2, self.pairs)):
                with tempfile.TemporaryDirectory() as cache:
                    if (cache_folder() / "converters").exists():
                        shutil.copytree(cache_folder() / "converters", Path(cache) / "converters")
                    samples.append(ours(self.adapters[0], base, self.folder / "out", "--verify", "off", CDCDA_CACHE=cache))
            self.record(f"ours, q4_0, cold, {name}", samples)

    def default_base(self) -> None:
        """Measure the default base (a Q4_1 GGUF), warm, at two ranks, and with full verification."""
        for name, adapter, level in (("rank 8", self.adapters[0], "off"), ("rank 64", self.high_rank, "off")):
            ours(adapter, default_base(), self.folder / "out", "--verify", level)
            samples = [ours(adapter, default_base(), self.folder / "out", "--verify", level) for _ in range(self.pairs)]
            self.record(f"ours, q4_0, default base, {name}", samples)

    def batch(self) -> None:
        """Measure twenty users in one process against writing and syncing the same bytes."""
        folder, ratios, runs, writes = self.folder / "batch", [], [], []
        command = [Path(sys.executable).with_name("cdcda-export"), "--adapter", *self.adapters, "--base", default_base()]
        command += ["--verify", "off", "--quiet", "--workspace", folder]
        for at in range(self.pairs + 1):
            shutil.rmtree(folder, ignore_errors=True)
            run = timed(command)
            files = sorted(folder.glob("_adapters/*/*/model.gguf"))
            plain = self.folder / "plain"
            plain.mkdir()
            seconds = written_again(files, plain)
            shutil.rmtree(plain)
            if at:  # the first one finds the disk's blocks
                runs.append(run)
                writes.append({"seconds": seconds, "peak_mb": 0.0})
                ratios.append(run["seconds"] / seconds)
        self.record(f"writing and syncing {BATCH} files", writes)
        self.record(f"ours, {BATCH} users in one process", runs, statistics.median(ratios))
        self.figures["batch_write_ratio"] = statistics.median(ratios)
        self.figures["batch_seconds_per_user"] = median(runs) / BATCH

    def large(self) -> None:
        """Show how cost grows with size: 0.5B parameters of random weights."""
        hf = self.folder / "qwen2-0.5b-shape"
        timed([sys.executable, "-c", _LARGE, hf])
        copy_tokenizer(self.hf, hf)
        probe = self.folder / "out"
        shapes = _qwen_shapes()
        low, high = (make_adapter(self.folder / f"large-{rank}", shapes, 24, rank, rank) for rank in (8, 64))
        ours(low, hf, probe, "--verify", "off")  # converts the base and fills the cache
        standard = self.folder / "standard-large.gguf"
        self.record("0.5B shape, standard route, q4_0", [theirs(hf, low, standard, "q4_0")])
        for name, adapter in (("rank 8", low), ("rank 64", high)):
            samples = [ours(adapter, hf, probe, "--verify", "off") for _ in range(self.pairs)]
            self.record(f"0.5B shape, ours, q4_0, {name}", samples)
            if adapter is low:
                self.raw["0.5B bytes"] = compared(probe / "model.gguf", standard)
                self.raw["0.5B ratio"] = self.raw["0.5B shape, standard route, q4_0"][0]["seconds"] / median(samples)

    def onnx(self) -> None:
        """Compare the second user of a base with optimum's export of that user's merged model."""
        merged = self.folder / "merged"
        timed([sys.executable, "-c", _MERGE, HERE, self.hf, self.adapters[1], merged])
        with tempfile.TemporaryDirectory() as cache:
            options = ("--verify", "off", "--format", "onnx")
            first = ours(self.adapters[0], default_base(), self.folder / "out", *options, CDCDA_CACHE=cache)
        self.record("ours, onnx int8, first user of the base", [first])
        ours(self.adapters[0], default_base(), self.folder / "out", "--verify", "off", "--format", "onnx")
        peer, second = [], []
        for _ in range(min(3, self.pairs)):
            peer.append(timed([sys.executable, "-c", _OPTIMUM, merged, self.folder / "optimum"]))
            second.append(ours(self.adapters[1], default_base(), self.folder / "out", "--verify", "off", "--format", "onnx"))
        ratio = statistics.median(p["seconds"] / s["seconds"] for p, s in zip(peer, second, strict=True))
        self.record("optimum's export of the merged model (float32)", peer)
        self.record("ours, onnx int8, second user of the base", second, ratio)
        self.figures["onnx_second_user_ratio"] = ratio


_MERGE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from standard_route import merge_with_peft
merge_with_peft(*map(Path, sys.argv[2:5]))
"""


def _qwen_shapes() -> dict[str, np.ndarray]:
    sizes = {"attn_q": (896, 896), "attn_k": (128, 896), "attn_v": (128, 896), "attn_output": (896, 896)}
    sizes |= {"ffn_gate": (4864, 896), "ffn_up": (4864, 896), "ffn_down": (896, 4864)}
    return {f"blk.{i}.{name}.weight": np.broadcast_to(np.float32(0), shape) for i in range(24) for name, shape in sizes.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair of everything, no 0.5B shape, no ONNX")
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="repeat what is compared N times (default: 5)")
    parser.add_argument("--skip-onnx", action="store_true", help="leave ONNX out; its figure stays null")
    parser.add_argument("--skip-large", action="store_true", help="leave the 0.5B shape out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".export-speed-") as folder:
        lab = Laboratory(Path(folder), 1 if arguments.quick else arguments.pairs)
        lab.figures |= dict.fromkeys(("q4_0_ratio", "q8_0_ratio", "quick_verify_ratio", "batch_write_ratio", "batch_seconds_per_user"))
        lab.figures["onnx_second_user_ratio"] = None
        stages = [lab.routes, lab.batch, lab.default_base, lab.cold]
        if not arguments.quick:
            stages += [] if arguments.skip_onnx else [lab.onnx]
            stages += [] if arguments.skip_large else [lab.large]
        for stage in stages:
            stage()
            # After every stage: an interrupted run keeps what it measured.
            write_results("export_speed" + ("-quick" if arguments.quick else ""), lab.figures, lab.raw)
    print_table(["", "median s", "least s", "most s", "peak MB", "ratio"], lab.rows)


if __name__ == "__main__":
    main()
