"""The base model's own chat template: one renderer for training, verification and chat, so that all three see the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from cdcda_export.errors import ExportError
from cdcda_export.gguf import GgufFile

# What llama.cpp falls back to for a file without a template, so training and phone agree there too.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Message = dict[str, str]


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with the special tokens it may name."""

    source: str
    bos_token: str = ""
    eos_token: str = ""
    is_fallback: bool = False

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Return the conversation as the text that the model reads.

        Raises:
            ExportError: the template is broken or refuses these messages.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> NoReturn:
            raise jinja2.TemplateError(message)

        # The options are those of transformers and llama.cpp; templates are untrusted, hence the sandbox.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
        values: dict[str, Any] = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        try:
            template = environment.from_string(self.source)
            return template.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **values)
        # A template's expressions fail as Python's do.
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ExportError(f"The base model's chat template cannot be rendered: {reason}.") from error

    def prompt(self, user_text: str) -> str:
        """Return one user turn, ready for the model's answer."""
        return self.render([{"role": "user", "content": user_text}], add_generation_prompt=True)

    def answer(self, user_text: str, answer: str) -> str:
        """Return what follows ``prompt(user_text)`` when the model answers so: the answer, its end marker, and the rest.

        Raises:
            ExportError: with the answer, the template does not continue the prompt (nothing trained on it could be right).
        """
        prompt = self.prompt(user_text)
        turns = [{"role": "user", "content": user_text}, {"role": "assistant", "content": answer}]
        whole = self.render(turns, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise ExportError("The base model's chat template does not continue its own generation prompt, so it cannot be trained on.")
        return whole[len(prompt) :]


def template_of(base: GgufFile) -> ChatTemplate:
    """Return the chat template that a GGUF carries, or ChatML (llama.cpp's own fallback) where it has none.

    Raises:
        ExportError: what it carries is no text.
        FileError: its tokens are damaged.
    """
    tokens: list[str] | None = None

    def token(key: str) -> str:
        nonlocal tokens
        index = base.get_value(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            return ""
        if tokens is None:
            tokens = base.get_value("tokenizer.ggml.tokens", [])
        return tokens[index] if tokens and 0 <= index < len(tokens) else ""

    source = base.get_value("tokenizer.chat_template")
    if source is not None and not isinstance(source, str):
        raise ExportError(f"The chat template of {base.path} is no text, so nothing can be asked as training asked; fetch the base again.")
    return ChatTemplate(source or CHATML, token("bos"), token("eos"), is_fallback=not source)
