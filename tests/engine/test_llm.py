"""The Python API, on a real artifact; its own engine thread."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minigpt.api.requests import SamplingParams, StructuredOutput
from minigpt.core.errors import RequestError
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.engine.llm import LLM
from minigpt.model.attention import CausalAttention
from minigpt.model.weights import load_model

CONFIG: dict[str, Any] = {"device": "cpu", "threads": 1, "dtype": "float32"}


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, EngineConfig.model_validate(CONFIG)) as loaded:
        yield loaded


@torch.inference_mode()
def _hidden_and_logprobs(path: Path, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    model = load_model(path, dtype="float32", device="cpu").model
    positions = torch.arange(len(tokens))[None]
    hidden = model(torch.tensor([tokens]), positions, CausalAttention())
    return hidden[0], model.logits(hidden)[0].log_softmax(-1)


def test_generate(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=0, logprobs=2)
    texts = ["The old river", "A quiet town"]
    both = llm.generate(texts, params)
    assert [c.prompt_token_ids for c in both] == [llm.tokenizer.encode(t, bos=True) for t in texts]
    for text, completion in zip(texts, both, strict=True):
        (answer,) = completion.answers
        assert completion.text == llm.tokenizer.decode(answer.token_ids)
        assert answer.finish_reason in ("stop", "length")
        assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
        assert llm.generate(text, params)[0].text == completion.text
        tokens = llm.tokenizer.encode(text, bos=True)
        assert llm.generate(tokens, params)[0].text == completion.text
        assert llm.generate([tokens], params)[0].text == completion.text


def test_several_answers_and_parameters_of_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=count, seed=count, ignore_eos=True) for count in (3, 9)]
    short, long = llm.generate(["a", "b"], params, n=3, progress=False)
    assert [len(answer.token_ids) for answer in short.answers + long.answers] == [3] * 3 + [9] * 3
    assert len({answer.text for answer in long.answers}) == 3
    with pytest.raises(RequestError, match="2 sampling parameters for 1 prompts"):
        llm.generate("a", params)


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    completion = llm.chat(messages, SamplingParams(max_tokens=5, ignore_eos=True), n=2)
    assert llm.tokenizer.decode(completion.prompt_token_ids) == "User: hello\n\nAssistant:"
    assert [len(answer.token_ids) for answer in completion.answers] == [5, 5]


def test_score_equals_the_models_own(llm: LLM, tiny_model: Path) -> None:
    texts = ["the patient stranger crossed a bridge.", "x", "zq0 % unlikely"]
    for text, scores in zip(texts, llm.score(texts, alternatives=2), strict=True):
        tokens = llm.tokenizer.encode(text, bos=True)
        logprobs = _hidden_and_logprobs(tiny_model, tokens)[1]
        assert [entry.token_id for entry in scores] == tokens[1:]
        expected = [logprobs[i, token].item() for i, token in enumerate(tokens[1:])]
        assert [entry.logprob for entry in scores] == pytest.approx(expected, abs=1e-4)
        assert all(len(entry.top) == 2 for entry in scores)


def test_embed(llm: LLM, tiny_model: Path) -> None:
    texts = ["the old river", "a cheerful kitchen while", "q"]
    hidden = [
        _hidden_and_logprobs(tiny_model, llm.tokenizer.encode(text, bos=True))[0] for text in texts
    ]
    mean = llm.embed(texts, normalize=False)
    assert mean == pytest.approx(torch.stack([h.mean(0) for h in hidden]).numpy(), abs=1e-4)
    last = llm.embed(texts, pooling="last", normalize=False)
    assert last == pytest.approx(torch.stack([h[-1] for h in hidden]).numpy(), abs=1e-4)
    unit = llm.embed(texts)
    assert np.linalg.norm(unit, axis=-1) == pytest.approx(np.ones(3), abs=1e-5)
    assert unit * np.linalg.norm(mean, axis=-1)[:, None] == pytest.approx(mean, abs=1e-4)


def test_structured(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    output = StructuredOutput(kind="json_schema", text=json.dumps(schema))
    (completion,) = llm.generate("x", SamplingParams(max_tokens=60, structured=output, seed=1), n=4)
    for answer in completion.answers:
        assert answer.finish_reason == "stop"
        assert type(json.loads(answer.text)["ok"]) is bool
    bad = StructuredOutput(kind="regex", text="(")
    with pytest.raises(RequestError, match="unclosed group"):
        llm.generate("x", SamplingParams(structured=bad))


def test_what_can_not_be_served_is_refused_before_anything_is_generated(llm: LLM) -> None:
    with pytest.raises(RequestError, match="temperature"):
        llm.generate(["fine", "x"], [SamplingParams(), SamplingParams(temperature=-1)])
    with pytest.raises(RequestError, match="the context holds"):
        llm.score("x" * 5000)
    with pytest.raises(RequestError, match="prompt is empty"):
        llm.generate([[]])


def test_streams_share_the_engine_and_join_to_the_whole_answer(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, seed=3, ignore_eos=True)
    texts = ["the old", "a quiet", "some heavy"]
    whole = [completion.text for completion in llm.generate(texts, params)]

    async def join(text: str) -> str:
        return "".join([delta.text async for delta in llm.stream(text, params)])

    async def together() -> list[str]:
        return await asyncio.gather(*map(join, texts))

    assert asyncio.run(together()) == whole


def test_a_stream_that_is_left_frees_its_blocks(llm: LLM) -> None:
    async def leave() -> None:
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        stream = llm.stream("x", params, n=2)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        with pytest.raises(RequestError, match="top_p"):
            async for _ in llm.stream("x", SamplingParams(top_p=3)):
                pass

    asyncio.run(leave())
    llm.generate("x", SamplingParams(max_tokens=2))
    stats = llm._engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


def test_several_threads_share_batches(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    alone = [llm.generate(text, params)[0].text for text in "abcdef"]
    found: dict[str, str] = {}
    before = llm._engine.stats().step

    def ask(text: str) -> None:
        found[text] = llm.generate(text, params)[0].text

    threads = [threading.Thread(target=ask, args=(text,)) for text in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[text] for text in "abcdef"] == alone
    assert llm._engine.stats().step - before < 6 * 40, "they ran together"


def test_progress_is_shown_on_a_terminal_alone(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.generate(["a", "b"], SamplingParams(max_tokens=2, ignore_eos=True))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    llm.generate(["a", "b"], SamplingParams(max_tokens=2, ignore_eos=True))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "2/2" in shown
    assert "4 tokens" in shown
    llm.generate(["a", "b"], progress=False)
    assert capsys.readouterr().err == ""


def test_closed_and_failed_engines_let_nobody_wait(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine = Engine.load(tiny_model, EngineConfig.model_validate(CONFIG))
    closed = LLM(engine)
    closed.close()
    closed.close()
    with pytest.raises(RequestError, match="closed"):
        closed.generate("x")
    failing = LLM(engine)
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    with pytest.raises(RequestError, match="the engine failed: ZeroDivisionError"):
        failing.generate(["x", "y"])
    with pytest.raises(RequestError, match="closed"):
        failing.generate("x")


def test_the_documented_example(
    llm: LLM, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's Python runs as it stands, but for the model's directory."""
    page = (Path(__file__).parents[2] / "docs/engine.md").read_text(encoding="utf-8")
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "LLM(" in c)
    code = code.replace('"runs/quickstart/train/model"', repr(str(tiny_model)))
    exec(compile(code, "docs/engine.md", "exec"), {})
    assert capsys.readouterr().out
