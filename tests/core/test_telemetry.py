import json

import pytest

from minigpt.core.telemetry import configure_logging, get_logger, progress


def test_json_logs_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(json=True, level="info")
    get_logger("data").debug("hidden")
    get_logger("data").info("prepared", documents=3)
    captured = capsys.readouterr()
    assert captured.out == ""
    line = json.loads(captured.err)
    assert line["component"] == "data"
    assert (line["event"], line["documents"], line["level"]) == ("prepared", 3, "info")


def test_text_logs_name_event_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(json=False)
    get_logger("train").warning("disk is full", free=0)
    text = capsys.readouterr().err
    assert "disk is full" in text and "free=0" in text


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reading", total=2) as bar:
        bar.advance()
        bar.advance()
    assert capsys.readouterr() == ("", "")
