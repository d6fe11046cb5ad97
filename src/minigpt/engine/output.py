"""From a chosen token to a delta: append, spell out, decide whether the sequence ends."""

from __future__ import annotations

from typing import Protocol

from minigpt.api.requests import Delta, FinishReason, TokenLogprob
from minigpt.engine.sampler import Sampled
from minigpt.engine.sequence import Sequence


class Vocabulary(Protocol):
    """What the engine needs of a tokenizer; `data.tokenizer.Tokenizer` has it."""

    vocab_size: int
    eos_token_id: int | None

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token below `vocab_size` stands for, none for specials."""
        ...


class OutputProcessor:
    """Extends sequences by their sampled tokens.

    Args:
        vocabulary: Turns tokens into bytes.
        eos_token_ids: Tokens that end a sequence unless it ignores them.
    """

    def __init__(self, vocabulary: Vocabulary, eos_token_ids: tuple[int, ...]) -> None:
        self._vocabulary = vocabulary
        self._eos_token_ids = eos_token_ids

    def extend(self, sequence: Sequence, sampled: Sampled) -> Delta:
        """Append a token; the delta's finish reason says whether the sequence is over."""
        sampling = sequence.sampling
        token = sampled.token_id
        sequence.token_ids.append(token)
        ends = token in sampling.stop_token_ids or (
            token in self._eos_token_ids and not sampling.ignore_eos
        )
        full = sequence.num_output_tokens >= sampling.max_tokens
        text = sequence.text.push(b"" if ends else self._bytes(token), final=ends or full)
        reason: FinishReason | None = None
        if ends or sequence.text.stopped:
            reason = "stop"
        elif full:
            reason = "length"
        return Delta(
            request_id=sequence.request_id,
            index=sequence.index,
            token_ids=[token],
            text=text,
            logprobs=self._logprobs(sampled),
            finish_reason=reason,
            prompt_tokens=sequence.num_prompt_tokens,
            queue_seconds=sequence.queue_seconds if sequence.num_output_tokens == 1 else None,
        )

    def close(self, sequence: Sequence, reason: FinishReason, error: str = "") -> Delta:
        """End a sequence without a further token, releasing the text that was held back."""
        return Delta(
            request_id=sequence.request_id,
            index=sequence.index,
            token_ids=[],
            text=sequence.text.push(b"", final=True),
            finish_reason=reason,
            prompt_tokens=sequence.num_prompt_tokens,
            error=error,
        )

    def _bytes(self, token_id: int) -> bytes:
        """A model's vocabulary may be padded beyond its tokenizer's: such tokens spell nothing."""
        if token_id >= self._vocabulary.vocab_size:
            return b""
        return self._vocabulary.token_bytes(token_id)

    def _spell(self, token_id: int) -> str:
        return self._bytes(token_id).decode("utf-8", "replace")

    def _logprobs(self, sampled: Sampled) -> list[TokenLogprob] | None:
        if sampled.logprob is None:
            return None
        top = tuple((token, self._spell(token), value) for token, value in sampled.top)
        token = sampled.token_id
        return [TokenLogprob(token, self._spell(token), sampled.logprob, top)]
