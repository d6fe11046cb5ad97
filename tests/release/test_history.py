from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from minigpt.core.clock import ManualClock
from minigpt.release.history import AliasChange, AliasHistory, DatabaseHistory, TagHistory
from minigpt.release.store import MlflowStore


@pytest.fixture(params=["database", "tags"])
def history(request: pytest.FixtureRequest, database: Path) -> AliasHistory:
    """Both forms: a table beside MLflow's, and tags through its client, as on a server."""
    store = MlflowStore(f"sqlite:///{database}")
    store.create_model("m")
    store.create_model("n")
    return TagHistory(store._client) if request.param == "tags" else DatabaseHistory(store.uri)


def test_what_is_appended_is_read_in_order(history: AliasHistory) -> None:
    start = ManualClock().now()
    changes = [
        AliasChange(
            at=start + timedelta(seconds=index), model="m", alias="champion", from_version=index,
            to_version=index + 1 if index else None, by="ann", why="a 'quoted' \u00fcmlaut\nline",
        )
        for index in range(12)
    ]  # fmt: skip
    assert history.read("m") == []
    for change in changes:
        history.append(change)
    assert history.read("m") == changes
    assert history.read("n") == []
