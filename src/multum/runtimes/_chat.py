"""Fast tokenizers as language models need them, and chat templates, as transformers has them, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ..errors import InputError
from ._rows import FastTokenizer


class ChatTokenizer(FastTokenizer):
    """A tokenizer that also makes texts of tokens, and of chats.

    Args:
        tokenizer: its padding and truncation are set at every call.
        pad_id: of the padding token.
        template: of chats, in Jinja.
        special: tokens that a template may name, `bos_token` and so on.
    """

    def __init__(self, tokenizer: Tokenizer, pad_id: int, template: str | None, special: Mapping[str, str]) -> None:
        super().__init__(tokenizer, pad_id)
        self.chat_template, self._special = template, dict(special)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text that these tokens are."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        """A chat as the text that the model reads.

        Raises:
            InputError: the template does not take it.
        """
        assert not tokenize  # noqa: S101 - asked for by nobody
        try:
            return str(self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._special))
        except TemplateError as error:
            raise InputError(f"the model's chat template does not take this chat: {error}") from error

    @cached_property
    def _template(self) -> Template:
        # The environment that templates are written for; it lets them change nothing and reach nothing.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _as_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        return environment.from_string(self.chat_template or "")


def template_of(tokenizer: Any) -> str | None:
    """The chat template of a transformers tokenizer that is used where several are not told apart."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, Mapping) else template


def _as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
