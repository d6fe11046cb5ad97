"""From a directory to what an engine is made of: memory is checked first, then weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt.core.machine import describe_machine
from minigpt.core.storage import is_remote
from minigpt.data.tokenizer import Tokenizer
from minigpt.engine.config import EngineConfig
from minigpt.engine.host import free_memory
from minigpt.engine.native import not_covered
from minigpt.engine.preflight import plan_memory
from minigpt.engine.resolve import Report, resolve_memory, resolve_numerics
from minigpt.model.decoder import Decoder
from minigpt.model.draft_heads import DraftHeads, load_draft_heads
from minigpt.model.weights import check_vocab, load_model


@dataclass(frozen=True)
class Loaded:
    """A model, what spells its tokens, and how it is to be served."""

    model: Decoder
    draft: Decoder | None
    """The model that drafts, if one does."""
    heads: DraftHeads | None
    """The heads that draft, if any do."""
    tokenizer: Tokenizer
    config: EngineConfig
    """With every "auto" settled."""
    id: str
    """Hash of the weights."""


def load(path: str | Path, config: EngineConfig, report: Report) -> Loaded:
    """Load a model artifact or a Hugging Face directory; sets torch's threads.

    Args:
        path: With weights, `config.json` and a tokenizer.
        config: "auto" values are settled here.
        report: Receives each derived number with its derivation.

    Raises:
        ModelError: No usable weights there, they do not fit in memory, the tokenizer does not
            fit the model, or the draft heads are for other weights.
        ConfigError: The KV cache can't hold one context, or no such device is there.
    """
    config = resolve_numerics(
        config, describe_machine(), cuda=torch.cuda.is_available(), report=report
    )
    assert config.threads != "auto"
    torch.set_num_threads(config.threads)
    if not is_remote(path):
        plan_memory(Path(path), config, available=free_memory(config), report=lambda line: None)
    loaded = load_model(path, dtype=config.dtype, device=config.device)
    tokenizer = Tokenizer.load(loaded.path)
    check_vocab(loaded.config, tokenizer.vocab_size)
    draft, drafting = None, config.speculative.draft_model
    if drafting is not None:
        draft = load_model(drafting, dtype=config.dtype, device=config.device).model
    dtype: torch.dtype = getattr(torch, config.dtype)
    heads = None
    if (path_of_heads := config.speculative.draft_heads) is not None:
        heads = load_draft_heads(path_of_heads, loaded.id, dtype=dtype, device=config.device)
        if (count := config.speculative.draft_vocabulary) is not None:
            heads.use_output(loaded.model.output_weight[:count])
    config = resolve_memory(
        config,
        loaded.config,
        available=free_memory(config),
        report=report,
        draft=None if draft is None else draft.config,
    )
    reason = not_covered(loaded.model, dtype, config.block_size, adapters=config.adapters)
    report("runner = kernels" if reason is None else f"runner = torch: {reason}")
    return Loaded(loaded.model, draft, heads, tokenizer, config, loaded.id)
