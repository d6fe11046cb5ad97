"""Bring other weights, or an adapter, into a running engine: what fits is loaded, the rest refused.

Weights are loaded in a thread of their own while the engine steps, and installed between two steps.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from minigpt.api.requests import Ready
from minigpt.core.artifact import is_artifact, open_artifact
from minigpt.core.errors import ModelError, RequestError
from minigpt.core.manifest import hash_file
from minigpt.core.storage import is_remote
from minigpt.core.telemetry import get_logger
from minigpt.data.tokenizer import Tokenizer
from minigpt.engine.adapters import check_adapter
from minigpt.engine.blocks import BlockManager
from minigpt.engine.config import EngineConfig
from minigpt.engine.host import free_memory
from minigpt.engine.native import Runner
from minigpt.engine.parallel_group import shard_of
from minigpt.engine.preflight import rank_weight_bytes, read_model_config
from minigpt.engine.resolve import DTYPE_BYTES
from minigpt.engine.weights import HeldWeights
from minigpt.model.config import ModelConfig
from minigpt.model.lora import CONFIG, WEIGHTS, Adapter, load_adapter
from minigpt.model.sharding import check_ranks
from minigpt.model.tensor_headers import read_headers, weight_files
from minigpt.model.weights import LoadedModel, load_model

_POLL_SECONDS = 0.05
"""How long a step without work waits for weights that are being loaded."""


@dataclass(frozen=True)
class Host:
    """The running engine that something must fit."""

    config: EngineConfig
    """With every "auto" settled."""
    model: ModelConfig
    tokenizer: Tokenizer
    available: int
    """Bytes of its device that are free and that nothing is promised."""

    @classmethod
    def of(
        cls, config: EngineConfig, model: ModelConfig, tokenizer: Tokenizer, blocks: BlockManager
    ) -> Self:
        """Describe an engine as it is now; `blocks` are those of its KV cache."""
        promised = 0
        if config.device == "cpu":  # where memory is taken as it is first written
            assert config.kv_cache_bytes != "auto"
            promised = config.kv_cache_bytes * blocks.num_untouched // blocks.num_blocks
        return cls(config, model, tokenizer, max(0, free_memory(config) - promised))


class Exchange:
    """Brings weights and adapters into an engine between its steps.

    Args:
        weights: The engine's.
        host: Describes the engine as it is now.
        ready: What the engine says of itself.
    """

    def __init__(
        self, weights: HeldWeights, host: Callable[[], Host], ready: Callable[[], Ready]
    ) -> None:
        self._weights = weights
        self._host = host
        self._ready = ready
        self._swap: _Swap | None = None

    @property
    def under_way(self) -> bool:
        """Whether weights are being loaded, or are loaded and not installed."""
        return self._swap is not None

    def swap(self, path: str | Path) -> Future[Ready]:
        """Serve other weights: running sequences finish on the old ones, new ones use the new.

        They are checked and loaded in a thread while the engine steps. Adapters stay with the
        weights that they were loaded onto. Both sets of weights are held until no sequence uses
        the old ones.

        Args:
            path: A model artifact or a Hugging Face directory.

        Returns:
            What `ready` says afterwards, or why nothing has changed: ModelError as of
            `check_model`, ArtifactError for corrupt files.

        Raises:
            ModelError: Another swap is under way.
        """
        if self._swap is not None:
            raise ModelError("another swap is under way", remedy="wait for it")
        host, runner = self._host(), self._weights.runner
        swap = _Swap(ends_drafting=host.config.speculative.draft_heads is not None)
        self._swap = swap

        def load() -> None:
            try:
                loaded = _load(path, host)
                swap.loaded.set_result((loaded.id, runner.with_model(loaded)))
            except BaseException as error:
                swap.loaded.set_exception(error)

        threading.Thread(target=load, name="swap", daemon=True).start()
        return swap.done

    def install(self, *, may_wait: bool) -> bool:
        """Let new requests use weights that are loaded; return whether they do now.

        Args:
            may_wait: Wait a little for them, as there is nothing else to do.
        """
        swap = self._swap
        assert swap is not None
        if may_wait:
            wait([swap.loaded], timeout=_POLL_SECONDS)
        if not swap.loaded.done():
            return False
        self._swap = None
        if (error := swap.loaded.exception()) is not None:
            swap.done.set_exception(error)
            return False
        digest, runner = swap.loaded.result()
        if swap.ends_drafting and digest != self._weights.current:
            get_logger("engine").warning("the draft heads are of the old weights: drafting ends")
        self._weights.install(digest, runner)
        swap.done.set_result(self._ready())
        return True

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Let requests name a LoRA adapter of the served weights.

        Args:
            name: What requests call it.
            path: A directory in PEFT's layout, or an adapter artifact.

        Raises:
            RequestError: An adapter of this name is loaded.
            ModelError, ArtifactError: As of `read_adapter`.
        """
        if name in self._weights.adapters:
            raise RequestError(
                f"an adapter {name!r} is loaded", param="lora_name", remedy="unload it first"
            )
        self._weights.load_adapter(name, *read_adapter(Path(path), self._host()))


@dataclass
class _Swap:
    """A swap under way."""

    ends_drafting: bool
    """Whether heads draft: those of other weights can't."""
    loaded: Future[tuple[str, Runner]] = field(default_factory=Future)
    """The digest of the new weights, and what runs them."""
    done: Future[Ready] = field(default_factory=Future)


def _load(path: str | Path, host: Host) -> LoadedModel:
    remote = is_remote(path)
    directory = open_artifact(path, kind="model", verify=False).path if remote else Path(path)
    check_model(directory, host)
    loaded = load_model(
        directory,
        dtype=host.config.dtype,
        device=host.config.device,
        shard=shard_of(host.config, rank=0),
    )
    if _ends(loaded.config) != _ends(host.model):
        raise ModelError(
            f"{path} ends a text by the tokens {_ends(loaded.config)}, the served model by "
            f"{_ends(host.model)}",
            remedy="serve it with a server of its own",
        )
    return loaded


def check_model(directory: Path, host: Host) -> None:
    """Refuse weights that can't take the place of the served ones, before any are read.

    Raises:
        ModelError: No model there; another tokenizer or vocabulary; keys and values of another
            shape; a shorter context; or no memory to hold both, with the shortfall in bytes.
    """
    model = read_model_config(directory)
    remedy = "serve it with a server of its own"
    for name in ("vocab_size", "num_layers", "num_kv_heads", "head_dim"):
        new, old = getattr(model, name), getattr(host.model, name)
        if new != old:
            raise ModelError(
                f"{directory} has {name} = {new}, the served model {old}: they can't share a "
                "vocabulary and a KV cache",
                remedy=remedy,
            )
    assert host.config.context_length != "auto"
    if model.context_length < host.config.context_length:
        raise ModelError(
            f"{directory} has a context of {model.context_length} tokens, the engine serves "
            f"{host.config.context_length}",
            remedy=remedy,
        )
    tokenizer = Tokenizer.load(directory)
    if _reading(tokenizer) != _reading(host.tokenizer):
        raise ModelError(
            f"{directory} has another tokenizer or chat template than the served model",
            remedy=remedy,
        )
    check_ranks(model, host.config.tensor_parallel_size)
    headers = read_headers(weight_files(directory))
    needed = rank_weight_bytes(directory, headers, host.config, model)
    _check_room(f"{directory} takes {needed} bytes of weights beside the served ones", needed, host)


def read_adapter(directory: Path, host: Host) -> tuple[str, Adapter]:
    """Read an adapter in PEFT's layout, artifact or not, and check that it fits.

    Returns:
        Its digest and its content.

    Raises:
        ModelError: No plain LoRA adapter there, one of another model's shape, or no memory for
            it, with the shortfall.
        ArtifactError: The artifact is corrupt or of another kind.
    """
    if is_artifact(directory):
        digest = open_artifact(directory, kind="adapter").id
        adapter = load_adapter(directory)
    else:
        adapter = load_adapter(directory)
        digest = _digest(directory)
    check_adapter(adapter, host.model)
    assert host.config.dtype != "auto"
    needed = DTYPE_BYTES[host.config.dtype] * sum(t.numel() for t in adapter.tensors.values())
    _check_room(f"the adapter at {directory} takes {needed} bytes", needed, host)
    return digest, adapter


def _digest(directory: Path) -> str:
    hashes = "".join(hash_file(directory / name) for name in (CONFIG, WEIGHTS))
    return hashlib.sha256(hashes.encode()).hexdigest()


def _check_room(what: str, needed: int, host: Host) -> None:
    if needed > host.available:
        raise ModelError(
            f"{what}, {host.available} are free besides what the KV cache is promised: "
            f"short by {needed - host.available} bytes",
            remedy="free memory, or lower engine.kv_cache_bytes",
        )


def _reading(tokenizer: Tokenizer) -> tuple[object, ...]:
    """Return all that decides which tokens a text or a conversation becomes."""
    special = tokenizer.bos_token_id, tokenizer.eos_token_id
    return tokenizer.fingerprint, tokenizer.chat_template, *special


def _ends(model: ModelConfig) -> list[int]:
    found = {model.eos_token_id, *model.stop_token_ids} - {None}
    return sorted(token for token in found if token is not None)
