from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minigpt.api.requests import Request
from minigpt.engine.fairness import FairQueue
from minigpt.engine.sequence import Sequence, SequenceStatus

TENANTS = ["a", "b", "c"]
WEIGHTS = {"a": 1.0, "b": 4.0}


def _sequence(arrival: int, tenant: str = "", urgency: int = 0) -> Sequence:
    request = Request(id=str(arrival), prompt_token_ids=[1], tenant=tenant)
    sequence = Sequence.from_request(request, 0, arrival, seed=0)
    sequence.urgency = urgency
    return sequence


class FairQueueMachine(RuleBasedStateMachine):
    """Against a model that keeps plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue(WEIGHTS)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.arrivals = 0
        self.last = ""
        """Who stopped waiting last."""

    @rule(tenant=st.sampled_from(TENANTS), urgency=st.integers(-3, 3))
    def arrive(self, tenant: str, urgency: int) -> None:
        floor, before = self.floor(), self.queue.served(tenant)
        waits = any(s.tenant == tenant for s in self.waiting)
        sequence = _sequence(self.arrivals, tenant, urgency)
        self.arrivals += 1
        self.queue.arrive(sequence)
        self.waiting.append(sequence)
        expected = before if waits else max(before, floor)
        assert self.queue.served(tenant) == expected, "credit from not waiting"

    def floor(self) -> float:
        waiting = {s.tenant for s in self.waiting}
        if waiting:
            return min(self.queue.served(name) for name in waiting)
        return self.queue.served(self.last)

    def removed(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        if all(s.tenant != sequence.tenant for s in self.waiting):
            self.last = sequence.tenant

    @precondition(lambda self: self.waiting)
    @rule(tokens=st.integers(0, 50))
    def admit(self, tokens: int) -> None:
        sequence = next(self.queue.candidates())
        served = {s.tenant: self.queue.served(s.tenant) for s in self.waiting}
        assert served[sequence.tenant] == min(served.values())
        own = [s for s in self.waiting if s.tenant == sequence.tenant]
        assert sequence is min(own, key=lambda s: s.order)
        self.queue.remove(sequence)
        self.queue.charge(sequence.tenant, input_tokens=tokens)
        sequence.status = SequenceStatus.RUNNING
        self.removed(sequence)
        self.running.append(sequence)
        grown = self.queue.served(sequence.tenant) - served[sequence.tenant]
        assert grown == tokens / WEIGHTS.get(sequence.tenant, 1.0)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ends=st.booleans())
    def stop(self, data: st.DataObject, ends: bool) -> None:
        sequence = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.queue.charge(sequence.tenant, output_tokens=1)
        if ends:
            sequence.status = SequenceStatus.FINISHED
            self.queue.leave(sequence)
        else:
            floor, before = self.floor(), self.queue.served(sequence.tenant)
            waits = any(s.tenant == sequence.tenant for s in self.waiting)
            sequence.status = SequenceStatus.WAITING
            self.queue.push(sequence)
            self.waiting.append(sequence)
            expected = before if waits else max(before, floor)
            assert self.queue.served(sequence.tenant) == expected

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.waiting))
        self.queue.remove(sequence)
        self.removed(sequence)
        sequence.status = SequenceStatus.FINISHED
        self.queue.leave(sequence)

    @invariant()
    def books_match(self) -> None:
        self.queue.check(self.running)
        assert len(self.queue) == len(self.waiting)
        assert {id(s) for s in self.queue} == {id(s) for s in self.waiting}
        assert {id(s) for s in self.queue.candidates()} == {id(s) for s in self.waiting}
        if not self.waiting and not self.running:
            self.last = ""
            assert all(self.queue.served(name) == 0 for name in TENANTS)
            assert not self.queue._tenants, "idle tenants are remembered"


TestFairQueueMachine = FairQueueMachine.TestCase
TestFairQueueMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_many_idle_tenants_are_not_remembered() -> None:
    queue = FairQueue()
    busy = _sequence(0, "busy")
    queue.arrive(busy)
    for number in range(1, 500):
        guest = _sequence(number, f"guest {number}")
        queue.arrive(guest)
        queue.charge("busy", input_tokens=10)
        queue.charge(guest.tenant, input_tokens=5)
        queue.remove(guest)
        queue.leave(guest)
    assert len(queue._tenants) <= 3
