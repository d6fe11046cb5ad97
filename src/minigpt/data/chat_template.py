"""Chat templates: messages to tokens, in a sandbox; for serving and for training alike.

Templates come with models and so from outside: they run in Jinja2's immutable sandbox with
nothing but the names that Hugging Face's templates expect.
Source: https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

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

Message = Mapping[str, str]


class Example(NamedTuple):
    """A conversation's tokens, and which of them a model is to learn to say."""

    tokens: list[int]
    is_target: list[bool]
    """The assistant's text and the token that ends its turn; no header, no other role."""


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

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Render and tokenize a conversation, ready for the assistant's turn.

        Special tokens count where the template spells them; spelled in a message they are the
        plain text they are, so that no message can open or close a turn.

        Raises:
            RequestError: The template refuses the conversation, for example its order of roles.
        """
        guard = _Guard(self._special_tokens)
        return self._tokens(guard, self._render(guard.messages(messages), prompt=True))

    def encode_answer(self, messages: Sequence[Message]) -> Example:
        """Render a conversation up to an assistant's turn, of which that turn is the target.

        What precedes the targets is, token for token, what `encode` gives for the messages
        before: what a server feeds the model when it is to say this. The targets end with the
        special token with which the template closes the turn, or with the end of text where it
        closes with none; a served answer stops there.

        Args:
            messages: At least two, the last one the assistant's and not blank.

        Raises:
            RequestError: The template refuses the messages, does not continue its own prompt,
                or changes the answer's text beyond recognition.
        """
        *before, answer = messages
        assert before and answer["role"] == "assistant" and answer["content"].strip()
        guard = _Guard(self._special_tokens)
        guarded = guard.messages(messages)
        prompt = self._render(guarded[:-1], prompt=True)
        whole = self._render(guarded, prompt=False)
        if not whole.startswith(prompt):
            raise _refusal("it renders an answer otherwise than after its own prompt")
        end, is_closed = self._end_of_turn(whole, len(prompt), self._end_of_text(guard, guarded))
        prompt_ids = self._tokens(guard, prompt)
        ids = self._tokens(guard, whole[:end])
        if ids[: len(prompt_ids)] != prompt_ids:
            # A token would span prompt and answer; served, the answer begins a token of its own.
            ids = prompt_ids + self._tokens(guard, whole[len(prompt) : end], continues=True)
        if not is_closed:
            assert self._tokenizer.eos_token_id is not None
            ids = [*ids, self._tokenizer.eos_token_id]
        return Example(ids, [at >= len(prompt_ids) for at in range(len(ids))])

    def encode_turns(self, messages: Sequence[Message]) -> list[Example]:
        """Render a whole conversation for training, every assistant's turn a target.

        One example holds as many turns as serving would see the same tokens in: where the
        template renders a past turn otherwise than the model said it (thoughts removed, no end
        of turn), the next turn begins an example of its own, with its context as served.

        Args:
            messages: The first one not the assistant's.

        Raises:
            RequestError: As `encode_answer`.
        """
        examples: list[Example] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            turn = self.encode_answer(messages[: index + 1])
            known = examples[-1] if examples else None
            if known is not None and turn.tokens[: len(known.tokens)] == known.tokens:
                merged = known.is_target + turn.is_target[len(known.tokens) :]
                examples[-1] = Example(turn.tokens, merged)
            else:
                examples.append(turn)
        return examples

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=prompt, **self._names
            )
        except Exception as error:  # a template can raise whatever an expression can
            raise _refusal(
                error.message or "" if isinstance(error, TemplateError) else repr(error)
            ) from None

    def _tokens(self, guard: _Guard, text: str, *, continues: bool = False) -> list[int]:
        if self.is_default:
            return self._tokenizer.encode(guard.reveal(text), bos=not continues)
        ids: list[int] = []
        for part, from_message in guard.split(text):
            ids += self._tokenizer.encode(part, allow_special=not from_message)
        return ids

    def _end_of_text(self, guard: _Guard, messages: list[dict[str, str]]) -> int | None:
        """Return where the last message's text ends in the rendered whole.

        Found by rendering it once more with a mark there, as the text alone may occur again in
        what the template adds. None where the template changes the text.
        """
        *before, last = messages
        content = last["content"].rstrip()
        marked = {**last, "content": content + guard.end + last["content"][len(content) :]}
        place = self._render([*before, marked], prompt=False).find(guard.end)
        return place if place >= 0 else None

    def _end_of_turn(self, whole: str, start: int, text_end: int | None) -> tuple[int, bool]:
        """Return where the turn that begins at `start` ends, and if a special token closes it.

        That is the first special token after the text; where that end is unknown, the last one.
        """
        find = whole.rfind if text_end is None else whole.find
        begin = start if text_end is None else text_end
        found = [
            (place, -len(token), place + len(token))
            for token in self._special_tokens
            if token and (place := find(token, begin)) >= 0
        ]
        if found:
            return (max(found) if text_end is None else min(found))[2], True
        if text_end is None:
            raise _refusal("it changes an answer's text, and no special token ends it")
        return text_end, False


class _Guard:
    """Hides special tokens spelled in messages from the encoding of the rendered template."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        # Longest first: one token's spelling may contain another's.
        self._special_tokens = sorted(special_tokens, key=len, reverse=True)
        self._nonce = secrets.token_hex(16)
        self.end = f"[{self._nonce}:end]"
        """A mark that no message holds."""
        self._hidden: dict[str, str] = {}

    def messages(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        return [{**message, "content": self.hide(message["content"])} for message in messages]

    def hide(self, content: str) -> str:
        for token in self._special_tokens:
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


def _refusal(reason: str) -> RequestError:
    return RequestError(
        f"the model's chat template refuses these messages: {reason}",
        param="messages",
        code="invalid_messages",
    )


def _to_json(value: Any, indent: int | None = None) -> str:
    """Serialize for a prompt: unlike Jinja2's own filter, without escaping for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
