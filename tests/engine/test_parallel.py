"""Several processes compute one model: the answers are those of one, and none outlives another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest
import torch
from tests.engine import parallel, swapping
from tests.engine.parallel import Answers, answer, ask, largest_difference, serving

from minigpt.api.requests import Request, SamplingParams
from minigpt.core.errors import ConfigError, ModelError, RequestError
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.engine.llm import LLM
from minigpt.engine.parallel import RankError, Ranks
from minigpt.model.config import ModelConfig
from minigpt.model.linear import quantize_module

TOLERANCE = 5e-5
"""Of log-probabilities and embeddings in float32: sums over the ranks round otherwise."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parallel.write_model(tmp_path_factory.mktemp("llama"), *parallel.make_model("llama"))


def mixed() -> list[Request]:
    """Greedy and drawn, several answers, chunked prompts, shared beginnings, what is drafted."""
    words = "the same words again and again, "
    return [
        ask("greedy", "a short prompt"),
        ask("long", "a prompt of several chunks: " + words * 2, max_tokens=30, logprobs=3),
        ask("cached", "a prompt of several chunks: " + words, max_tokens=10),
        ask("several", "x = ", n=3, temperature=0.9, seed=7, top_p=0.95),
        ask("drafted", words * 2, max_tokens=40),
        ask("shaped", "penalties", temperature=0.7, seed=3, repetition_penalty=1.3),
        ask("scores", words * 3, max_tokens=3, prompt_logprobs=2),
        msgspec.structs.replace(
            ask("embedding", words, max_tokens=0, logprobs=None), pooling="mean"
        ),
    ]


def alone(path: Path, requests: list[Request]) -> Answers:
    """Answer by one process."""
    with serving(path) as engine:
        return answer(engine, requests)


@pytest.mark.parametrize("family", parallel.FAMILIES)
def test_answers_are_those_of_one_process(family: str, tmp_path: Path) -> None:
    path = parallel.write_model(tmp_path, *parallel.make_model(family))
    with serving(path, ranks=2) as engine:
        found = answer(engine, mixed())
        again = answer(engine, mixed())  # most of it from the prefix cache
        stats = engine.stats()
        assert '"tensor_parallel_size":2' in engine.ready().engine_config  # what a replay is told
    expected = alone(path, mixed())
    assert largest_difference(found, expected) < TOLERANCE
    assert largest_difference(again, expected) < TOLERANCE
    # Otherwise this would say little.
    assert stats.preemptions > 0
    assert stats.prefix_cache_hits > 0
    assert stats.accepted_tokens > 0


def test_four_ranks_and_a_vocabulary_that_does_not_divide(tmp_path: Path) -> None:
    model, config = parallel.make_model("gpt2", vocab_size=263)
    path = parallel.write_model(tmp_path, model, config)
    with serving(path, ranks=4) as engine:
        found = answer(engine, mixed())
    assert largest_difference(found, alone(path, mixed())) < TOLERANCE


def test_int8_weights_are_cut_too(tmp_path: Path) -> None:
    model, config = parallel.make_model("llama", tie_embeddings=True)
    quantize_module(model)
    path = parallel.write_model(tmp_path, model, config)
    with serving(path, ranks=2) as engine:
        found = answer(engine, mixed())
    assert largest_difference(found, alone(path, mixed())) < TOLERANCE


def test_bfloat16_differs_by_rounding_alone(llama: Path) -> None:
    requests = [ask("scores", "a text whose tokens are scored", max_tokens=0, prompt_logprobs=0)]
    with serving(llama, ranks=2, dtype="bfloat16") as engine:
        (found,) = answer(engine, requests).values()
    (expected,) = alone(llama, requests).values()
    apart = torch.tensor(found.prompt_logprobs) - torch.tensor(expected.prompt_logprobs)
    assert 0 < apart.abs().max() < 0.5  # of logits up to 30


def test_a_draft_model_drafts_on_rank_0(tmp_path: Path, llama: Path) -> None:
    small, shape = parallel.make_model("llama", num_layers=1)
    draft = parallel.write_model(tmp_path, small, shape)
    speculative = {"method": "draft", "draft_model": str(draft)}
    requests = [ask("one", "some text"), ask("two", "another", n=2, temperature=0.8, seed=1)]
    with serving(llama, ranks=2, num_blocks=128, speculative=speculative) as engine:
        found = answer(engine, requests)
        assert engine.stats().drafted_tokens > 0
    assert largest_difference(found, alone(llama, requests)) < TOLERANCE


def test_a_failure_stays_with_its_request(tmp_path: Path) -> None:
    """Also that of a prompt's scores, in whose midst the ranks meet for each 32 positions."""
    model, config = parallel.make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[ord("#")] = torch.nan
    path = parallel.write_model(tmp_path, model, config)
    poisoned = "#" + "long enough for several projections " * 2
    requests = [
        ask("sound", "a prompt", max_tokens=30),
        ask("scores", poisoned, prompt_logprobs=0),
        ask("tokens", "some # text"),
        ask("also sound", "another prompt", prompt_logprobs=0),
    ]
    with serving(path, ranks=2, max_batched_tokens=128) as engine:
        found = answer(engine, requests)
        assert [found[name, 0].finish_reason for name in ("scores", "tokens")] == ["error"] * 2
        sound = [request for request in requests if "sound" in request.id]
        expected = alone(path, sound)
        kept = {key: one for key, one in found.items() if key in expected}
        assert largest_difference(kept, expected) < TOLERANCE
        assert largest_difference(answer(engine, sound), expected) < TOLERANCE


def test_weights_are_swapped_on_all_ranks(tmp_path: Path, llama: Path) -> None:
    other = parallel.write_model(tmp_path / "other", *parallel.make_model("llama", seed=1))
    requests = [ask("one", "some text"), ask("two", "another text", prompt_logprobs=0)]
    with serving(llama, ranks=2) as engine:
        running: Answers = {}
        engine.add(ask("running", "begun on the old weights", max_tokens=60))
        swapped = engine.swap(other)
        while not swapped.done():
            for delta in engine.step():
                running.setdefault((delta.request_id, 0), parallel.Answer()).extend(delta)
        assert swapped.result().model_id == engine.ready().model_id
        found = answer(engine, requests)  # with what is left of the running one
        running.setdefault(("running", 0), parallel.Answer())
        rest = found.pop(("running", 0), parallel.Answer())
        running["running", 0].token_ids += rest.token_ids
        back = engine.swap(llama)
        while not back.done():
            engine.step()
        again = answer(engine, requests)
    assert largest_difference(found, alone(other, requests)) < TOLERANCE
    assert largest_difference(again, alone(llama, requests)) < TOLERANCE
    old = alone(llama, [ask("running", "begun on the old weights", max_tokens=60)])
    assert running["running", 0].token_ids == old["running", 0].token_ids


def test_a_refused_swap_changes_nothing(tmp_path: Path, llama: Path) -> None:
    other = parallel.write_model(tmp_path, *parallel.make_model("llama", seed=1))
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with serving(llama, ranks=2) as engine:
        swapped = engine.swap(other)
        while not swapped.done():
            engine.step()
        assert isinstance(swapped.exception(), ModelError)
        found = answer(engine, [ask("one", "text")])
    assert largest_difference(found, alone(llama, [ask("one", "text")])) < TOLERANCE


def test_a_swap_that_one_rank_refuses_changes_nothing(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 has loaded its part when rank 1 finds no file."""
    other = parallel.write_model(tmp_path, *parallel.make_model("llama", seed=1))
    load = Ranks.load
    with serving(llama, ranks=2) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(Ranks, "load", lambda ranks, path: load(ranks, path / "absent"))
            swapped = engine.swap(other)
            while not swapped.done():
                engine.step()
        with pytest.raises(ModelError, match=r"rank 1: no model at .*absent"):
            swapped.result()
        found = answer(engine, [ask("one", "text")])
        assert largest_difference(found, alone(llama, [ask("one", "text")])) < TOLERANCE
        swapped = engine.swap(other)
        while not swapped.done():
            engine.step()
        found = answer(engine, [ask("one", "text")])
    assert largest_difference(found, alone(other, [ask("one", "text")])) < TOLERANCE


def test_adapters_are_cut_as_what_they_adapt(tmp_path: Path, llama: Path) -> None:
    targets = {"attention": ("q_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "down_proj")}
    requests = [
        ask("plain", "some text"),
        ask("a", "some text", adapter="attention", prompt_logprobs=0),
        ask("m", "some text", adapter="mlp"),
    ]

    def answers(ranks: int) -> Answers:
        with serving(llama, ranks) as engine:
            for seed, (name, its) in enumerate(targets.items()):
                path = tmp_path / f"{name}-{ranks}"
                engine.load_adapter(name, swapping.make_adapter(llama, path, seed, *its))
            found = answer(engine, requests)
            engine.unload_adapter("mlp")
            with pytest.raises(RequestError, match="not loaded"):
                engine.add(requests[2])
            return found

    found = answers(ranks=2)
    assert largest_difference(found, answers(ranks=1)) < TOLERANCE
    assert len({tuple(one.token_ids) for one in found.values()}) == 3


def test_what_cannot_be_cut_is_refused(llama: Path) -> None:
    for ranks, reason in (
        (4, r"tensor_parallel_size = 4: .* its num_kv_heads = 2 \(one of 1, 2\)"),
        (3, "num_heads = 4, num_kv_heads = 2, intermediate_size = 64"),
    ):
        with pytest.raises(ConfigError, match=reason):
            Engine.load(llama, EngineConfig(tensor_parallel_size=ranks))


def test_a_rank_that_cannot_load_says_why(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 sees the weights, rank 1 another file: as on a disk that fails."""
    start = Ranks.start

    def elsewhere(config: EngineConfig, model: ModelConfig, path: Path) -> Ranks:
        return start(config, model, path / "absent")

    monkeypatch.setattr(Ranks, "start", elsewhere)
    with pytest.raises(ModelError, match=r"rank 1: no model at .*absent"), serving(llama, ranks=2):
        pass
    assert not workers()


def workers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if "minigpt.engine.parallel_worker" in child.cmdline()
    ]


@pytest.mark.parametrize("moment", ["idle", "in a step"])
def test_the_engine_fails_with_a_rank(moment: str, llama: Path) -> None:
    with serving(llama, ranks=2) as engine:
        (worker,) = workers()
        engine.add(ask("one", "text", max_tokens=100))
        engine.step()
        if moment == "idle":
            engine.abort("one")
            while engine.has_work:
                engine.step()
        worker.kill()
        began = time.monotonic()
        while not engine.has_work:
            assert time.monotonic() - began < 10
            time.sleep(0.01)
        with pytest.raises(RankError, match="rank 1 was killed by SIGKILL"):
            while True:
                engine.step()
        assert time.monotonic() - began < 10
        with pytest.raises(RankError):
            engine.step()
    assert not workers()


def test_a_silent_rank_is_not_waited_for_for_ever(llama: Path) -> None:
    with serving(llama, ranks=2, tensor_parallel_timeout_seconds=3) as engine:
        (worker,) = workers()
        engine.add(ask("one", "text", max_tokens=100))
        engine.step()
        worker.suspend()
        began = time.monotonic()
        with pytest.raises(RankError, match="lost"):
            while True:
                engine.step()
        assert time.monotonic() - began < 30
    assert not workers()


def test_the_ranks_end_with_rank_0(llama: Path) -> None:
    """Killed at any moment, even while a rank is stopped."""
    code = (
        "import sys; from minigpt.engine.config import EngineConfig; "
        "from minigpt.engine.engine import Engine; "
        "engine = Engine.load(sys.argv[1], EngineConfig(dtype='float32', device='cpu', threads=1,"
        " tensor_parallel_size=2)); print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(llama)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert b"ready\n" in iter(process.stdout.readline, b"")
        (worker,) = psutil.Process(process.pid).children()
        worker.suspend()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs([worker], timeout=10)
    assert not alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_llm(llama: Path) -> None:
    config = EngineConfig(device="cpu", dtype="float32", threads=1, tensor_parallel_size=2)
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    with LLM(llama, config.replace(tensor_parallel_size=1)) as llm:
        expected = [c.answers[0].token_ids for c in llm.generate(["some text", "more"], params)]
    with LLM(llama, config) as llm:
        found = [c.answers[0].token_ids for c in llm.generate(["some text", "more"], params)]
        assert found == expected
        (worker,) = workers()
        worker.kill()
        with pytest.raises(RequestError, match="killed by SIGKILL"):
            llm.generate("some text", params)
    assert not workers()
