"""Queues on SQLite and on a real PostgreSQL server, and jobs that leave a trace."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minigpt.cluster.config import JobConfig, QueueConfig
from minigpt.core.config import from_mapping

POSTGRES_BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
SERVER_USER = "postgres"


def _as_server_user() -> list[str]:
    """PostgreSQL refuses to run as root."""
    return ["runuser", "-u", SERVER_USER, "--"] if os.getuid() == 0 else []


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Path]:
    """The socket directory of a server of our own, without TCP."""
    if POSTGRES_BIN is None:
        pytest.skip("no PostgreSQL server in /usr/lib/postgresql")
    directory = Path(tempfile.mkdtemp(prefix="minigpt-pg-"))
    try:
        if os.getuid() == 0:
            account = pwd.getpwnam(SERVER_USER)
            os.chown(directory, account.pw_uid, account.pw_gid)
        data = directory / "data"
        prefix = _as_server_user()
        subprocess.run(
            [*prefix, str(POSTGRES_BIN / "initdb"), "-D", str(data), "-U", "postgres", "-N"],
            check=True,
            capture_output=True,
            cwd=directory,
        )
        control = [*prefix, str(POSTGRES_BIN / "pg_ctl"), "-D", str(data), "-w"]
        options = f"-c listen_addresses='' -k {directory} -c fsync=off"
        started = [*control, "-l", str(directory / "log"), "-o", options, "start"]
        subprocess.run(started, check=True, stdout=subprocess.DEVNULL, cwd=directory)
        try:
            yield directory
        finally:
            stop = [*control, "-m", "immediate", "stop"]
            subprocess.run(stop, check=True, capture_output=True, cwd=directory)
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def postgres_url(postgres_server: Path) -> str:
    import psycopg

    name = f"queue_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(
        host=str(postgres_server), user="postgres", dbname="postgres", autocommit=True
    ) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql://postgres@/{name}?host={postgres_server}"


@pytest.fixture(params=["sqlite", "postgres"])
def queue_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., JobConfig]:
    """A job that runs Python source, with anything else of it given by name."""

    def make(source: str = "pass", **values: object) -> JobConfig:
        defaults: dict[str, object] = {
            "command": [sys.executable, "-c", source],
            "workdir": str(tmp_path),
            "resources": {"cpus": 1, "memory_gib": 0.5},
            "grace_seconds": 5,
        }
        return from_mapping(JobConfig, defaults | values)

    return make


@pytest.fixture
def queue_config() -> QueueConfig:
    """Two nodes of two cores each, quick polls."""
    node = {"cpus": 2, "memory_gib": 4, "gpus": 1}
    values = {"nodes": {"a": node, "b": node}, "poll_seconds": 0.1, "lease_seconds": 2}
    return from_mapping(QueueConfig, values)
