from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError, DataError
from minigpt.data.config import MixtureConfig
from minigpt.data.loader import BatchLoader
from minigpt.data.mixture import Mixture, Stage, build_mixture, shares_to_counts
from minigpt.data.shards import TokenDataset

weights_lists = st.lists(
    st.one_of(
        st.integers(0, 60).map(float), st.floats(0, 10, allow_nan=False).map(lambda x: round(x, 3))
    ),
    min_size=1,
    max_size=9,
).filter(any)


def config(*sources: Mapping[str, object], unit: str = "steps") -> MixtureConfig:
    named = [{"name": f"s{i}", "dataset": f"/{i}", **source} for i, source in enumerate(sources)]
    return from_mapping(MixtureConfig, {"mixture": named, "schedule_unit": unit})


def order(mixture: Mixture, count: int) -> np.ndarray:
    return mixture.place(np.arange(count)).sources


@settings(max_examples=60, deadline=None)
@given(weights=weights_lists, periods=st.integers(1, 3))
def test_each_source_stays_within_one_of_its_share(weights: list[float], periods: int) -> None:
    mixture = build_mixture(
        config(*({"weight": weight} for weight in weights)), samples_per_step=4, sequence_length=8
    )
    counts = mixture.stages[0].counts
    length = min(6000, periods * sum(counts) + 7)
    sources = order(mixture, length)
    given_so_far = np.cumsum(np.eye(len(weights), dtype=np.int64)[sources], axis=0)
    ideal = np.outer(np.arange(1, length + 1), np.array(counts) / sum(counts))
    assert np.abs(given_so_far - ideal).max() < 1


@given(weights=weights_lists)
def test_shares_are_exact_or_rounded_to_a_block(weights: list[float]) -> None:
    exact = [Fraction(str(weight)) for weight in weights]
    counts = shares_to_counts(exact)
    assert all((count > 0) == (weight > 0) for count, weight in zip(counts, exact, strict=True))
    total = sum(exact)
    worst = max(
        abs(Fraction(c, sum(counts)) - w / total) for c, w in zip(counts, exact, strict=True)
    )
    assert worst == 0 or (sum(counts) == 4096 and worst <= Fraction(len(weights), 4096))


stages_lists = st.lists(
    st.tuples(st.integers(1, 300), st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(parts=stages_lists, at=st.integers(0, 2000), count=st.integers(1, 64))
def test_any_position_is_computed_without_replaying(
    parts: list[tuple[int, list[int]]], at: int, count: int
) -> None:
    firsts = np.concatenate([[0], np.cumsum([length for length, _ in parts])])
    mixture = Mixture(
        [
            Stage(int(first), tuple(counts))
            for first, (_, counts) in zip(firsts, parts, strict=False)
        ]
    )
    replayed = order(mixture, at + count)
    place = mixture.place(np.arange(at, at + count))
    assert place.sources.tolist() == replayed[at:].tolist()
    seen: Counter[int] = Counter(replayed[:at].tolist())
    assert mixture.counts(at).tolist() == [seen[i] for i in range(4)]
    for source, index in zip(place.sources.tolist(), place.indices.tolist(), strict=True):
        assert index == seen[source]  # each of a source's samples comes once, in order
        seen[source] += 1


def test_a_step_schedule_changes_at_the_step() -> None:
    mixture = build_mixture(
        config(
            {"weight": 3},
            {"weight": 1, "schedule": [{"at": 10, "weight": 0}, {"at": 20, "weight": 9}]},
        ),
        samples_per_step=8,
        sequence_length=4,
    )
    sources = order(mixture, 320)
    assert (sources[:80] == 1).sum() == 20
    assert (sources[80:160] == 1).sum() == 0
    assert (sources[160:] == 1).sum() == 120


def test_a_schedule_in_tokens_counts_tokens() -> None:
    mixture = build_mixture(
        config({}, {"weight": 0, "schedule": [{"at": 4096, "weight": 1}]}, unit="tokens"),
        samples_per_step=8,
        sequence_length=64,
    )
    sources = order(mixture, 128)
    assert (sources[:64] == 1).sum() == 0
    assert (sources[64:] == 1).sum() == 32


@settings(max_examples=25, deadline=None)
@given(
    begin=st.lists(st.integers(0, 20), min_size=2, max_size=6).filter(any),
    data=st.data(),
    steps=st.integers(1, 400),
)
def test_a_ramp_follows_its_straight_line(
    begin: list[int], data: st.DataObject, steps: int
) -> None:
    final = data.draw(
        st.lists(st.integers(0, 20), min_size=len(begin), max_size=len(begin)).filter(any)
    )
    mixture = build_mixture(
        config(
            *(
                {"weight": a, "schedule": [{"at": steps, "weight": b, "ramp": True}]}
                for a, b in zip(begin, final, strict=True)
            )
        ),
        samples_per_step=16,
        sequence_length=4,
    )
    length = 16 * steps
    sources = order(mixture, length)
    middle = (np.arange(length) + 0.5) / length
    weights = np.outer(1 - middle, begin) + np.outer(middle, final)
    ideal = np.cumsum(weights / weights.sum(axis=1, keepdims=True), axis=0)
    given_so_far = np.cumsum(np.eye(len(begin), dtype=np.int64)[sources], axis=0)
    assert np.abs(given_so_far - ideal).max() < 3


def test_a_ramp_of_two_sources_ends_at_its_weight() -> None:
    mixture = build_mixture(
        config({"weight": 1}, {"weight": 0, "schedule": [{"at": 1000, "weight": 1, "ramp": True}]}),
        samples_per_step=8,
        sequence_length=4,
    )
    sources = order(mixture, 16_000)
    tenths = [float((part == 1).mean()) for part in np.split(sources[:8000], 10)]
    assert tenths == sorted(tenths)
    assert tenths[0] < 0.06 and 0.46 < tenths[-1] <= 0.5
    assert (sources[8000:] == 1).mean() == 0.5


def test_a_far_position_costs_no_more_than_a_near_one() -> None:
    mixture = build_mixture(
        config({"weight": 0.7}, {"weight": 0.2}, {"weight": 0.1}),
        samples_per_step=512,
        sequence_length=8,
    )

    def seconds(first: int) -> float:
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            mixture.place(np.arange(first, first + 64))
            times.append(time.perf_counter() - begin)
        return min(times)

    assert seconds(10**9) < 10 * seconds(0) + 1e-3
    assert mixture.counts(10**9).tolist() == [7 * 10**8, 2 * 10**8, 10**8]


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        ([{"weight": 0}, {"weight": 0}], "all weights of the mixture are zero at step 0"),
        ([{"schedule": [{"at": 9, "weight": 0}]}], "all weights of the mixture are zero at step 9"),
    ],
)
def test_a_mixture_of_nothing_is_refused(sources: list[dict[str, object]], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build_mixture(config(*sources), samples_per_step=1, sequence_length=1)


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        ({"mixture": []}, "mixture"),
        (
            {"mixture": [{"name": "a", "dataset": "x"}] * 2},
            "names of a mixture's sources must differ",
        ),
        ({"mixture": [{"name": "a", "dataset": "x", "weight": -1}]}, "greater than or equal to 0"),
        (
            {"mixture": [{"name": "a", "dataset": "x", "schedule": [{"at": 5, "weight": 1}] * 2}]},
            r"the points \[5, 5\] must ascend",
        ),
        ({"mixture": [{"name": "a", "dataset": "x", "wieght": 2}]}, "wieght"),
    ],
)
def test_mistakes_in_a_mixture_are_named(tree: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        from_mapping(MixtureConfig, tree)


@pytest.mark.parametrize("packing", ["windows", "best-fit"])
def test_a_mixed_loader_deals_each_source_whole_before_it_repeats(
    three_datasets: dict[str, TokenDataset], packing: str
) -> None:
    mixture = Mixture([Stage(0, (5, 2, 1))])

    def loader(batch_size: int) -> BatchLoader:
        return BatchLoader(
            three_datasets,
            batch_size=batch_size,
            sequence_length=64,
            seed=1,
            packing="windows" if packing == "windows" else "best-fit",
            mixture=mixture,
        )

    whole = loader(4)
    samples = whole.locate(0, 1600)
    for number, source in enumerate(whole.sources):
        rows = samples.rows[samples.sources == number]
        epochs = samples.epochs[samples.sources == number]
        size = source.rows.num_rows
        assert len(rows) == 1600 * mixture.stages[0].counts[number] // 8
        for epoch in range(len(rows) // size):
            assert sorted(rows[epochs == epoch].tolist()) == list(range(size))
    # Cursors carry over to another batch size, and rows come from the right dataset.
    whole.next_sample = 96
    other = loader(12)
    other.load_state(whole.state())
    batch = other.next_batch()
    parts = [whole.next_batch() for _ in range(3)]
    for name in ("tokens", "targets", "positions", "documents"):
        joined = np.concatenate([getattr(part, name).numpy() for part in parts])
        assert (getattr(batch, name).numpy() == joined).all()
    where = other.locate(96, 12)
    for row in range(12):
        source = other.sources[where.sources[row]]
        expected = source.rows.read(where.rows[row : row + 1]).tokens[0]
        assert batch.tokens[row].tolist() == expected.tolist()


def test_cursors_of_another_mixture_are_refused(three_datasets: dict[str, TokenDataset]) -> None:
    def loader(counts: tuple[int, ...]) -> BatchLoader:
        mixture = Mixture([Stage(0, counts)])
        return BatchLoader(
            three_datasets, batch_size=2, sequence_length=64, seed=1, mixture=mixture
        )

    with pytest.raises(DataError, match="mixture_sha256 was"):
        loader((5, 2, 1)).load_state(loader((5, 2, 2)).state())
