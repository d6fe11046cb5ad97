"""What crosses between the serving half and the engine: requests in, deltas and stats out.

Plain msgspec structs, so that the same types go over a socket and between functions.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]
Pooling = Literal["mean", "last"]
StructuredKind = Literal["json_schema", "regex", "choice", "grammar"]


class StructuredOutput(msgspec.Struct, frozen=True, kw_only=True):
    """A language that the whole text of an answer must belong to."""

    kind: StructuredKind
    text: str
    """The JSON schema, the regular expression, the choices as a JSON list, or the grammar in
    the Lark dialect of llguidance."""
    param: str = "response_format"
    """The request field that asked for it, for errors."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen and when a sequence ends."""

    max_tokens: int = 16
    """Most tokens to generate; 0 reads the prompt alone, for its scores."""
    temperature: float = 1.0
    """0 is greedy; logits are divided by it otherwise."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 is all."""
    min_p: float = 0.0
    """Sample from tokens at least this likely, as a share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or answer."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it was generated."""
    presence_penalty: float = 0.0
    """Subtracted from a token's logit once if it was generated."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of these tokens."""
    seed: int | None = None
    """With a seed the answer repeats: sequence i of a request draws from (seed, i)."""
    stop: tuple[str, ...] = ()
    """Texts that end a sequence; they are not part of the answer."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a sequence, besides the model's own end-of-text."""
    ignore_eos: bool = False
    """Go on past the end-of-text token."""
    min_tokens: int = 0
    """No end of any kind before this many tokens: neither end-of-text nor a stop."""
    logprobs: int | None = None
    """How many alternatives to report with each token's log-probability; None is no report."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, from the second on."""
    structured: StructuredOutput | None = None
    """What the text must be; None is anything."""


class Request(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """What a client asked for: one prompt, `n` answers."""

    id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams = SamplingParams()
    n: int = 1
    pooling: Pooling | None = None
    """Return an embedding of the prompt: the mean of the last layer's normalised outputs, or
    the last one. Nothing is generated then: max_tokens is 0."""
    priority: int = 0
    """Lower goes first among the requests of a tenant."""
    tenant: str = ""
    """Whose share of the engine the request takes; tenants are served in proportion."""
    adapter: str | None = None
    """The loaded adapter that answers, by its name; None is the model itself."""


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Drop a request at once, at whatever stage it is."""

    id: str


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token's log-probability under the model (temperature 1, before top-k and top-p)."""

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()
    """(token id, token text, log-probability) of the most likely tokens, best first."""


class Delta(msgspec.Struct, frozen=True, kw_only=True, tag="delta"):
    """What one step added to one sequence of a request."""

    request_id: str
    index: int
    """Which of the request's `n` sequences."""
    token_ids: list[int]
    """New tokens, the end-of-text token included when it was drawn."""
    text: str
    """New text: never half a character, never part of a stop string."""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    """On a sequence's first delta: the prompt's tokens from the second on."""
    embedding: list[float] | None = None
    """On a pooled request's only delta: (hidden size,), not normalised."""
    finish_reason: FinishReason | None = None
    """Set on a sequence's last delta, and only there."""
    prompt_tokens: int = 0
    """Length of the prompt."""
    queue_seconds: float | None = None
    """On a sequence's first token: how long it waited in the engine before its first step."""
    weights: str | None = None
    """On a sequence's first token: the digest of the weights that compute it, `+` and the
    adapter's where there is one."""
    error: str = ""
    """Why, where `finish_reason` is "error"."""
    error_status: int = 500
    """HTTP's status of it: 500 where it failed on its way, 4xx where it was refused."""


class Utilization(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of the machine's measured limits that a phase's steps reach, 0 to 1."""

    phase: str
    """`decode`, or `prefill` where a step takes in any prompt."""
    memory_bandwidth: float
    arithmetic: float


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """The engine's counters and gauges; counters never go back within a process."""

    step: int
    """Steps finished since the start."""
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    last_step_seconds: float
    last_step_prefill_tokens: int
    last_step_decode_tokens: int
    prefix_cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache, of all answers."""
    prefix_cache_hits: int = 0
    """Those that were found, and not computed again."""
    drafted_tokens: int = 0
    """Tokens that were guessed and verified."""
    accepted_tokens: int = 0
    """Those that were right."""
    largest_step_seconds: float = 0.0
    """What the largest step that there can be is predicted to take; 0 before anything is known."""
    utilization: list[Utilization] = []
    """Of the latest steps; empty where the machine's limits were not measured."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine process has loaded its model; what the API process needs to know of it."""

    model_id: str
    """Hash of the artifact that is served."""
    vocab_size: int
    context_length: int
    kv_blocks_total: int
    block_size: int
    eos_token_id: int | None
    load_seconds: float
    adapters: dict[str, str] = {}
    """Digests of the loaded adapters, by the names that requests use."""
    engine_config: str = ""
    """The EngineConfig with every "auto" settled, as JSON."""
    environment: dict[str, str] = {}
    """What else the last bits of an answer depend on: versions, processor."""
