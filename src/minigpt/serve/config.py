"""Configuration of the server."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from minigpt.core.config import Config
from minigpt.engine.config import EngineConfig


class ServeConfig(Config):
    """How a model is served. Times are in seconds."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every interface, without authentication."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 lets the system choose, and the ready line says which."""
    engine: EngineConfig = EngineConfig()
    """How the engine runs the model."""
    max_body_bytes: int = Field(8 << 20, ge=1024)
    """Largest request body; a longer one is refused with 413."""
    grace_seconds: float = Field(30.0, ge=0)
    """After SIGTERM, how long running answers may go on; then they end with an error."""
    keep_alive_seconds: int = Field(75, ge=1)
    """How long an idle client connection stays open."""
    start_timeout_seconds: float = Field(600.0, gt=0)
    """How long the engine may take to load its model."""
    first_step_seconds: float = Field(120.0, gt=0)
    """How long the engine's first step may take (kernels warm up), before any was measured."""
    stall_factor: float = Field(10.0, ge=1)
    """Work exists and no step ended in this many times the predicted step time: stalled."""
    stall_floor_seconds: float = Field(10.0, gt=0)
    """A step may always take this long."""
    stall_kill_seconds: float = Field(30.0, gt=0)
    """A stalled engine gets this much longer, then it is killed and started anew."""
    restart_backoff_seconds: float = Field(0.5, gt=0)
    """Wait before the first restart of a dead engine; doubles with each failure in a row."""
    restart_backoff_max_seconds: float = Field(30.0, gt=0)
    """Longest wait before a restart."""
    replay_log: Path | None = None
    """Log answered requests to this file, for `minigpt replay`. It holds their prompts, as token
    ids, and is readable by its owner alone; null logs none."""
    replay_log_bytes: int = Field(64 << 20, ge=1 << 16)
    """Most bytes of that log; when it is full, its older half goes."""
    log_format: Literal["json", "text"] = "json"
    """Log lines for machines or for people, on standard error."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""
