"""Who goes first, and that nobody starves: the rules that `engine/scheduler.py` states."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.scheduling import (
    carry_out,
    make_scheduler,
    make_sequence,
    run_to_end,
)

from minigpt.engine.fairness import FairQueue

"""Computed tokens that weigh as much as a priority."""


Q = 50
"""Computed tokens that weigh as much as a priority."""


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_who_may_overtake_whom(data: st.DataObject) -> None:
    """Within a tenant only the more urgent, between tenants only whoever was served less."""
    queue = FairQueue({"b": 2.0})
    scheduler = make_scheduler(16, 3, 8, queue=queue, priority_step_tokens=Q)
    marks: dict[str, int] = {}
    computed, alive, longest = 0, 0, (16, 12)
    lengths = st.tuples(st.integers(1, longest[0]), st.integers(1, longest[1]))
    for arrival in range(data.draw(st.integers(5, 25))):
        prompt, output = data.draw(lengths)
        scheduler.add(
            make_sequence(
                arrival, prompt, output, priority=data.draw(st.integers(0, 2)),
                tenant=data.draw(st.sampled_from(["a", "b"])),
            )
        )  # fmt: skip
        marks[str(arrival)] = computed
        alive += 1
        for _ in range(data.draw(st.integers(0, 4))):
            fresh = [s for s in scheduler.queue if s.num_cached_tokens is None]
            batch = scheduler.schedule()
            admitted = [s for s in fresh if s.num_cached_tokens is not None]
            waiting = [s for s in scheduler.queue if s.num_cached_tokens is None]
            for w, s in itertools.product(waiting, admitted):
                if w.tenant == s.tenant and w.arrival < s.arrival:
                    ahead = w.priority - s.priority
                    assert ahead > 0, "overtaken by one that is not more urgent"
                    assert marks[s.request_id] - marks[w.request_id] <= ahead * Q
            served = {s.tenant: queue.served(s.tenant) for s in scheduler.queue}
            if len(served) == 2:
                most, least = sorted(served, key=lambda t: served[t], reverse=True)
                weight = {"a": 1.0, "b": 2.0}[most]
                lead = (longest[0] + 2 * scheduler.max_num_seqs * longest[1]) / weight
                assert served[most] - served[least] <= lead
            computed += batch.num_tokens
            alive -= len(carry_out(scheduler, batch))
    while scheduler.has_work:
        alive -= len(carry_out(scheduler, scheduler.schedule()))
    assert alive == 0


def test_tenants_are_served_in_proportion_to_their_weights() -> None:
    """However many requests the greedy one sends, and however long they are."""
    queue = FairQueue({"paying": 3.0})
    scheduler = make_scheduler(256, 4, 16, queue=queue)
    arrivals = itertools.count()
    for _ in range(60):
        scheduler.add(make_sequence(next(arrivals), 30, 20, tenant="greedy"))
        scheduler.add(make_sequence(next(arrivals), 8, 4, tenant="paying"))
    served: dict[str, float] = defaultdict(float)
    for _ in range(400):
        scheduler.add(make_sequence(next(arrivals), 8, 4, tenant="paying"))
        batch = scheduler.schedule()
        for chunk in batch.chunks:
            served[chunk.sequence.tenant] += chunk.length - chunk.is_decode + 2 * chunk.samples
        carry_out(scheduler, batch)
        assert {s.tenant for s in scheduler.queue} == {"greedy", "paying"}
    assert served["paying"] / served["greedy"] == pytest.approx(3, rel=0.1)


def test_a_tenant_that_returns_has_no_credit() -> None:
    queue = FairQueue()
    scheduler = make_scheduler(64, 1, 16, queue=queue)
    arrivals = itertools.count()
    for _ in range(20):
        scheduler.add(make_sequence(next(arrivals), 8, 4, tenant="steady"))
    for _ in range(30):
        carry_out(scheduler, scheduler.schedule())
    for _ in range(10):
        scheduler.add(make_sequence(next(arrivals), 8, 4, tenant="late"))
    order: list[str] = []
    for _ in range(40):
        batch = scheduler.schedule()
        order += [chunk.sequence.tenant for chunk in batch.chunks if not chunk.is_decode]
        carry_out(scheduler, batch)
    assert abs(order.count("late") - order.count("steady")) <= 1


def test_the_urgent_go_first_and_the_patient_are_not_starved() -> None:
    """Under an endless flood of more urgent ones the patient one starts within its bound."""
    scheduler = make_scheduler(64, 1, 16, priority_step_tokens=Q)
    arrivals = itertools.count()
    scheduler.add(make_sequence(next(arrivals), 8, 4, priority=0))
    carry_out(scheduler, scheduler.schedule())
    patient = make_sequence(next(arrivals), 8, 4, priority=4)
    scheduler.add(patient)
    computed = overtaken = 0
    while patient.num_cached_tokens is None:
        scheduler.add(make_sequence(next(arrivals), 8, 4, priority=0))
        batch = scheduler.schedule()
        overtaken += batch.num_decode_tokens == 0
        computed += batch.num_tokens
        carry_out(scheduler, batch)
    # Of those that arrived before 4 * Q tokens each one in turn was served first, 11 tokens each.
    assert overtaken >= 4
    flood_before_bound = 4 * Q / 11 * 4 + 5
    assert computed <= 11 * (flood_before_bound + 1)


def test_preempted_is_the_least_urgent() -> None:
    scheduler = make_scheduler(8, 3, 24)
    patient = make_sequence(0, 7, 14, priority=1)
    normal, later = make_sequence(1, 7, 14), make_sequence(2, 7, 14)
    for sequence in (patient, normal, later):
        scheduler.add(sequence)
    preempted = [s for batch in run_to_end(scheduler) for s in batch.preempted]
    assert preempted
    assert preempted[0] is patient
    assert normal not in preempted
