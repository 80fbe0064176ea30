"""A model's chat template: messages to the text that the model was trained on.

In: Jinja source from the model file, which is not trusted: it runs in Jinja's sandbox. Out: text. Holds: a template
that fails, or asks for what it must not have, raises ModelError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import ModelError
from .tokenizer import Tokenizer

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""


def render(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """The text of a conversation, ready for the assistant's next words.

    Raises ModelError if the model has no template, or it fails.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if not tokenizer.chat_template:
        raise ModelError("the model", "no chat template", "one", "give the prompt as it is (raw)")

    def refuse(message: Any) -> None:
        raise TemplateError(str(message))

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = _today
    try:
        return environment.from_string(tokenizer.chat_template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            bos_token="" if tokenizer.begin is None else tokenizer.token_text(tokenizer.begin),
            eos_token="" if tokenizer.end is None else tokenizer.token_text(tokenizer.end),
        )
    except Exception as error:  # A foreign template may raise anything.
        raise ModelError("the chat template", f"{type(error).__name__}: {error}"[:200], "text") from None


def _today(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)
