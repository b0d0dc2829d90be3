"""Records as token ids: the user's turn in the base's own chat template, the answer with its end marker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cdcda_export.chat_template import ChatTemplate, template_of
from cdcda_export.errors import ExportError
from cdcda_export.gguf import GgufFile
from cdcda_export.runtime import LlamaCpp
from cdcda_export.tokenizer import Tokenizer, bpe_tokenizer, has_known_tokenizer
from cdcda_export.verify import Probe, make_probe
from cdcda_mobile.history import Record
from cdcda_mobile.tasks import get_task


@dataclass(frozen=True)
class Encoding:
    """How one base model reads a conversation."""

    template: ChatTemplate
    tokenizer: Tokenizer
    eos: tuple[int, ...]

    def probe(self, record: Record, max_tokens: int) -> Probe:
        """Return one record as prompt ids and answer ids."""
        prompt = get_task(record.task).prompt(record.input)
        return make_probe(self.template, self.tokenizer, self.eos, prompt, record.output, max_tokens)

    def probes(self, records: Sequence[Record], max_tokens: int) -> list[Probe]:
        """Return records as probes, in order; a prompt too long for ``max_tokens`` is an error that names the record.

        Raises:
            ExportError: a record does not fit.
        """
        found = []
        for record in records:
            try:
                found.append(self.probe(record, max_tokens))
            except ExportError as error:
                raise ExportError(f"Record {record.id} ({record.date}): {error}") from error
        return found

    def fits(self, task: str, given: str, max_tokens: int) -> bool:
        """Say whether the prompt of an input leaves room for an answer."""
        return len(self.tokenizer.encode(self.template.prompt(get_task(task).prompt(given)))) + 1 < max_tokens


def encoding_of(base: GgufFile) -> Encoding:
    """Return the base's encoding: ``tokenizers`` where its kind is known, else llama.cpp's own tokenizer."""
    tokenizer: Tokenizer = bpe_tokenizer(base) if has_known_tokenizer(base) else LlamaCpp(base.path, vocab_only=True)
    ids = [base.get_value(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    return Encoding(template_of(base), tokenizer, tuple(int(index) for index in ids if index is not None))


def check_token_ids(base: GgufFile, encoding: Encoding, probes: Sequence[Probe]) -> None:
    """Hold the training tokenizer to llama.cpp's own, on the user's text, before anything is trained on it.

    Raises:
        ExportError: they differ; an adapter trained on these ids would write gibberish on the phone.
    """
    runtime = LlamaCpp(base.path, vocab_only=True)
    try:
        for probe in probes:
            text = encoding.template.prompt(probe.user_text)
            if tuple(runtime.encode(text)) != probe.prompt:
                raise ExportError(
                    f"The training tokenizer and llama.cpp disagree on {probe.user_text[:60]!r}; this base cannot be trained on."
                )
    finally:
        runtime.close()
