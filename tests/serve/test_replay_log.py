"""What is logged of answers, and that the log is bounded and survives."""

from __future__ import annotations

import stat
from pathlib import Path

import msgspec
import pytest

from minigpt.api.requests import Delta, FinishReason, Ready, Request, SamplingParams
from minigpt.core.errors import StorageError
from minigpt.serve.replay import ReplayError, find_answers
from minigpt.serve.replay_log import AnswerLine, EngineLine, ReplayLog, hash_tokens

READY = Ready(
    model_id="m", vocab_size=9, context_length=64, kv_blocks_total=4, block_size=16,
    eos_token_id=None, load_seconds=0.1, engine_config="{}", environment={"torch": "1"},
)  # fmt: skip


def open_log(path: Path, max_bytes: int = 1 << 20, seed: int | None = None) -> ReplayLog:
    return ReplayLog(path, max_bytes, model="tiny", tokenizer="t", seed=seed)


def answer(
    log: ReplayLog, name: str, n: int = 1, reason: FinishReason = "length", tokens: int = 3
) -> Request:
    sampling = SamplingParams(max_tokens=tokens, logit_bias={5: 1.5})
    request = log.begin(Request(id=name, prompt_token_ids=[7, 8], n=n, sampling=sampling), READY)
    for position in range(tokens):
        for index in range(n):
            log.observe(
                Delta(
                    request_id=name,
                    index=index,
                    token_ids=[index + position],
                    text="",
                    weights="w+a" if position == 0 else None,
                    finish_reason=reason if position == tokens - 1 else None,
                )
            )
    return request


def test_an_answer_is_logged_with_all_that_it_followed_from(tmp_path: Path) -> None:
    path = tmp_path / "made" / "log"
    log = open_log(path)
    sent = answer(log, "cmpl-a-0", n=2)
    assert sent.sampling.seed is not None
    log.close()
    ((line, engine),) = find_answers(path, "cmpl-a")
    assert line.request == sent
    assert (line.weights, line.adapter, line.tokenizer) == ("w", "a", "t")
    assert [each.sha256 for each in line.answers] == [
        hash_tokens([0, 1, 2]),
        hash_tokens([1, 2, 3]),
    ]
    assert engine == EngineLine.of(READY)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_only_whole_answers_are_logged(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = open_log(path)
    answer(log, "failed-0", reason="error")
    log.drop("failed-0")
    request = log.begin(Request(id="scored-0", prompt_token_ids=[1],
                                sampling=SamplingParams(max_tokens=0)), READY)  # fmt: skip
    log.observe(
        Delta(request_id=request.id, index=0, token_ids=[], text="", finish_reason="length")
    )
    log.begin(Request(id="running-0", prompt_token_ids=[1]), READY)
    log.close()
    assert path.read_bytes() == b""
    with pytest.raises(ReplayError, match="has no answer of id 'failed'"):
        find_answers(path, "failed")


def test_seeds_that_are_given_stay_and_others_follow_the_engines(tmp_path: Path) -> None:
    given = Request(id="a-0", prompt_token_ids=[1], sampling=SamplingParams(seed=5))
    free = Request(id="b-0", prompt_token_ids=[1])
    found = []
    for name in ("x", "y"):
        log = open_log(tmp_path / name, seed=3)
        assert log.begin(given, READY) == given
        found.append(log.begin(free, READY).sampling.seed)
        log.close()
    assert found[0] == found[1] is not None


def test_the_log_is_bounded_and_each_half_can_be_read_alone(tmp_path: Path) -> None:
    path, older = tmp_path / "log", tmp_path / "log.1"
    log = open_log(path, max_bytes=1 << 16)
    for number in range(300):
        answer(log, f"r{number}-0")
    log.close()
    assert path.stat().st_size + older.stat().st_size <= (1 << 16) + 1024
    with pytest.raises(ReplayError, match="no answer of id 'r0'"):
        find_answers(path, "r0")
    last = find_answers(path, "r299")[0][0]
    assert last.request.id == "r299-0"
    older.unlink()
    assert find_answers(path, "r299")[0][1] == EngineLine.of(READY)


def test_a_line_that_a_crash_cut_off_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = open_log(path)
    answer(log, "a-0")
    answer(log, "b-0")
    log.close()
    path.write_bytes(path.read_bytes()[:-20])
    log = open_log(path)
    answer(log, "c-0")
    log.close()
    assert [find_answers(path, name)[0][0].request.id for name in "ac"] == ["a-0", "c-0"]
    with pytest.raises(ReplayError, match="no answer of id 'b'"):
        find_answers(path, "b")


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        find_answers(tmp_path / "nowhere", "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't write"):
        open_log(tmp_path / "file" / "log")
    strange = AnswerLine(
        format=9, time=0, model="m", weights="w", adapter=None, tokenizer="t", engine="e",
        request=Request(id="a-0", prompt_token_ids=[1]), answers=[],
    )  # fmt: skip
    (tmp_path / "log").write_bytes(msgspec.json.encode(strange) + b"\n")
    with pytest.raises(ReplayError, match="has format 9, not 1"):
        find_answers(tmp_path / "log", "a")
