"""Who is admitted next: tenants take turns by tokens served, a tenant's own go by urgency.

Between tenants: virtual token counters (Sheng et al. 2024, https://arxiv.org/abs/2401.00588).
What a tenant is served is added to its counter, divided by its weight; the tenant with the
smallest counter goes first. One that was idle starts at the smallest counter of those who were
not, so that it saves up no credit. Once all are idle, all start anew.

Within a tenant: the smallest (urgency, arrival). Both are fixed at arrival, so that a sequence
is overtaken only by those that are more urgent; see `Scheduler` for the bound that this gives.

No torch here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

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
        self._length = 0

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
        tenant = self._tenants.get(sequence.tenant)
        if tenant is None or not tenant.unfinished:
            tenant = self._activate(sequence.tenant)
        tenant.unfinished += 1
        self.push(sequence)

    def push(self, sequence: Sequence) -> None:
        """Let a sequence that arrived earlier wait, again or for the first time."""
        insort(self._tenants[sequence.tenant].waiting, sequence, key=lambda s: s.order)
        self._length += 1

    def remove(self, sequence: Sequence) -> None:
        """Let a waiting sequence wait no more."""
        waiting = self._tenants[sequence.tenant].waiting
        index = bisect_left(waiting, sequence.order, key=lambda s: s.order)
        assert waiting[index] is sequence
        del waiting[index]
        self._length -= 1

    def leave(self, sequence: Sequence) -> None:
        """Note that a sequence, which does not wait, is finished."""
        self._tenants[sequence.tenant].unfinished -= 1
        if not any(tenant.unfinished for tenant in self._tenants.values()):
            self._tenants.clear()

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

    def _activate(self, name: str) -> _Tenant:
        """Return the entry of a tenant that was idle, without credit from that time."""
        floor = min((t.counter for t in self._tenants.values() if t.unfinished), default=0.0)
        # Who is idle and owes nothing need not be remembered: it would start at the floor.
        self._tenants = {
            key: tenant
            for key, tenant in self._tenants.items()
            if tenant.unfinished or tenant.counter > floor
        }
        return self._tenants.setdefault(name, _Tenant(floor))
