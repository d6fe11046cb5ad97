"""Does the model write Python? The share of completions that `ast.parse` accepts.

A prompt is the first lines of a held-out file that itself parses; the model continues it. The
same rule, below, is applied to the file's true continuation of the same length, which shows
how far the rule itself lets anything pass.

The rule for a completion that the token limit cut off, so that the cut is not held against it:
an incomplete last line is dropped; then the text is accepted if prompt and completion parse as
they are, or without the last statement at the completion's outermost indentation, which may be
unfinished. A completion that the model ended itself is taken as it is. A completion without any
text left is not accepted.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from minigpt.core.telemetry import progress
from minigpt.data.tokenizer import Tokenizer
from minigpt.evaluate.config import EvaluateConfig
from minigpt.evaluate.generate import generate
from minigpt.model.decoder import Decoder

_CLOSING = (")", "]", "}")


class CodeSample(NamedTuple):
    """A prompt with what the model made of it."""

    document: int
    """Index of the held-out document."""
    prompt: str
    completion: str
    accepted: bool
    reference_accepted: bool


class _Prompt(NamedTuple):
    document: int
    text: str
    tokens: list[int]
    rest: str


def complete_code(
    model: Decoder,
    tokenizer: Tokenizer,
    texts: Sequence[bytes],
    config: EvaluateConfig,
) -> list[CodeSample]:
    """Complete the beginnings of up to `config.samples` of `texts` that are Python.

    Args:
        model: The decoder.
        tokenizer: The model's.
        texts: Held-out documents.
        config: Number, lengths and temperature of the samples, and the seed.

    Returns:
        A sample for each document drawn; none where no document is Python.
    """
    room = model.config.context_length
    prompts = list(_prompts(tokenizer, texts, config, room))
    with progress("completing code", total=len(prompts), unit="items") as bar:
        completions = generate(
            model,
            [prompt.tokens for prompt in prompts],
            max_tokens=config.sample_tokens,
            temperature=config.sample_temperature,
            seed=config.seed,
            progress=bar,
        )
    samples = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = tokenizer.decode(completion.tokens)
        true_tokens = tokenizer.encode(prompt.rest)
        limit = min(config.sample_tokens, room - len(prompt.tokens))
        reference = tokenizer.decode(true_tokens[:limit])
        samples.append(
            CodeSample(
                document=prompt.document,
                prompt=prompt.text,
                completion=text,
                accepted=is_accepted(prompt.text, text, cut=not completion.ended),
                reference_accepted=is_accepted(
                    prompt.text, reference, cut=len(true_tokens) > limit
                ),
            )
        )
    return samples


def is_accepted(prompt: str, completion: str, *, cut: bool) -> bool:
    """Apply the rule of this module's docstring.

    Args:
        prompt: Whole lines.
        completion: What follows.
        cut: Whether a limit ended the completion, and not its author.
    """
    lines = completion.splitlines(keepends=True)
    if cut and lines and not lines[-1].endswith("\n"):
        lines.pop()
    candidates = [lines]
    if cut:
        candidates.append(lines[: _last_outermost(lines)])
    return any(
        "".join(candidate).strip() != "" and parses(prompt + "".join(candidate))
        for candidate in candidates
    )


def parses(text: str) -> bool:
    """Tell whether `ast.parse` accepts a text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in strings
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _last_outermost(lines: Sequence[str]) -> int:
    """Return the index of the last line that begins a statement at the outermost indentation."""
    indents = [
        (len(line) - len(line.lstrip()), index)
        for index, line in enumerate(lines)
        if line.strip() and not line.lstrip().startswith(_CLOSING)
    ]
    if not indents:
        return 0
    outermost = min(indent for indent, _ in indents)
    return max(index for indent, index in indents if indent == outermost)


def _prompts(
    tokenizer: Tokenizer, texts: Sequence[bytes], config: EvaluateConfig, context_length: int
) -> Iterator[_Prompt]:
    """Yield prompts from documents drawn with the seed, at most half a context long each."""
    found = 0
    for document in np.random.default_rng(config.seed).permutation(len(texts)):
        if found == config.samples:
            return
        try:
            text = texts[document].decode("utf-8")
        except UnicodeDecodeError:
            continue
        lines = text.splitlines(keepends=True)
        if len(lines) <= config.sample_prompt_lines or not parses(text):
            continue
        for count in range(config.sample_prompt_lines, 0, -1):
            start = "".join(lines[:count])
            tokens = tokenizer.encode(start, bos=True)
            if 1 <= len(tokens) <= context_length // 2:
                found += 1
                yield _Prompt(int(document), start, tokens, "".join(lines[count:]))
                break
