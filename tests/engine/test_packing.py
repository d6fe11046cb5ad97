from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from minigpt.engine.packing import PackedLinear, pack_weights
from minigpt.model.decoder import Decoder

Logits = Callable[[Decoder, Sequence[int]], torch.Tensor]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_the_products_are_the_same(
    make_model: Callable[..., Any], full_logits: Logits, tied: bool, biases: bool
) -> None:
    def make() -> Decoder:
        model: Decoder = make_model(tie_embeddings=tied, qkv_bias=biases, output_bias=biases)
        return model.bfloat16()

    plain, packed = make(), make()
    pack_weights(packed)
    kinds = [type(module) for module in packed.modules()]
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        assert PackedLinear not in kinds
        return
    assert kinds.count(PackedLinear) == 2 * 7 + 1
    assert torch.nn.Linear not in kinds
    for length in (1, 5, 100):
        tokens = list(range(length))
        torch.testing.assert_close(
            full_logits(packed, tokens), full_logits(plain, tokens), atol=0.02, rtol=0.05
        )


def test_float32_stays(make_model: Callable[..., Any]) -> None:
    model = make_model()
    pack_weights(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
