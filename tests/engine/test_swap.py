"""Weights are swapped under running sequences: who began on the old ones finishes on them."""

from __future__ import annotations

import gc
import json
import struct
import weakref
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.swapping import Answers, config, fresh, make_adapter, other_model, request

from minigpt.api.requests import SamplingParams
from minigpt.core.errors import MinigptError, ModelError
from minigpt.engine.engine import Engine
from minigpt.engine.llm import LLM
from minigpt.engine.runner import ModelRunner
from minigpt.kernels import library
from minigpt.model.linear import quantize_module
from minigpt.model.weights import load_model, save_model

PROMPTS = {f"p{number}": f"The old river {number} followed" for number in range(4)}


@pytest.fixture(scope="module")
def other(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return other_model(tiny_model, tmp_path_factory.mktemp("other") / "model", seed=1)


def test_answers_before_during_and_after_are_those_of_fresh_engines(
    tiny_model: Path, other: Path
) -> None:
    old, new = fresh(tiny_model, PROMPTS), fresh(other, PROMPTS)
    assert all(old[name] != new[name] for name in PROMPTS)
    engine = Engine.load(tiny_model, config(max_num_seqs=16))
    first = engine.ready().model_id
    runner = engine._weights.runner
    assert isinstance(runner, ModelRunner)
    embedding = weakref.ref(runner._model.model.embed_tokens.weight)
    del runner
    gc.collect()
    gc.freeze()  # as the engine process does: from now on reference counts alone free it
    found = Answers(engine)
    for name, prompt in PROMPTS.items():
        engine.add(request(f"old-{name}", prompt))
    found.until(lambda: len(found.tokens.get("old-p3", [])) >= 1)
    swap = engine.swap(other)
    with pytest.raises(ModelError, match="another swap is under way"):
        engine.swap(other)
    # The old ones have not ended when the new come in: both run in the same steps.
    for name, prompt in PROMPTS.items():
        engine.add(request(f"long-{name}", prompt, tokens=400))
    found.until(swap.done)
    assert swap.result().model_id == engine.ready().model_id != first
    for name, prompt in PROMPTS.items():
        engine.add(request(f"new-{name}", prompt))
    found.step()
    assert len(engine._weights._held) == 2
    found.finish()
    for name in PROMPTS:
        assert found.tokens[f"old-{name}"] == old[name]
        assert found.tokens[f"long-{name}"][:24] == old[name]
        assert found.tokens[f"new-{name}"] == new[name], "prefix cache of the old weights was used"
        assert found.weights[f"old-{name}"] == found.weights[f"long-{name}"] == first
        assert found.weights[f"new-{name}"] == swap.result().model_id
    gc.unfreeze()
    assert embedding() is None, "the old weights are still in memory"
    # And back, where the old weights' blocks may still be in the cache.
    back = engine.swap(tiny_model)
    found.until(back.done)
    engine.add(request("back", PROMPTS["p0"]))
    assert found.finish()["back"] == old["p0"]
    assert engine.ready().model_id == first


@pytest.mark.skipif(library.loaded() is None, reason="no kernels here")
@pytest.mark.parametrize("quantized", [False, True])
def test_the_kernels_swap_too(
    tiny_model: Path, other: Path, tmp_path: Path, quantized: bool
) -> None:
    """The bits of the kernels' answers don't depend on the batch, so that they can be compared."""
    if quantized:
        loaded = load_model(other)
        quantize_module(loaded.model, group_size=32)
        other = tmp_path / "int4"
        save_model(other, loaded.model, loaded.config, tokenizer_dir=tiny_model)
    settings: dict[str, Any] = {"dtype": "bfloat16", "block_size": 16}
    old, new = (fresh(path, PROMPTS, **settings) for path in (tiny_model, other))
    engine = Engine.load(tiny_model, config(**settings))
    assert engine._weights.runner.adapters is None, "torch serves: nothing is shown of the kernels"
    packed = weakref.ref(engine._weights.runner)
    found = Answers(engine)
    for name, prompt in PROMPTS.items():
        engine.add(request(f"old-{name}", prompt))
    found.step()
    found.until(engine.swap(other).done)
    for name, prompt in PROMPTS.items():
        engine.add(request(f"new-{name}", prompt))
    found.finish()
    for name in PROMPTS:
        assert found.tokens[f"old-{name}"] == old[name]
        assert found.tokens[f"new-{name}"] == new[name]
    assert packed() is None, "the old weights are still in memory"
    adapter = make_adapter(tiny_model, tmp_path / "adapter", 0)
    with pytest.raises(ModelError, match=r"start with engine\.adapters=true"):
        engine.load_adapter("a", adapter)
    engine = Engine.load(tiny_model, config(**settings, adapters=True))
    assert list(engine.load_adapter("a", adapter).adapters) == ["a"]


def test_a_preempted_sequence_is_computed_anew_on_its_own_weights(
    tiny_model: Path, other: Path
) -> None:
    old, new = fresh(tiny_model, PROMPTS, 60), fresh(other, PROMPTS, 60)
    per_block = 2 * 2 * 2 * 16 * 4 * 4
    engine = Engine.load(
        tiny_model, config(context_length=100, kv_cache_bytes=per_block * 36, max_num_seqs=8)
    )
    found = Answers(engine)
    names = list(PROMPTS)
    for name in names[:2]:
        engine.add(request(name, PROMPTS[name], 60))
    found.step()
    found.until(engine.swap(other).done)
    for name in names[2:]:
        engine.add(request(name, PROMPTS[name], 60))
    found.finish()
    assert engine.stats().preemptions > 0
    assert [found.tokens[name] for name in names] == [old[n] for n in names[:2]] + [
        new[n] for n in names[2:]
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, "vocab_size = 300, the served model 257"),
        ({"num_layers": 3}, "num_layers = 3, the served model 2"),
        ({"num_kv_heads": 4}, "num_kv_heads = 4"),
        ({"context_length": 100}, "a context of 100 tokens, the engine serves 512"),
        ({"eos_token_id": 10}, "ends a text by the tokens"),
    ],
)
def test_what_cannot_take_the_place_is_refused(
    tiny_model: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    engine = Engine.load(tiny_model, config())
    refused(engine, other_model(tiny_model, tmp_path / "model", 1, **changes), message)


def refused(engine: Engine, path: Path, message: str) -> None:
    """A swap that fails leaves everything as it was."""
    before, found = engine.ready(), Answers(engine)
    swap = engine.swap(path)
    found.until(swap.done)
    with pytest.raises(MinigptError, match=message):
        swap.result()
    assert engine.ready() == before
    engine.add(request("after", "hello", 3))
    assert len(found.finish()["after"]) == 3


def test_another_tokenizer_a_missing_model_and_a_corrupt_one_are_refused(
    tiny_model: Path, other: Path, tmp_path: Path
) -> None:
    import shutil

    engine = Engine.load(tiny_model, config())
    refused(engine, tmp_path / "nowhere", "no model at")
    strange = shutil.copytree(other, tmp_path / "strange")
    tree = json.loads((strange / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    first, second = list(vocabulary)[65:67]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (strange / "tokenizer.json").write_text(json.dumps(tree))
    refused(engine, strange, "another tokenizer")
    corrupt = shutil.copytree(tiny_model, tmp_path / "corrupt")
    file = corrupt / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(engine, corrupt, "is corrupt")


def test_weights_that_do_not_fit_beside_the_served_ones_are_refused_with_the_shortfall(
    tiny_model: Path, tmp_path: Path
) -> None:
    """A terabyte of weights, in a file that has holes instead of tensors."""
    import shutil

    huge = shutil.copytree(tiny_model, tmp_path / "huge")
    (huge / "manifest.json").unlink()
    rows = 1 << 31
    tree = json.loads((huge / "config.json").read_text())
    tree["intermediate_size"] = rows
    (huge / "config.json").write_text(json.dumps(tree))
    size = rows * 64 * 4
    header = {"x": {"dtype": "F32", "shape": [rows, 64], "data_offsets": [0, size]}}
    encoded = json.dumps(header).encode()
    with (huge / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + size)
    engine = Engine.load(tiny_model, config())
    swap = engine.swap(huge)
    Answers(engine).until(swap.done)
    error = swap.exception()
    assert isinstance(error, ModelError)
    words = str(error).split()
    needed, free = int(words[words.index("takes") + 1]), int(words[words.index("are") - 1])
    assert needed == size
    assert f"short by {needed - free} bytes" in str(error)


Operation = tuple[str, int]
"""add, step, swap, load, unload or abort; and which model, adapter or request."""


@pytest.fixture(scope="module")
def world(
    tiny_model: Path, other: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Path], list[Path], dict[tuple[int, int | None], list[int]]]:
    """Two models, two adapters, and what each pair of them answers."""
    root = tmp_path_factory.mktemp("world")
    models = [tiny_model, other]
    adapters = [make_adapter(tiny_model, root / str(seed), seed) for seed in range(2)]
    expected: dict[tuple[int, int | None], list[int]] = {}
    for number, model in enumerate(models):
        engine = Engine.load(model, config())
        for index, path in enumerate(adapters):
            engine.load_adapter(str(index), path)
        for name in (None, 0, 1):
            found = Answers(engine)
            adapter = None if name is None else str(name)
            engine.add(request("r", PROMPTS["p0"], 12, adapter))
            expected[number, name] = found.finish()["r"]
    assert len({tuple(tokens) for tokens in expected.values()}) == 6
    return models, adapters, expected


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "step", "step", "swap", "load", "unload", "abort"]),
            st.integers(0, 3),
        ),
        max_size=24,
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_swapped_loaded_and_dropped_each_answer_is_its_own(
    world: tuple[list[Path], list[Path], dict[tuple[int, int | None], list[int]]],
    operations: list[Operation],
) -> None:
    models, adapters, expected = world
    engine = Engine.load(models[0], config(max_num_seqs=4, max_batched_tokens=24))
    found = Answers(engine)
    current, loaded = 0, dict[int, set[int]]({0: set(), 1: set()})
    asked: dict[str, tuple[int, int | None]] = {}
    for number, (kind, which) in enumerate(operations):
        names = loaded[current]
        if kind == "add":
            name = which if which in names else None
            asked[f"r{number}"] = current, name
            adapter = None if name is None else str(name)
            engine.add(request(f"r{number}", PROMPTS["p0"], 12, adapter))
        elif kind == "step":
            found.step()
        elif kind == "swap" and current != which % 2:
            found.until(engine.swap(models[which % 2]).done)
            # The adapters of weights that nothing holds any more are gone with them.
            current = which % 2
            loaded[current] = {int(name) for name in engine.ready().adapters}
        elif kind == "load" and which < 2 and which not in names:
            engine.load_adapter(str(which), adapters[which])
            names.add(which)
        elif kind == "unload" and which in names:
            engine.unload_adapter(str(which))
            names.remove(which)
        elif kind == "abort" and asked:
            victim = list(asked)[which % len(asked)]
            engine.abort(victim)
            del asked[victim]
    found.finish()
    for answered, pair in asked.items():
        assert found.tokens[answered] == expected[pair], (answered, pair)
    held = engine._weights._held
    assert list(held) == [engine.ready().model_id]
    assert held[engine.ready().model_id].resident == set(engine.ready().adapters.values())


def test_llm_swaps(tiny_model: Path, other: Path) -> None:
    params = SamplingParams(max_tokens=8, temperature=0)
    with LLM(tiny_model, config()) as llm:
        before = llm.generate("hello", params)[0].text
        assert llm.swap(other) == load_model(other).id
        after = llm.generate("hello", params)[0].text
        with pytest.raises(ModelError, match="no model at"):
            llm.swap("nowhere")
    with LLM(other, config()) as llm:
        assert llm.generate("hello", params)[0].text == after != before
