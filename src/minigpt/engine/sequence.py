"""A Sequence is one token stream of a request; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from minigpt.api.requests import FinishReason, Request, SamplingParams
from minigpt.engine.detokenizer import TextStream
from minigpt.engine.drafting import Drafting
from minigpt.engine.prompt import PromptReader
from minigpt.engine.shaping import Shaping


class SequenceStatus(Enum):
    """Where a sequence stands; only running ones hold blocks."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One of a request's `n` answers, from arrival to finish. Compared by identity."""

    request_id: str
    index: int
    """Which of the request's answers."""
    arrival: int
    """Order of arrival in this engine; smaller is older and served first."""
    seed: int
    """Keys this sequence's random numbers, together with `index` and the position."""
    sampling: SamplingParams
    token_ids: list[int]
    """Prompt, then what was generated."""
    num_prompt_tokens: int
    text: TextStream
    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""
    priority: int = 0
    """Lower goes first among a tenant's sequences."""
    tenant: str = ""
    """Whose share of the engine this takes."""
    urgency: int = 0
    """From priority and time of arrival, set by the scheduler; smaller is served first."""
    prefix_root: bytes = b""
    """Stands for the weights and the adapter that its keys and values depend on."""
    weights: str = ""
    """Digest of the weights that it runs on."""
    adapter: str | None = None
    """Digest of the adapter that it runs with; None is none."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Digests of its first full blocks; see `prefix_cache`."""
    reads_cache: bool = True
    """Whether tokens may be taken from the cache; not where every logit of the prompt is asked
    for."""
    num_cached_tokens: int | None = None
    """Tokens found in the cache when first admitted; None until then."""
    block_table: list[int] = field(default_factory=list)
    """Blocks of the cache, in order: token t is in block_table[t // block_size]."""
    status: SequenceStatus = SequenceStatus.WAITING
    arrived_seconds: float = 0.0
    """When it arrived, by the engine's clock."""
    queue_seconds: float | None = None
    """How long it waited for its first step; None until then."""
    finish_reason: FinishReason | None = None
    shaping: Shaping | None = None
    """Bias, penalties and masks; None where there are none."""
    drafting: Drafting = field(default_factory=Drafting)
    reader: PromptReader | None = None
    """What is wanted of every position of the prompt; None where nothing is. With one, no
    position may be taken from a cache: each must be computed."""

    @classmethod
    def from_request(
        cls,
        request: Request,
        index: int,
        arrival: int,
        seed: int,
        prefix_root: bytes = b"",
        *,
        weights: str = "",
        adapter: str | None = None,
    ) -> Sequence:
        """Make the `index`-th sequence of a request."""
        return cls(
            request_id=request.id,
            index=index,
            arrival=arrival,
            seed=seed,
            sampling=request.sampling,
            token_ids=list(request.prompt_token_ids),
            num_prompt_tokens=len(request.prompt_token_ids),
            text=TextStream(request.sampling.stop),
            reader=(reader := PromptReader.of(request)),
            reads_cache=reader is None,
            priority=request.priority,
            tenant=request.tenant,
            prefix_root=prefix_root,
            weights=weights,
            adapter=adapter,
        )

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first and who is preempted last: unique, and fixed from arrival on."""
        return self.urgency, self.arrival

    @property
    def identity(self) -> str:
        """What computes it: the weights' digest, `+` and the adapter's where there is one."""
        return self.weights if self.adapter is None else f"{self.weights}+{self.adapter}"

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_remaining(self) -> int:
        """Tokens still to be computed before the next one can be sampled; 1 is decode."""
        return len(self.token_ids) - self.num_computed

    @property
    def most_cached_tokens(self) -> int:
        """Most tokens that this sequence can ever have in the cache (the last is never read)."""
        return self.num_prompt_tokens + max(self.sampling.max_tokens, 1) - 1
