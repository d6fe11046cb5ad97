"""From a directory to what an engine is made of: memory is checked first, then weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt.core.artifact import open_artifact
from minigpt.core.errors import ConfigError
from minigpt.core.machine import describe_machine
from minigpt.core.storage import is_remote
from minigpt.data.tokenizer import Tokenizer
from minigpt.engine.config import EngineConfig
from minigpt.engine.host import free_memory
from minigpt.engine.native import not_covered
from minigpt.engine.parallel import Ranks
from minigpt.engine.parallel_group import device_of, shard_of
from minigpt.engine.preflight import plan_memory, read_model_config
from minigpt.engine.resolve import Report, resolve_memory, resolve_numerics
from minigpt.model.decoder import Decoder
from minigpt.model.draft_heads import DraftHeads, load_draft_heads
from minigpt.model.sharding import check_ranks
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
    ranks: Ranks | None
    """The other processes that compute the model, where there are some: its part is rank 0's."""


def load(path: str | Path, config: EngineConfig, report: Report) -> Loaded:
    """Load a model artifact or a Hugging Face directory; sets torch's threads.

    Args:
        path: With weights, `config.json` and a tokenizer.
        config: "auto" values are settled here.
        report: Receives each derived number with its derivation.

    Raises:
        ModelError: No usable weights there, they do not fit in memory, the tokenizer does not
            fit the model, or the draft heads are for other weights.
        ConfigError: The KV cache can't hold one context, no such device is there, the model can't
            be cut among `tensor_parallel_size` processes, or answers that do not depend on their
            batch are asked for where only the kernels give them.
        RankError: One of those processes ended.
    """
    config = resolve_numerics(
        config, describe_machine(), cuda=torch.cuda.is_available(), report=report
    )
    assert config.threads != "auto"
    torch.set_num_threads(config.threads)
    if not is_remote(path):
        plan_memory(Path(path), config, available=free_memory(config), report=lambda line: None)
    if config.tensor_parallel_size == 1:
        return _load(path, config, report, None)
    ranks = _start_ranks(path, config)
    try:
        return _load(path, config, report, ranks)
    except BaseException:
        ranks.close()
        raise


def _start_ranks(path: str | Path, config: EngineConfig) -> Ranks:
    """Start the other processes, which begin to load their parts."""
    size = config.tensor_parallel_size
    if config.device == "cuda" and torch.cuda.device_count() < size:
        raise ConfigError(
            f"tensor_parallel_size = {size}: this machine has {torch.cuda.device_count()} GPUs",
            remedy="one GPU a process: lower it",
        )
    remote = is_remote(path)
    directory = open_artifact(path, kind="model", verify=False).path if remote else Path(path)
    model = read_model_config(directory)
    check_ranks(model, size)
    return Ranks.start(config, model, directory)


def _load(path: str | Path, config: EngineConfig, report: Report, ranks: Ranks | None) -> Loaded:
    device, shard = device_of(config, rank=0), shard_of(config, rank=0)
    loaded = load_model(path, dtype=config.dtype, device=device, shard=shard)
    tokenizer = Tokenizer.load(loaded.path)
    check_vocab(loaded.config, tokenizer.vocab_size)
    draft, drafting = None, config.speculative.draft_model
    if drafting is not None:
        draft = load_model(drafting, dtype=config.dtype, device=device).model
    if ranks is not None:
        ranks.wait_loaded()  # then what is free is free for all of them
    dtype: torch.dtype = getattr(torch, str(config.dtype))
    heads = None
    if (path_of_heads := config.speculative.draft_heads) is not None:
        heads = load_draft_heads(path_of_heads, loaded.id, dtype=dtype, device=str(device))
        if (count := config.speculative.draft_vocabulary) is not None:
            heads.use_output(loaded.model.output_weight[:count])
    config = resolve_memory(
        config,
        loaded.config,
        available=free_memory(config),
        report=report,
        draft=None if draft is None else draft.config,
    )
    if ranks is None:
        reason = not_covered(loaded.model, dtype, config.block_size, adapters=config.adapters)
    else:
        reason = f"{config.tensor_parallel_size} processes, which meet within each layer"
    if config.batch_invariant and reason is not None:
        raise ConfigError(
            "batch_invariant = true is what the kernels keep, and they can't serve this model: "
            f"{reason}",
            remedy="serve without batch_invariant, or as the kernels can: see docs/kernels.md",
        )
    report("runner = kernels" if reason is None else f"runner = torch: {reason}")
    return Loaded(loaded.model, draft, heads, tokenizer, config, loaded.id, ranks)
