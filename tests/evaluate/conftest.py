"""A tiny random decoder, made anew for each module that asks."""

from __future__ import annotations

import pytest
import torch

from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder

VOCAB = 50
EOS = 0


def make_decoder(**changes: object) -> Decoder:
    config = ModelConfig(
        vocab_size=VOCAB, num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8,
        intermediate_size=48, context_length=16, eos_token_id=EOS,
    ).replace(**changes)  # fmt: skip
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(1))
    return model.eval()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder()
