"""Chat templates: messages to the tokens of one prompt, in a sandbox.

Templates come with models and so from outside: they run in Jinja2's immutable sandbox with
nothing but the names that Hugging Face's templates expect.
Source: https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minigpt.core.errors import ModelError, RequestError
from minigpt.data.tokenizer import Tokenizer

DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{{ message.role | capitalize }}: {{ message.content }}

{% endfor -%}
Assistant:"""
"""For models without a template of their own: plain turns, as text on the web has them."""


class ChatTemplate:
    """Renders conversations for one model.

    Args:
        tokenizer: Whose `chat_template` is used, or `DEFAULT_TEMPLATE` where it has none.

    Raises:
        ModelError: The model's template is not valid Jinja2.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = tokenizer.special_tokens()
        self.is_default = tokenizer.chat_template is None
        spelling: dict[int | None, str] = {
            token_id: token for token, token_id in self._special_tokens.items()
        }
        self._names = {
            "bos_token": spelling.get(tokenizer.bos_token_id, ""),
            "eos_token": spelling.get(tokenizer.eos_token_id, ""),
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        source = DEFAULT_TEMPLATE if tokenizer.chat_template is None else tokenizer.chat_template
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ModelError(
                f"the model's chat template is not valid: line {error.lineno}: {error.message}",
                remedy="mend chat_template in tokenizer_config.json",
            ) from None

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Render and tokenize a conversation, ready for the assistant's turn.

        Special tokens count where the template spells them; spelled in a message they are the
        plain text they are, so that no message can open or close a turn.

        Raises:
            RequestError: The template refuses the conversation, for example its order of roles.
        """
        guard = _Guard(self._special_tokens)
        guarded = [{**message, "content": guard.hide(message["content"])} for message in messages]
        try:
            text = self._template.render(messages=guarded, **self._names)
        except Exception as error:  # a template can raise whatever an expression can
            reason = error.message if isinstance(error, TemplateError) else repr(error)
            raise RequestError(
                f"the model's chat template refuses these messages: {reason}",
                param="messages",
                code="invalid_messages",
            ) from None
        if self.is_default:
            return self._tokenizer.encode(guard.reveal(text), bos=True)
        ids: list[int] = []
        for part, from_message in guard.split(text):
            ids += self._tokenizer.encode(part, allow_special=not from_message)
        return ids


class _Guard:
    """Hides special tokens spelled in messages from the encoding of the rendered template."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self._special_tokens = special_tokens
        self._nonce = secrets.token_hex(16)
        self._hidden: dict[str, str] = {}

    def hide(self, content: str) -> str:
        # Longest first: one token's spelling may contain another's.
        for token in sorted(self._special_tokens, key=len, reverse=True):
            if token and token in content:
                mark = f"[{self._nonce}:{len(self._hidden)}]"
                self._hidden[mark] = token
                content = content.replace(token, mark)
        return content

    def reveal(self, text: str) -> str:
        for mark, token in self._hidden.items():
            text = text.replace(mark, token)
        return text

    def split(self, text: str) -> list[tuple[str, bool]]:
        """Cut rendered text into (part, whether it is a hidden token)."""
        parts = [(text, False)]
        for mark, token in self._hidden.items():
            cut: list[tuple[str, bool]] = []
            for part, hidden in parts:
                if hidden:
                    cut.append((part, True))
                    continue
                pieces = part.split(mark)
                cut.append((pieces[0], False))
                for piece in pieces[1:]:
                    cut += [(token, True), (piece, False)]
            parts = cut
        return [(part, hidden) for part, hidden in parts if part]


def _to_json(value: Any, indent: int | None = None) -> str:
    """Serialize for a prompt: unlike Jinja2's own filter, without escaping for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
