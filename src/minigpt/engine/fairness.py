"""Who is admitted next: tenants take turns by tokens served, a tenant's own go by urgency.

Between tenants: virtual token counters (Sheng et al. 2024, https://arxiv.org/abs/2401.00588).
What a tenant is served is added to its counter, divided by its weight; of those who wait the one
with the smallest counter goes first. Who begins to wait starts at the smallest counter of those
who wait already, or where nobody does at that of who did last: no credit is saved up by not
waiting. Once all are idle, all start anew.

Within a tenant: the smallest (urgency, arrival). Both are fixed at arrival, so that a sequence
is overtaken only by those that are more urgent; see `Scheduler` for the bound that this gives.

No torch here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

from minigpt.engine.config import EngineConfig
from minigpt.engine.sequence import Sequence, SequenceStatus


@dataclass(slots=True)
class _Tenant:
    counter: float
    """Weighted tokens served."""
    waiting: list[Sequence] = field(default_factory=list)
    """By urgency."""
    unfinished: int = 0
    """Waiting and running."""


class FairQueue:
    """The waiting sequences of all tenants, and what each tenant has been served.

    Args:
        weights: Shares of tenants; one that is not named has 1.
        input_weight: What a computed prompt token counts.
        output_weight: What a generated token counts.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        input_weight: float = 1.0,
        output_weight: float = 2.0,
    ) -> None:
        self._weights = dict(weights or {})
        self._input_weight = input_weight
        self._output_weight = output_weight
        self._tenants: dict[str, _Tenant] = {}
        self._last: _Tenant | None = None
        """Who stopped waiting last."""
        self._length = 0

    @classmethod
    def of(cls, config: EngineConfig) -> Self:
        """Make an engine's queue."""
        return cls(
            config.tenant_weights,
            input_weight=config.input_token_weight,
            output_weight=config.output_token_weight,
        )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for tenant in self._tenants.values() for sequence in tenant.waiting)

    def candidates(self) -> Iterator[Sequence]:
        """Yield the waiting sequences in the order in which they should be admitted.

        Valid until the queue changes.
        """
        waiting = [tenant for tenant in self._tenants.values() if tenant.waiting]
        if len(waiting) > 1:
            waiting.sort(key=lambda tenant: (tenant.counter, tenant.waiting[0].order))
        return (sequence for tenant in waiting for sequence in tenant.waiting)

    def served(self, tenant: str) -> float:
        """Return a tenant's counter; 0 for one that is not known."""
        return self._tenants[tenant].counter if tenant in self._tenants else 0.0

    def arrive(self, sequence: Sequence) -> None:
        """Take in a new sequence."""
        if sequence.tenant not in self._tenants:
            self._forget_idle()
        self._tenants.setdefault(sequence.tenant, _Tenant(0.0)).unfinished += 1
        self.push(sequence)

    def push(self, sequence: Sequence) -> None:
        """Let a sequence that arrived earlier wait, again or for the first time."""
        tenant = self._tenants[sequence.tenant]
        if not tenant.waiting:
            tenant.counter = max(tenant.counter, self._floor())
        insort(tenant.waiting, sequence, key=lambda s: s.order)
        self._length += 1

    def remove(self, sequence: Sequence) -> None:
        """Let a waiting sequence wait no more."""
        tenant = self._tenants[sequence.tenant]
        index = bisect_left(tenant.waiting, sequence.order, key=lambda s: s.order)
        assert tenant.waiting[index] is sequence
        del tenant.waiting[index]
        if not tenant.waiting:
            self._last = tenant
        self._length -= 1

    def leave(self, sequence: Sequence) -> None:
        """Note that a sequence, which does not wait, is finished."""
        self._tenants[sequence.tenant].unfinished -= 1
        if not any(tenant.unfinished for tenant in self._tenants.values()):
            self._tenants.clear()
            self._last = None

    def charge(self, tenant: str, *, input_tokens: int = 0, output_tokens: int = 0) -> None:
        """Add what a tenant with unfinished sequences was served."""
        served = self._input_weight * input_tokens + self._output_weight * output_tokens
        self._tenants[tenant].counter += served / self._weights.get(tenant, 1.0)

    def check(self, running: Iterable[Sequence]) -> None:
        """Assert that order, counts and the tenants of running sequences agree."""
        unfinished = Counter(sequence.tenant for sequence in running)
        for name, tenant in self._tenants.items():
            orders = [sequence.order for sequence in tenant.waiting]
            assert orders == sorted(set(orders)), "order of waiting"
            assert all(sequence.tenant == name for sequence in tenant.waiting)
            assert tenant.unfinished == unfinished.pop(name, 0) + len(tenant.waiting)
            assert tenant.counter >= 0
        assert not unfinished, "a running sequence's tenant is not known"
        assert self._length == sum(len(tenant.waiting) for tenant in self._tenants.values())
        assert all(sequence.status is SequenceStatus.WAITING for sequence in self)

    def _floor(self) -> float:
        """Return the counter that who begins to wait has at least."""
        waiting = [tenant.counter for tenant in self._tenants.values() if tenant.waiting]
        if waiting:
            return min(waiting)
        return self._last.counter if self._last is not None else 0.0

    def _forget_idle(self) -> None:
        """Drop idle tenants that owe nothing: they would start at the floor in any case."""
        floor = self._floor()
        self._tenants = {
            name: tenant
            for name, tenant in self._tenants.items()
            if tenant.unfinished or tenant.counter > floor or tenant is self._last
        }
