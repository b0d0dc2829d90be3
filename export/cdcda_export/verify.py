"""Nothing ships unverified: the artifact in its real runtime against the merged model in float32.

``full`` asks, all on text the adapter was not trained on: does the artifact read the same token ids as training did, is the change in
every rewritten tensor, and does it predict what the merged float32 model predicts (KL divergence, top-1 agreement). ``quick`` asks the
first two, and that one forward pass gives numbers. ``off`` asks nothing, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any, Protocol

import numpy as np

from cdcda_export.arrival import TensorCheck, by_kind
from cdcda_export.chat_template import ChatTemplate
from cdcda_export.errors import ExportError
from cdcda_export.gates import Gate, error_bound
from cdcda_export.progress import Progress


class Runtime(Protocol):
    """What verification asks of a loaded artifact; token ids in, float32 logits out."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a rendered text, nothing added."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return next-token logits, shape (len(ids), vocabulary)."""

    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Return the greedy continuation without the end marker."""

    def nll_many(self, probes: Sequence[Probe]) -> list[float]:
        """Return the summed NLL of every probe's answer, in nats."""

    def greedy_many(self, prompts: Sequence[list[int]], max_tokens: int, advance: Callable[[], object] = ...) -> list[list[int]]:
        """Return every prompt's greedy continuation, in order; ``advance`` is called once for each."""


class Encoder(Protocol):
    """What turns rendered text into ids."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a rendered text, nothing added."""


@dataclass(frozen=True)
class Probe:
    """One held-out exchange: ids of the prompt, then of the answer with its end marker."""

    user_text: str
    answer_text: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        """Prompt and answer, end to end."""
        return [*self.prompt, *self.answer]

    def answer_positions(self) -> slice:
        """Positions whose next-token prediction is an answer token."""
        return slice(len(self.prompt) - 1, len(self.prompt) + len(self.answer) - 1)


@dataclass(frozen=True)
class Verification:
    """What was asked, what was measured and whether it passed; None where a level does not ask."""

    level: str
    passed: bool | None
    reference: str = ""
    texts: int = 0
    texts_equal: int = 0
    positions: int = 0
    kl_mean: float | None = None
    kl_gate: float | None = None
    top1: float | None = None
    top1_gate: float | None = None
    nll: float | None = None
    nll_reference: float | None = None
    tensors: int = 0
    """How many rewritten tensors were read back and compared."""
    worst_tensor: dict[str, Any] = field(default_factory=dict)
    """The one closest to its error bound: name, type, error, bound."""
    arrived: dict[str, float] = field(default_factory=dict)
    arrival_gate: float | None = None
    failures: list[str] = field(default_factory=list)
    probe_nll: list[float] = field(default_factory=list)
    """Summed negative log likelihood of each probe's answer, in nats, in the order of the probes."""
    probe_nll_reference: list[float] = field(default_factory=list)

    def as_card(self) -> dict[str, Any]:
        """Return the card's part of it."""
        card = asdict(self)
        del card["probe_nll"], card["probe_nll_reference"]
        card["token_ids"] = {"texts": card.pop("texts"), "equal": card.pop("texts_equal")}
        return card


# Returns the reference's logits at a probe's answer positions: float32, shape (answer tokens, vocabulary).
Reference = Callable[[Probe], np.ndarray]


def make_probe(template: ChatTemplate, encoder: Encoder, eos: Sequence[int], user_text: str, answer: str, max_tokens: int) -> Probe:
    """Render an exchange with the template and cut it: the answer ends with its first end marker.

    Raises:
        ExportError: the prompt alone is longer than ``max_tokens``.
    """
    prompt = encoder.encode(template.prompt(user_text))
    tail = encoder.encode(template.answer(user_text, answer))
    ends = [i for i, token in enumerate(tail) if token in eos]
    # Templates write a newline after the end marker; it is no part of what the model has to say.
    target = tail[: ends[0] + 1] if ends else [*tail, *eos[:1]]
    if len(prompt) + 1 >= max_tokens:
        raise ExportError(f"A prompt takes {len(prompt)} tokens, the limit is {max_tokens}; shorten it or raise train.max_tokens.")
    return Probe(user_text, answer, tuple(prompt), tuple(target[: max_tokens - len(prompt)]))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log probabilities over the last axis in float64 (float32 sums of 50,000 terms are too coarse for a KL of 1e-4)."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def nll_of(logits: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """Return the negative log likelihood of each target token, in nats."""
    return -log_softmax(logits)[np.arange(len(targets)), list(targets)]


def verify(
    runtime: Runtime,
    template: ChatTemplate,
    probes: Sequence[Probe],
    reference: Reference,
    reference_name: str,
    gate: Gate,
    progress: Progress,
    checks: Sequence[TensorCheck] = (),
) -> Verification:
    """Compare an artifact with the merged model in float32: level ``full``.

    Args:
        runtime: the loaded artifact.
        template: the chat template that the *artifact* carries.
        probes: held-out exchanges as *training* renders and tokenizes them.
        reference: the merged model's logits.
        reference_name: said on the card.
        gate: bounds of this quantization.
        progress: told once per probe.
        checks: every rewritten tensor, read back from the file (``arrival``); none where they cannot be read.
    """
    equal = 0
    kl: list[float] = []
    agree: list[bool] = []
    nll: list[float] = []
    nll_reference: list[float] = []
    progress.start("verifying in the real runtime", len(probes), "texts")
    for probe in probes:
        equal += _same_ids(runtime, template, probe)
        got = log_softmax(runtime.logits(probe.ids)[probe.answer_positions()])
        want = log_softmax(reference(probe))
        kl.extend((np.exp(want) * (want - got)).sum(axis=-1).tolist())
        agree.extend((want.argmax(-1) == got.argmax(-1)).tolist())
        at = np.arange(len(probe.answer))
        nll.append(float(-got[at, list(probe.answer)].sum()))
        nll_reference.append(float(-want[at, list(probe.answer)].sum()))
        progress.advance(note=f"KL {np.mean(kl):.3f}")
    mean_kl, top1 = float(np.mean(kl)), float(np.mean(agree))
    failures = _id_failures(equal, len(probes))
    if not mean_kl <= gate.kl:
        failures.append(f"KL divergence {mean_kl:.4f} from the merged model is above the gate {gate.kl:.4f}")
    if not top1 >= gate.top1:
        failures.append(f"top-1 agreement {top1:.1%} with the merged model is below the gate {gate.top1:.1%}")
    failures += _tensor_failures(checks, gate)
    progress.done(f"KL {mean_kl:.4f}, top-1 {top1:.1%}")
    return Verification(
        level="full",
        passed=not failures,
        reference=reference_name,
        texts=len(probes),
        texts_equal=equal,
        positions=len(kl),
        kl_mean=mean_kl,
        kl_gate=gate.kl,
        top1=top1,
        top1_gate=gate.top1,
        nll=sum(nll) / len(kl),
        nll_reference=sum(nll_reference) / len(kl),
        **_tensor_facts(checks, gate),
        failures=failures,
        probe_nll=nll,
        probe_nll_reference=nll_reference,
    )


def verify_quick(
    runtime: Runtime, template: ChatTemplate, probes: Sequence[Probe], gate: Gate, progress: Progress, checks: Sequence[TensorCheck]
) -> Verification:
    """Ask what needs no reference: token ids, every rewritten tensor, one forward pass: level ``quick``.

    The arguments are those of ``verify``; the forward pass reads the shortest probe.
    """
    progress.start("checking token ids and one forward pass")
    equal = sum(_same_ids(runtime, template, probe) for probe in probes)
    shortest = min(probes, key=lambda probe: len(probe.ids))
    logits = runtime.logits(shortest.ids)[shortest.answer_positions()]
    failures = _id_failures(equal, len(probes))
    if not np.isfinite(logits).all():
        failures.append("the artifact's logits are not finite numbers")
    failures += _tensor_failures(checks, gate)
    progress.done()
    nll = float(nll_of(logits, shortest.answer).mean()) if np.isfinite(logits).all() else None
    return Verification(
        level="quick",
        passed=not failures,
        texts=len(probes),
        texts_equal=equal,
        positions=len(shortest.answer),
        nll=nll,
        **_tensor_facts(checks, gate),
        failures=failures,
    )


def unverified() -> Verification:
    """Return what the level ``off`` knows: nothing."""
    return Verification(level="off", passed=None)


def _tensor_facts(checks: Sequence[TensorCheck], gate: Gate) -> dict[str, Any]:
    if not checks:
        return {"arrival_gate": gate.arrival}
    worst = max(checks, key=lambda check: check.error / error_bound(check.type))
    named = {"name": worst.tensor, "type": worst.type, "error": worst.error, "bound": error_bound(worst.type)}
    return {"tensors": len(checks), "worst_tensor": named, "arrived": by_kind(checks), "arrival_gate": gate.arrival}


def _id_failures(equal: int, texts: int) -> list[str]:
    if equal == texts:
        return []
    return [f"the artifact reads other token ids than training did on {texts - equal} of {texts} texts"]


def _tensor_failures(checks: Sequence[TensorCheck], gate: Gate) -> list[str]:
    failures = _arrival_failures(by_kind(checks), gate)
    off = [check for check in checks if not check.error <= error_bound(check.type)]
    if off:
        worst = max(off, key=lambda check: check.error / error_bound(check.type))
        failures.append(
            f"{len(off)} of {len(checks)} rewritten tensors are too far from the merged weights: {worst.tensor} is {worst.error:.3g} of "
            f"their norm off, {error_bound(worst.type):.3g} is allowed for {worst.type}"
        )
    # One matrix among many moves its kind's mean too little to be seen there.
    strayed = [check for check in checks if check.arrived is not None and not abs(check.arrived - 1) <= gate.of_one(check.noise)]
    if strayed and not failures:
        worst = max(strayed, key=lambda check: abs((check.arrived or 0.0) - 1))
        failures.append(
            f"in {len(strayed)} of {len(checks)} rewritten tensors the adapter's change did not arrive: {worst.arrived:.0%} of it is in "
            f"{worst.tensor}"
        )
    return failures


def _arrival_failures(arrived: Mapping[str, float], gate: Gate) -> list[str]:
    off = {kind: share for kind, share in arrived.items() if not abs(share - 1) <= gate.arrival}
    if not off:
        return []
    kind = max(off, key=lambda k: abs(off[k] - 1))
    hint = ""
    if all(share < 0.5 for share in arrived.values()):
        hint = " (a base of the same 4-bit type swallows small changes; another --quant, such as q4_0 or q8_0, keeps them)"
    return [f"{off[kind]:.0%} of the adapter's change arrived in {kind}, {1 - gate.arrival:.0%} to {1 + gate.arrival:.0%} is allowed{hint}"]


def _same_ids(runtime: Runtime, template: ChatTemplate, probe: Probe) -> bool:
    """Say whether the artifact, with its own template and tokenizer, reads the exchange as training did."""
    try:
        prompt = runtime.encode(template.prompt(probe.user_text))
        answer = runtime.encode(template.answer(probe.user_text, probe.answer_text))
    except ExportError:
        return False
    return tuple(prompt) == probe.prompt and tuple(answer[: len(probe.answer)]) == probe.answer[: len(answer)]


def neutral_texts() -> list[str]:
    """Return the paragraphs that ship for adapters without a user."""
    return paragraphs(resources.files("cdcda_export").joinpath("neutral.txt").read_text(encoding="utf-8"))


def paragraphs(text: str) -> list[str]:
    """Split a text at blank lines into paragraphs of at least 20 characters."""
    return [" ".join(part.split()) for part in text.split("\n\n") if len(part.strip()) >= 20]
