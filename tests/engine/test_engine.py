from __future__ import annotations

import codecs
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from minigpt.api.requests import Request, SamplingParams, StructuredOutput
from minigpt.core.clock import ManualClock
from minigpt.core.errors import RequestError
from minigpt.engine.engine import Engine
from minigpt.model.decoder import Decoder

Make = Callable[..., Any]
FAMILIES: dict[str, dict[str, object]] = {
    "qwen3": {},
    "gpt2": {
        "norm": "layernorm", "position": "learned", "mlp": "gelu", "qkv_bias": True,
        "output_bias": True, "qk_norm": False, "num_kv_heads": 4,
    },
    "mistral": {"qk_norm": False, "sliding_window": 9},
    "qwen3-moe": {"num_experts": 6, "experts_per_token": 2, "expert_intermediate_size": 24},
}  # fmt: skip


def _prompt(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1, 256) for _ in range(length)]


def _request(name: str, prompt: list[int], n: int = 1, **sampling: Any) -> Request:
    params = SamplingParams(**({"ignore_eos": True} | sampling))
    return Request(id=name, prompt_token_ids=prompt, n=n, sampling=params)


def _greedy(full_logits: Make, model: Decoder, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(full_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("num_blocks", "block_size", "budget", "preempts"),
    [(200, 4, 64, False), (33, 4, 9, True), (130, 1, 8, True), (40, 16, 16, False)],
)
def test_greedy_equals_full_forward(
    make_model: Make,
    make_engine: Make,
    run: Make,
    full_logits: Make,
    family: str,
    num_blocks: int,
    block_size: int,
    budget: int,
    preempts: bool,
) -> None:
    """Token for token, whatever the batching, chunking and preemption."""
    model = make_model(**FAMILIES[family])
    engine = make_engine(
        model, num_blocks=num_blocks, block_size=block_size, max_batched_tokens=budget
    )
    prompts = [_prompt(length, length) for length in (1, 3, 8, 17, 40, 2, 60, 33)]
    requests = [
        _request(str(i), prompt, temperature=0, max_tokens=24) for i, prompt in enumerate(prompts)
    ]
    answers = run(engine, *requests)
    assert (engine.stats().preemptions > 0) == preempts
    for i, prompt in enumerate(prompts):
        assert answers[str(i), 0].token_ids == _greedy(full_logits, model, prompt, 24)
        assert answers[str(i), 0].finish_reason == "length"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_blocks", [200, 34])
def test_cached_prefixes_and_forks_equal_full_forward(
    make_model: Make, make_engine: Make, run: Make, full_logits: Make, family: str, num_blocks: int
) -> None:
    """Shared beginnings, several answers, a second turn, with room or with evictions."""
    model = make_model(**FAMILIES[family])
    engine = make_engine(model, num_blocks=num_blocks, max_batched_tokens=24)
    system = _prompt(42, 0)
    prompts = [system + _prompt(length, length) for length in (1, 9, 0, 2, 30)]
    for _ in range(2):
        requests = [
            _request(str(i), prompt, n=1 + i % 3, temperature=0, max_tokens=14)
            for i, prompt in enumerate(prompts)
        ]
        answers = run(engine, *requests)
        for (name, _), answer in answers.items():
            prompt = prompts[int(name)]
            assert answer.token_ids == _greedy(full_logits, model, prompt, 14)
        prompts = [prompt + answers[str(i), 0].token_ids + [7] for i, prompt in enumerate(prompts)]
    stats = engine.stats()
    assert 0 < stats.prefix_cache_hits < stats.prefix_cache_queries
    if num_blocks == 200:
        assert stats.prefix_cache_hits > 0.7 * stats.prefix_cache_queries


def test_without_prefix_cache_nothing_is_found(
    make_model: Make, make_engine: Make, run: Make
) -> None:
    engine = make_engine(make_model(), prefix_cache=False)
    for _ in range(2):
        run(engine, _request("r", _prompt(40, 0), max_tokens=3))
    assert engine.stats().prefix_cache_hits == 0
    cached = make_engine(make_model())
    for _ in range(2):
        run(cached, _request("r", _prompt(40, 0), max_tokens=3))
    assert cached.stats().prefix_cache_hits == 36


def test_a_failure_takes_what_it_computed_out_of_the_cache(
    make_model: Make, make_engine: Make, run: Make
) -> None:
    """A sequence that fails shares blocks with one that runs: that one is not harmed."""
    model = make_model()
    shared = _prompt(24, 0)
    good = _request("good", [*shared, 3, 4], temperature=0, max_tokens=12)
    expected = run(make_engine(model), good)["good", 0].token_ids
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = float("nan")
    engine = make_engine(model, num_blocks=40)
    for _ in range(2):
        bad = _request("bad", shared + [0] * 9, temperature=0, max_tokens=5)
        answers = run(engine, good, bad)
        assert answers["bad", 0].finish_reason == "error"
        assert answers["good", 0].token_ids == expected


def test_tenants_and_priorities_reach_the_scheduler(make_model: Make, make_engine: Make) -> None:
    engine = make_engine(make_model(), max_num_seqs=1, tenant_weights={"b": 4.0})
    for name, priority, tenant in (("a1", 5, "a"), ("a2", 0, "a"), ("b1", 0, "b")):
        sampling = SamplingParams(max_tokens=2, ignore_eos=True)
        prompt = _prompt(9, len(name) + priority)
        engine.add(
            Request(
                id=name, prompt_token_ids=prompt, sampling=sampling, priority=priority,
                tenant=tenant,
            )
        )  # fmt: skip
    finished = [d.request_id for _ in range(9) for d in engine.step() if d.finish_reason]
    assert finished == ["a2", "b1", "a1"]


def test_seeded_answers_do_not_depend_on_the_batch(
    make_model: Make, make_engine: Make, run: Make
) -> None:
    model = make_model()
    request = _request("it", _prompt(20, 1), n=3, seed=42, temperature=1.2, max_tokens=25)
    alone = run(make_engine(model), request)
    others = [
        _request(str(i), _prompt(5 * i, i), n=2, temperature=0.9, top_p=0.8, max_tokens=30)
        for i in range(1, 6)
    ]
    crowded = make_engine(model, num_blocks=33, max_batched_tokens=9)
    together = run(crowded, *others[:3], request, *others[3:])
    assert crowded.stats().preemptions > 0
    for index in range(3):
        assert together["it", index].token_ids == alone["it", index].token_ids
    assert len({tuple(alone["it", index].token_ids) for index in range(3)}) == 3


def test_unseeded_answers_differ_and_repeat_with_the_engines_seed(
    make_model: Make, make_engine: Make, run: Make
) -> None:
    def answer(seed: int | None) -> list[list[int]]:
        engine = make_engine(make_model(), seed=seed)
        requests = [_request(name, [5, 6, 7], max_tokens=20) for name in "ab"]
        return [found.token_ids for found in run(engine, *requests).values()]

    first, again, other = answer(1), answer(1), answer(2)
    assert first == again
    assert first != other
    assert first[0] != first[1]
    assert answer(None) != answer(None)


def test_logprobs_equal_the_full_forward(
    make_model: Make, make_engine: Make, run: Make, full_logits: Make
) -> None:
    model = make_model()
    engine = make_engine(model, max_batched_tokens=9)
    prompts = [_prompt(length, length) for length in (4, 19, 30)]
    requests = [
        _request(str(i), prompt, seed=i, max_tokens=12, logprobs=5, temperature=0.8)
        for i, prompt in enumerate(prompts)
    ]
    answers = run(engine, *requests)
    for i, prompt in enumerate(prompts):
        answer = answers[str(i), 0]
        logprobs = full_logits(model, prompt + answer.token_ids).log_softmax(-1)
        reported = [entry for delta in answer.deltas for entry in delta.logprobs or []]
        assert [entry.token_id for entry in reported] == answer.token_ids
        for position, entry in enumerate(reported, start=len(prompt) - 1):
            assert entry.logprob == pytest.approx(
                logprobs[position, entry.token_id].item(), abs=1e-4
            )
            best = logprobs[position].topk(5)
            assert [token for token, _, _ in entry.top] == best.indices.tolist()
            assert [value for _, _, value in entry.top] == pytest.approx(
                best.values.tolist(), abs=1e-4
            )
            assert entry.token == bytes([entry.token_id] if entry.token_id < 256 else []).decode(
                "utf-8", "replace"
            )


def test_decode_goes_on_in_every_step_of_a_long_prefill(
    make_model: Make, make_engine: Make
) -> None:
    engine = make_engine(make_model(), max_num_seqs=4)
    engine.add(_request("stream", [1, 2, 3], max_tokens=30))
    engine.step()
    engine.add(_request("long", _prompt(100, 0), max_tokens=2))
    for _ in range(6):
        assert [delta.request_id for delta in engine.step()] == ["stream"]
        assert engine.stats().last_step_prefill_tokens == 15
        assert engine.stats().last_step_decode_tokens == 1
    assert {delta.request_id for delta in engine.step()} == {"stream", "long"}


class Script(Decoder):
    """A real decoder with a bias towards saying `text` from position `start` on."""

    def __init__(self, base: Decoder, text: bytes, start: int) -> None:
        super().__init__(base.config)
        self.load_state_dict(base.state_dict())
        self._said = list(text)
        self._start = start

    def forward(self, *inputs: Any, **options: Any) -> Any:
        hidden = super().forward(*inputs, **options)
        hidden[..., 0] = inputs[1].float()
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().logits(hidden)
        for row, position in enumerate(hidden[..., 0].long().tolist()):
            spoken = position - self._start + 1
            if 0 <= spoken < len(self._said):
                logits[row, self._said[spoken]] = 1e4
        return logits


def _say(make_model: Make, text: bytes, prompt: list[int]) -> Decoder:
    return Script(make_model(), text, len(prompt)).eval()


def test_stop_strings_end_the_answer_and_stay_out_of_it(
    make_model: Make, make_engine: Make, run: Make
) -> None:
    model = _say(make_model, "one twö END three".encode(), [1, 2])
    request = _request(
        "r", [1, 2], temperature=0, max_tokens=30, stop=("E!", " END", "three"), logprobs=0
    )
    answer = run(make_engine(model), request)["r", 0]
    assert answer.text == "one twö"
    assert answer.finish_reason == "stop"
    assert bytes(answer.token_ids) == "one twö END".encode()
    assert [delta.text for delta in answer.deltas[-4:]] == [""] * 4, "held back until certain"


def test_characters_are_never_cut(make_model: Make, make_engine: Make, run: Make) -> None:
    text = "héllo 😀 end"
    model = _say(make_model, text.encode(), [1])
    count = len(text.encode())
    answer = run(make_engine(model), _request("r", [1], temperature=0, max_tokens=count))["r", 0]
    assert answer.text == text
    cut = run(make_engine(model), _request("r", [1], temperature=0, max_tokens=9))["r", 0]
    assert cut.text == "héllo \ufffd"
    assert all("\ufffd" not in delta.text for delta in cut.deltas[:-1])


@pytest.mark.parametrize(
    ("sampling", "text", "reason"),
    [
        ({"ignore_eos": False}, "ab", "stop"),
        ({"ignore_eos": True, "max_tokens": 5}, "abcd", "length"),
        ({"ignore_eos": True, "stop_token_ids": (99,)}, "ab", "stop"),
        ({"ignore_eos": True, "stop_token_ids": (256,)}, "ab", "stop"),
        ({"ignore_eos": False, "max_tokens": 3}, "ab", "stop"),
    ],
)
def test_ends(
    make_model: Make, make_engine: Make, run: Make, sampling: Any, text: str, reason: str
) -> None:
    model = make_model()
    said = [97, 98, 256, 99, 100] if 99 not in sampling.get("stop_token_ids", ()) else [97, 98, 99]
    scripted = Script(model, b"", 1).eval()
    scripted._said = said
    request = _request("r", [1], temperature=0, **({"max_tokens": 20} | sampling))
    answer = run(make_engine(scripted), request)["r", 0]
    assert (answer.text, answer.finish_reason) == (text, reason)
    assert answer.token_ids == said[: len(answer.token_ids)]
    if reason == "stop":
        assert answer.token_ids[-1] in (256, 99)


def test_tokens_beyond_the_tokenizer_spell_nothing(
    make_model: Make, make_engine: Make, run: Make
) -> None:
    scripted = Script(make_model(), b"", 1).eval()
    scripted._said = [97, 258, 98]
    request = _request("r", [1], temperature=0, max_tokens=3, logprobs=3)
    answer = run(make_engine(scripted), request)["r", 0]
    assert answer.text == "ab"


def test_abort_at_every_stage(make_model: Make, make_engine: Make) -> None:
    engine = make_engine(make_model(), max_num_seqs=2, num_blocks=70)
    engine.add(_request("decoding", [1, 2, 3], n=1, max_tokens=50))
    engine.step()
    engine.add(_request("prefilling", _prompt(90, 0), n=2, max_tokens=5))
    engine.step()
    engine.add(_request("waiting", [1], max_tokens=5))
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (2, 2)
    for name in ("waiting", "prefilling", "decoding", "unknown", "decoding"):
        engine.abort(name)
    assert engine.stats().kv_blocks_used == 0
    assert engine.has_work
    deltas = engine.step()
    assert {(d.request_id, d.index, d.finish_reason) for d in deltas} == {
        ("decoding", 0, "abort"),
        ("prefilling", 0, "abort"),
        ("prefilling", 1, "abort"),
        ("waiting", 0, "abort"),
    }
    assert not engine.has_work
    assert engine.step() == []
    engine.add(_request("decoding", [1], max_tokens=1))
    assert [d.finish_reason for d in engine.step()] == ["length"]


def test_one_bad_request_does_not_touch_the_others(
    make_model: Make, make_engine: Make, run: Make
) -> None:
    """NaNs of one sequence reach neither its neighbours nor those who inherit its blocks."""
    model = make_model()
    good = [_request(str(i), _prompt(6, i), temperature=0, max_tokens=12) for i in range(4)]
    expected = {key: a.token_ids for key, a in run(make_engine(model), *good).items()}
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = float("nan")
    engine = make_engine(model, num_blocks=32, max_num_seqs=3)
    bad = _request("bad", [0] * 10, temperature=0, max_tokens=5)
    answers = run(engine, good[0], bad, *good[1:])
    assert answers["bad", 0].finish_reason == "error"
    assert "not finite" in answers["bad", 0].deltas[-1].error
    for key, tokens in expected.items():
        assert answers[key].token_ids == tokens


class Fragile(Decoder):
    """Raises whenever token 13 is in the batch."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        if (inputs[0] == 13).any():
            raise RuntimeError("unlucky")
        return super().forward(*inputs, **options)


def test_an_exception_ends_only_the_request_that_causes_it(
    make_model: Make, make_engine: Make, run: Make
) -> None:
    base = make_model()
    good = [
        _request(str(i), [20 + i] * 9, temperature=0, max_tokens=12, stop_token_ids=(13,))
        for i in range(4)
    ]
    expected = run(make_engine(base), *good)
    model = Fragile(base.config)
    model.load_state_dict(base.state_dict())
    answers = run(make_engine(model.eval()), good[0], _request("bad", [1, 13]), *good[1:])
    assert answers["bad", 0].finish_reason == "error"
    assert answers["bad", 0].deltas[-1].error == "RuntimeError: unlucky"
    for key, answer in expected.items():
        assert answers[key].token_ids == answer.token_ids


def test_what_can_not_be_served_is_refused_at_add(make_model: Make, make_engine: Make) -> None:
    engine = make_engine(make_model(), context_length=64, num_blocks=16)
    engine.add(_request("taken", [1] * 40, max_tokens=24))
    with pytest.raises(RequestError, match="id 'taken' is in use"):
        engine.add(_request("taken", [1], max_tokens=1))
    with pytest.raises(RequestError, match="together 65, the context holds 64") as caught:
        engine.add(_request("long", [1] * 41, max_tokens=24))
    assert caught.value.code == "context_length_exceeded"
    assert engine.stats().waiting == 1


def test_stats_and_ready(make_model: Make, make_engine: Make) -> None:
    model = make_model()
    clock = ManualClock()
    plain = make_engine(model, num_blocks=50)
    engine = Engine(model, plain._output._vocabulary, plain.config, model_id="m", clock=clock)
    ready = engine.ready()
    assert (ready.model_id, ready.vocab_size, ready.context_length) == ("m", 259, 128)
    assert (ready.kv_blocks_total, ready.block_size, ready.eos_token_id) == (50, 4, 256)
    engine.add(_request("r", [1] * 20, n=2, max_tokens=3))
    seen = []
    while engine.has_work:
        engine.step()
        seen.append(engine.stats())
    assert [s.step for s in seen] == list(range(1, len(seen) + 1))
    assert [s.last_step_prefill_tokens for s in seen] == [16, 4, 1, 0, 0]
    assert [s.last_step_decode_tokens for s in seen] == [0, 0, 1, 2, 1]
    assert seen[0].kv_blocks_used == 5
    assert seen[1].kv_blocks_used == 5
    assert seen[2].kv_blocks_used == 7  # the second one shares 4 blocks, copies 1 and has 1 more
    assert (seen[-1].prefix_cache_queries, seen[-1].prefix_cache_hits) == (40, 19)
    assert seen[-1].kv_blocks_used == seen[-1].running == seen[-1].waiting == 0
    assert seen[-1].prompt_tokens == 20
    assert seen[-1].generation_tokens == 6
    assert seen[-1].last_step_seconds == 0


ENDINGS: list[dict[str, Any]] = [
    {"ignore_eos": True},
    {"ignore_eos": False},
    {"ignore_eos": False, "min_tokens": 1},
    {
        "ignore_eos": False,
        "structured": StructuredOutput(kind="regex", text="([a-z]{2,5} )*[.!]"),
    },
]


def test_a_random_load_ends_cleanly(make_model: Make, make_engine: Make) -> None:
    """Arrivals, aborts and every kind of parameter at once: each sequence ends exactly once."""
    chance = random.Random(3)
    engine = make_engine(make_model(), num_blocks=36, max_batched_tokens=12, max_num_seqs=5)
    open_sequences: set[tuple[str, int]] = set()
    arrived = 0
    while arrived < 60 or engine.has_work:
        if arrived < 60 and chance.random() < 0.3:
            n = chance.choice([1, 1, 3])
            engine.add(
                _request(
                    str(arrived), _prompt(chance.randint(1, 70), arrived), n,
                    max_tokens=chance.randint(1, 50), temperature=chance.choice([0, 0.5, 1.5]),
                    top_k=chance.choice([0, 3]), top_p=chance.choice([0.5, 1.0]),
                    seed=chance.choice([None, 1]), stop=chance.choice([(), ("a", "zq")]),
                    logprobs=chance.choice([None, 2]),
                    prompt_logprobs=chance.choice([None, None, 1]),
                    min_p=chance.choice([0, 0.1]), repetition_penalty=chance.choice([1, 1.5]),
                    frequency_penalty=chance.choice([0, 0.5]),
                    logit_bias=chance.choice([{}, {7: 5.0, 256: -3.0}]),
                    **chance.choice(ENDINGS),
                )
            )  # fmt: skip
            open_sequences |= {(str(arrived), index) for index in range(n)}
            arrived += 1
        if open_sequences and chance.random() < 0.05:
            engine.abort(chance.choice(sorted(open_sequences))[0])
        for delta in engine.step():
            key = (delta.request_id, delta.index)
            assert key in open_sequences
            assert delta.finish_reason != "error", delta.error
            codecs.encode(delta.text, "utf-8")
            if delta.finish_reason:
                open_sequences.remove(key)
    assert not open_sequences
    assert not engine._requests
    assert engine.stats().kv_blocks_used == 0
    assert engine.stats().preemptions > 0
