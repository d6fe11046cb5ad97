"""The weights that the engine holds: the newest for who comes, older ones while they are needed.

A sequence names the weights and the adapter that it arrived under and keeps to them, so that it
finishes as it began whatever is swapped, loaded or dropped meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minigpt.core.errors import ModelError, RequestError
from minigpt.engine.batch import Chunk
from minigpt.engine.native import Runner
from minigpt.engine.sequence import Sequence
from minigpt.model.lora import Adapter


@dataclass
class _Held:
    """One set of weights."""

    runner: Runner
    adapters: dict[str, str] = field(default_factory=dict)
    """Digests by the names that requests use."""
    resident: set[str] = field(default_factory=set)
    """Digests of the adapters in memory, those that were dropped but still run included."""


class HeldWeights:
    """Weights by their digest, all over one KV cache.

    Args:
        digest: Of the first weights.
        runner: Of the first weights.
    """

    def __init__(self, digest: str, runner: Runner) -> None:
        self.current = digest
        """What new requests run on."""
        self._held = {digest: _Held(runner)}

    @property
    def runner(self) -> Runner:
        """The newest weights' runner."""
        return self._held[self.current].runner

    @property
    def adapters(self) -> dict[str, str]:
        """Digests of the adapters that a request can name."""
        return self._held[self.current].adapters

    def adapter(self, name: str | None) -> str | None:
        """Return the digest of a named adapter; None of None.

        Raises:
            RequestError: Status 404, there is none of this name.
        """
        if name is None:
            return None
        if name not in self.adapters:
            raise RequestError(
                f"the adapter {name!r} is not loaded",
                param="model",
                status=404,
                code="model_not_found",
                remedy="load it, or ask for another model",
            )
        return self.adapters[name]

    @property
    def _has_spare(self) -> bool:
        """Whether anything is held that new requests don't use."""
        current = self._held[self.current]
        return len(self._held) > 1 or len(current.resident) > len(set(current.adapters.values()))

    def run(self, chunks: list[Chunk]) -> tuple[Tensor, list[Sequence]]:
        """Compute a batch, each sequence by its own weights; see `ModelRunner.run`."""
        groups: dict[str, list[Chunk]] = {}
        for chunk in chunks:
            groups.setdefault(chunk.sequence.weights, []).append(chunk)
        parts = [self._held[digest].runner.run(group) for digest, group in groups.items()]
        if len(parts) == 1:
            return parts[0]
        logits = torch.cat([logits for logits, _ in parts])
        return logits, [sequence for _, sequences in parts for sequence in sequences]

    def install(self, digest: str, runner: Runner) -> None:
        """Let new requests use these weights; those that are held already stay as they are."""
        if self._held.setdefault(digest, _Held(runner)).runner is not runner:
            runner.close()
        self.current = digest

    def load_adapter(self, name: str, digest: str, adapter: Adapter) -> None:
        """Let requests name an adapter of the newest weights.

        Raises:
            ModelError: What runs them serves no adapters.
        """
        held = self._held[self.current]
        if held.runner.adapters is None:
            raise ModelError(
                "adapters are served by torch, and the kernels serve here",
                remedy="start with engine.adapters=true",
            )
        if digest not in held.resident:
            held.runner.adapters.add(digest, adapter)
            held.resident.add(digest)
        held.adapters[name] = digest

    def unload_adapter(self, name: str) -> None:
        """Forget a name; raises as `adapter`."""
        self.adapter(name)
        del self.adapters[name]

    def release(self, sequences: Iterable[Sequence]) -> None:
        """Free the weights and adapters that neither new requests nor these sequences use."""
        if not self._has_spare:
            return
        in_use = {(sequence.weights, sequence.adapter) for sequence in sequences}
        for digest, held in tuple(self._held.items()):
            if digest != self.current and not any(weights == digest for weights, _ in in_use):
                self._held.pop(digest).runner.close()
                continue
            named = set(held.adapters.values())
            running = {adapter for weights, adapter in in_use if weights == digest}
            for unused in held.resident - named - running:
                assert held.runner.adapters is not None
                held.runner.adapters.remove(unused)
                held.resident.remove(unused)
