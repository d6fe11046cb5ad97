"""From a chosen token to a delta: append, spell out, decide whether the sequence ends."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from minigpt.api.requests import Delta, FinishReason, TokenLogprob
from minigpt.engine.choice import Sampled
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

    def extend(self, sequence: Sequence, sampled: SequenceOf[Sampled]) -> Delta:
        """Append tokens, at least one, up to the one that ends the sequence if any does.

        The delta's finish reason says whether it is over.
        """
        first = sequence.num_output_tokens == 0
        text, reason, count = "", None, 0
        while reason is None and count < len(sampled):
            piece, reason = self._append(sequence, sampled[count].token_id)
            text += piece
            count += 1
        kept = sampled[:count]
        return Delta(
            request_id=sequence.request_id,
            index=sequence.index,
            token_ids=[choice.token_id for choice in kept],
            text=text,
            logprobs=None if kept[0].logprob is None else [self._logprob(s) for s in kept],
            prompt_logprobs=self._prompt_logprobs(sequence) if first else None,
            finish_reason=reason,
            prompt_tokens=sequence.num_prompt_tokens,
            queue_seconds=sequence.queue_seconds if first else None,
            weights=sequence.identity if first else None,
        )

    def answer_prompt(self, sequence: Sequence) -> Delta:
        """End a sequence that generates nothing, once its prompt is computed."""
        reader = sequence.reader
        embedding = None if reader is None else reader.embedding()
        return Delta(
            request_id=sequence.request_id,
            index=sequence.index,
            token_ids=[],
            text="",
            prompt_logprobs=self._prompt_logprobs(sequence),
            embedding=embedding,
            finish_reason="length" if embedding is None else "stop",
            prompt_tokens=sequence.num_prompt_tokens,
            queue_seconds=sequence.queue_seconds,
            weights=sequence.identity,
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

    def _append(self, sequence: Sequence, token: int) -> tuple[str, FinishReason | None]:
        """Append one token; returns the text that is now certain and whether this was the end."""
        sampling = sequence.sampling
        sequence.token_ids.append(token)
        ends = token in sampling.stop_token_ids or (
            token in self._eos_token_ids and not sampling.ignore_eos
        )
        full = sequence.num_output_tokens >= sampling.max_tokens
        if sequence.shaping is not None and not ends:
            sequence.shaping.observe(token)
        complete = sequence.shaping is not None and sequence.shaping.complete
        text = sequence.text.push(
            b"" if ends else self._bytes(token),
            final=ends or full or complete,
            stops=sequence.num_output_tokens >= sampling.min_tokens,
        )
        if ends or complete or sequence.text.stopped:
            return text, "stop"
        return text, "length" if full else None

    def _bytes(self, token_id: int) -> bytes:
        """A model's vocabulary may be padded beyond its tokenizer's: such tokens spell nothing."""
        if token_id >= self._vocabulary.vocab_size:
            return b""
        return self._vocabulary.token_bytes(token_id)

    def _spell(self, token_id: int) -> str:
        return self._bytes(token_id).decode("utf-8", "replace")

    def _prompt_logprobs(self, sequence: Sequence) -> list[TokenLogprob] | None:
        reader = sequence.reader
        if reader is None or reader.num_logprobs is None:
            return None
        return [self._logprob(score) for score in reader.scores]

    def _logprob(self, sampled: Sampled) -> TokenLogprob:
        assert sampled.logprob is not None
        top = tuple((token, self._spell(token), value) for token, value in sampled.top)
        return TokenLogprob(sampled.token_id, self._spell(sampled.token_id), sampled.logprob, top)
