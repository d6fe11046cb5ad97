from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest

from minigpt.data.duplicates import NearDuplicates, shingle_hashes

WORDS = [f"word{i}" for i in range(500)]


def words(rng: random.Random, count: int) -> list[str]:
    return rng.choices(WORDS, k=count)


def edited(rng: random.Random, text: list[str], share: float) -> list[str]:
    changed = set(rng.sample(range(len(text)), int(share * len(text))))
    return [rng.choice(WORDS) if i in changed else word for i, word in enumerate(text)]


def jaccard(left: str, right: str) -> float:
    a, b = set(shingle_hashes(left).tolist()), set(shingle_hashes(right).tolist())
    return len(a & b) / len(a | b)


def test_texts_well_above_the_threshold_are_found_and_well_below_kept() -> None:
    rng = random.Random(1)
    index = NearDuplicates(threshold=0.8, permutations=128)
    wrong = 0
    for _ in range(100):
        text = words(rng, 400)
        assert index.add(" ".join(text))
        close, far = edited(rng, text, 0.01), edited(rng, text, 0.10)
        assert jaccard(" ".join(text), " ".join(close)) > 0.88
        assert jaccard(" ".join(text), " ".join(far)) < 0.75
        wrong += index.add(" ".join(close)) + (not index.add(" ".join(far)))
    assert wrong <= 4  # an estimate: its standard error here is about 0.03


def test_short_and_long_texts() -> None:
    index = NearDuplicates(threshold=0.8, permutations=64)
    assert index.add("two words")
    assert not index.add("two words")
    assert index.add("two other")
    long = " ".join(words(random.Random(2), 30_000))
    assert index.add(long)
    assert not index.add(long + " and a little more")


def test_scripts_without_spaces() -> None:
    rng = random.Random(3)
    text = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(600))
    index = NearDuplicates(threshold=0.8, permutations=128)
    assert index.add(text)
    assert not index.add(text[:-10] + "\u3002" * 10)
    assert index.add(text[300:] + text[::-1])


def test_shingles_depend_on_order_and_are_distinct() -> None:
    left = shingle_hashes("a b c d e f")
    assert len(left) == 2
    assert set(left.tolist()).isdisjoint(shingle_hashes("f e d c b a").tolist())
    assert len(shingle_hashes("a " * 100)) == 1
    assert shingle_hashes("").dtype == np.uint32


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_hashes_are_the_same_in_every_process(hash_seed: str) -> None:
    code = (
        "from minigpt.data.duplicates import shingle_hashes\n"
        "print(shingle_hashes('the same text hashes alike everywhere').tolist())"
    )
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    expected = shingle_hashes("the same text hashes alike everywhere").tolist()
    assert result.stdout.strip() == str(expected)
