"""Structured output: which tokens keep an answer within a schema, expression or grammar.

Over llguidance, imported on demand; no torch here. A grammar is compiled once, in a thread,
before its sequences are scheduled; after each token the next mask is computed in a thread
while the model runs (llguidance drops the interpreter's lock).
"""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from minigpt.api.requests import StructuredOutput
from minigpt.core.errors import RequestError
from minigpt.data.tokenizer import Tokenizer

MAX_TEXT = 32_768
"""Most characters of a schema, expression or grammar."""

_WHITESPACE = r"[ \n]{0,32}"
"""Between JSON's tokens: room for indentation, but a model can't go on with blanks for ever."""

_MAX_GRAMMAR_SIZE = 60_000
"""Symbols of a compiled grammar: what compiles within about half a second."""

_MAX_LEXER_STATES = 50_000
"""States that a grammar's lexer may grow to, at 1 to 2 kB each."""

_TRIED_STEPS = 16
"""Characters that are tried at admission: most grammars that are too complex show it at once."""

_KEPT = 32
"""Compiled grammars that are kept for the next request with the same one."""


class Tokens(Protocol):
    """What masks need of a tokenizer."""

    vocab_size: int

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token below `vocab_size` stands for, none for specials."""
        ...


class GrammarState:
    """How far one answer has come in its grammar.

    Args:
        matcher: llguidance's; this state's own.
        pool: Where masks are computed.
    """

    def __init__(self, matcher: Any, pool: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._pool = pool
        self.finished = False
        """Whether the text is complete and can't go on."""
        self._mask: Future[bytes] = pool.submit(matcher.compute_bitmask)

    def consume(self, token_id: int) -> None:
        """Go on by a chosen token and begin to compute the next mask in the background."""
        # The matcher is only asked while no mask is under way: it belongs to one thread then.
        if self._matcher.consume_token(token_id):
            self.finished = self._matcher.is_stopped()
            if not self.finished:
                self._mask = self._pool.submit(self._matcher.compute_bitmask)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Return (tokens,) which may come next; waits for the mask.

        Raises:
            RequestError: The grammar got too complex on the way.
        """
        mask = self._mask.result()
        if self._matcher.is_error():
            raise RequestError(f"structured output: {_one_line(self._matcher.get_error())}")
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
        return bits.view(np.bool_)


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Nothing is imported or started before the first.

    Args:
        tokens: The vocabulary.
        eos_token_ids: Tokens that end an answer.
    """

    def __init__(self, tokens: Tokens, eos_token_ids: Iterable[int]) -> None:
        self._tokens = tokens
        self._eos = [token for token in eos_token_ids if token < tokens.vocab_size]
        self._compiled: OrderedDict[StructuredOutput, Future[Any]] = OrderedDict()

    def compile(self, output: StructuredOutput) -> Future[Any]:
        """Begin to compile; the result is for `state`. It fails as `check_structured` does."""
        compiled = self._compiled.get(output)
        if compiled is None:
            compiled = self._pool.submit(lambda: _matcher(self._tokenizer, output))
            self._compiled[output] = compiled
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(output)
        return compiled

    def state(self, compiled: Any) -> GrammarState:
        """Begin an answer."""
        return GrammarState(compiled.deep_copy(), self._pool)

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(2, thread_name_prefix="grammar")

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return _ll_tokenizer(self._tokens, self._eos)


@functools.lru_cache(maxsize=256)
def check_structured(output: StructuredOutput) -> None:
    """Refuse what can't be compiled within bounds, or matches nothing; needs no tokenizer.

    What was found good is remembered, so that the same schema is compiled here once.

    A grammar whose every derivation is endless is not recognised: answers to it end by length.

    Raises:
        RequestError: Status 400; `param` is the field that asked for it.
    """
    matcher = _matcher(_byte_tokenizer(), output)
    for step in range(_TRIED_STEPS):
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        characters = np.unpackbits(mask, bitorder="little")[:256].nonzero()[0]
        if step == 0 and not (len(characters) or matcher.is_accepting()):
            raise _refusal(output, "nothing can match it")
        if matcher.is_error():
            raise _refusal(output, f"too complex: {_one_line(matcher.get_error())}")
        if not len(characters):
            return
        visible = characters[characters > ord(" ")]
        matcher.consume_token(int(visible[0] if len(visible) else characters[0]))


def _matcher(tokenizer: Any, output: StructuredOutput) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    if len(output.text) > MAX_TEXT:
        raise _refusal(output, f"has {len(output.text)} characters, at most {MAX_TEXT} are allowed")
    try:
        grammar = _grammar(output)
    except ValueError as error:
        raise _refusal(output, _one_line(str(error))) from None
    limits = LLParserLimits(
        max_grammar_size=_MAX_GRAMMAR_SIZE,
        max_lexer_states=_MAX_LEXER_STATES,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise _refusal(output, _one_line(matcher.get_error()))
    return matcher


def _grammar(output: StructuredOutput) -> str:
    """Write an output's language in llguidance's own form."""
    from llguidance import LLMatcher

    if output.kind == "regex":
        return LLMatcher.grammar_from_regex(output.text)
    if output.kind == "grammar":
        return LLMatcher.grammar_from_lark(output.text)
    if output.kind == "choice":
        choices = " | ".join(json.dumps(c, ensure_ascii=False) for c in json.loads(output.text))
        return LLMatcher.grammar_from_lark(f"start: {choices}")
    # A schema's own `x-guidance` must not loosen what is checked.
    return LLMatcher.grammar_from_json_schema(
        output.text, overrides={"whitespace_pattern": _WHITESPACE, "lenient": False}
    )


class _Bytes:
    """One token a byte, for checks that need no model."""

    vocab_size = 257

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


@functools.cache
def _byte_tokenizer() -> Any:
    return _ll_tokenizer(_Bytes(), [256])


class _Wrapper:
    """What llguidance's LLTokenizer asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: Tokens, eos: list[int]) -> None:
        spelled = [tokens.token_bytes(token) for token in range(tokens.vocab_size)]
        self.eos_token_id = eos[0]
        self.special_token_ids = [token for token, text in enumerate(spelled) if not text]
        # Tokens without a text of their own get a name, which no text can contain.
        self.tokens = [text or f"<|{token}|>".encode() for token, text in enumerate(spelled)]

        self._ids = {text: token for token, text in enumerate(spelled) if text}
        self._longest = max(map(len, self._ids))
        self._encode = self._cover
        if isinstance(tokens, Tokenizer) and tokens.is_exact:
            self._encode = tokens.encode

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a text that the grammar forces."""
        return self._encode(text)

    def _cover(self, text: str) -> list[int]:
        """Take the longest token at each place: for tokenizers that change what they encode."""
        rest, ids = text.encode(), []
        while rest:
            lengths = range(min(self._longest, len(rest)), 0, -1)
            size = next((size for size in lengths if rest[:size] in self._ids), 0)
            if not size:  # no token begins so: the rest is for the mask to find
                break
            ids.append(self._ids[rest[:size]])
            rest = rest[size:]
        return ids


def _ll_tokenizer(tokens: Tokens, eos: list[int]) -> Any:
    try:
        from llguidance import LLTokenizer
    except ImportError:
        raise RequestError(
            "structured output needs llguidance, which is not installed",
            param="response_format",
            remedy="pip install llguidance",
        ) from None
    if not eos:
        raise RequestError(
            "structured output needs a model with an end-of-text token", param="response_format"
        )
    wrapper: Any = _Wrapper(tokens, eos)
    return LLTokenizer(wrapper, n_vocab=tokens.vocab_size, eos_token=eos)


def _refusal(output: StructuredOutput, why: str) -> RequestError:
    return RequestError(
        f"{output.param}: {output.kind}: {why}", param=output.param, code="invalid_value"
    )


def _one_line(message: str) -> str:
    return " ".join(message.split())[:300]
