from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt.data.shards import TokenDataset
from minigpt.data.tokenizer import Tokenizer
from minigpt.model.decoder import Decoder
from minigpt.train.config import ValidationConfig
from minigpt.train.validation import Validator, choose_documents


@pytest.fixture
def dataset(tiny_dataset: Path) -> TokenDataset:
    return TokenDataset.open(tiny_dataset, "val")


def _validator(dataset: TokenDataset, **changes: object) -> Validator:
    config = ValidationConfig.model_validate({"tokens": 3000, "sample_tokens": 12} | changes)
    tokenizer = Tokenizer.load(dataset.tokenizer_dir)
    return Validator(dataset, tokenizer, config, context_length=64, dtype="float32", seed=0)


def test_documents_are_drawn_whole_and_up_to_the_limit(dataset: TokenDataset) -> None:
    chosen = choose_documents(dataset, 3000, seed=1)
    assert sum(map(len, chosen)) == 3000
    stored = {dataset.document(i).tobytes() for i in range(dataset.num_documents)}
    assert all(document.tobytes() in stored for document in chosen[:-1])
    again = choose_documents(dataset, 3000, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(chosen, again, strict=True))
    everything = choose_documents(dataset, 10**9, seed=1)
    assert sum(map(len, everything)) == dataset.num_tokens


def test_a_model_without_a_clue_needs_eight_bits_a_byte(
    dataset: TokenDataset, small_decoder: Decoder
) -> None:
    with torch.no_grad():
        small_decoder.output_weight.zero_()
    result = _validator(dataset).score(small_decoder)
    assert result is not None
    assert result.bits_per_byte == pytest.approx(math.log2(257), rel=1e-6)
    assert result.loss == pytest.approx(math.log(257), rel=1e-6)


def test_neither_scoring_nor_sampling_touches_the_global_generator(
    dataset: TokenDataset, small_decoder: Decoder
) -> None:
    validator = _validator(dataset, sample_prompt="the ")
    before = torch.get_rng_state()
    validator.score(small_decoder)
    first = validator.sample(small_decoder, step=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.startswith("the ")
    assert validator.sample(small_decoder, step=3) == first
    assert validator.sample(small_decoder, step=4) != first


def test_nothing_held_out_gives_no_score(dataset: TokenDataset, small_decoder: Decoder) -> None:
    validator = _validator(dataset, tokens=1)
    assert validator.num_tokens == 0
    assert validator.score(small_decoder) is None
