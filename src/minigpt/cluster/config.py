"""What a job asks for, and how a queue shares its nodes out."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from minigpt.cluster.resources import Resources
from minigpt.core.config import Config

Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,48}[a-z0-9])?$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
GIB = 1 << 30


class ResourcesConfig(Config):
    """What each worker of a job gets."""

    cpus: float = Field(default=1.0, gt=0, le=4096)
    """Processor cores, to a thousandth."""
    memory_gib: float = Field(default=1.0, gt=0)
    """Main memory, GiB."""
    gpus: int = Field(default=0, ge=0)
    """GPUs, each used by this worker alone."""

    def amount(self) -> Resources:
        """Return the same in the scheduler's units."""
        return Resources(round(self.cpus * 1000), round(self.memory_gib * GIB), self.gpus)


class JobConfig(Config):
    """A job: a command that `workers` processes run together, all of them or none."""

    name: Name = "job"
    """Lower-case letters, digits and hyphens, at most 50, the first a letter."""
    command: list[str] = Field(min_length=1)
    """Program and arguments. Each worker finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT as torchrun sets them."""
    env: dict[VariableName, str] = Field(default_factory=dict)
    """Environment variables besides those of the queue's process."""
    workdir: str = ""
    """Where the command runs; empty is the directory that the job is submitted from."""
    workers: int = Field(default=1, ge=1, le=65_536)
    """Processes that start together; one per GPU is usual."""
    resources: ResourcesConfig = ResourcesConfig()
    """What each worker gets."""
    placement: Literal["pack", "strict-pack"] = "pack"
    """pack: on as few nodes as possible; strict-pack: on one node or not at all."""
    priority: int = Field(default=0, ge=-1000, le=1000)
    """Higher goes first, and may evict lower."""
    team: Name = "default"
    """Whose quota and whose share it counts against."""
    max_seconds: float = Field(default=86_400.0, gt=0)
    """Longest run of one attempt; at the limit it is stopped and counts as failed."""
    retries: int = Field(default=0, ge=0, le=1000)
    """How often it is started again after it failed."""
    evictable: bool = True
    """Whether a job of higher priority may stop it. It gets SIGTERM and `grace_seconds`, and is
    started again later: right for whatever resumes from its own checkpoints."""
    grace_seconds: float = Field(default=60.0, ge=0)
    """Seconds between SIGTERM and SIGKILL."""

    @field_validator("command")
    @classmethod
    def _has_a_program(cls, command: list[str]) -> list[str]:
        if not command[0]:
            raise ValueError("a command whose first word is a program")
        return command

    def total(self) -> Resources:
        """Return what all workers take together."""
        return self.resources.amount() * self.workers


class TeamConfig(Config):
    """A team's part of the cluster."""

    weight: float = Field(default=1.0, gt=0)
    """Its share against the other teams' where jobs of equal priority wait."""
    cpus: float | None = Field(default=None, ge=0)
    """Most cores in use at a time; null is no limit."""
    memory_gib: float | None = Field(default=None, ge=0)
    """Most memory in use at a time, GiB; null is no limit."""
    gpus: int | None = Field(default=None, ge=0)
    """Most GPUs in use at a time; null is no limit."""

    def quota(self) -> Resources:
        """Return the limits in the scheduler's units, none as a very large number."""
        unlimited = Resources.unlimited()
        return Resources(
            unlimited.millicpus if self.cpus is None else round(self.cpus * 1000),
            unlimited.memory if self.memory_gib is None else round(self.memory_gib * GIB),
            unlimited.gpus if self.gpus is None else self.gpus,
        )


class NodeConfig(Config):
    """A part of this machine that the queue treats as a node."""

    cpus: float = Field(gt=0)
    """Cores."""
    memory_gib: float = Field(gt=0)
    """Memory, GiB."""
    gpus: int = Field(default=0, ge=0)
    """GPUs."""

    def amount(self) -> Resources:
        """Return the same in the scheduler's units."""
        return Resources(round(self.cpus * 1000), round(self.memory_gib * GIB), self.gpus)


class PolicyConfig(Config):
    """How waiting jobs are ordered and when running ones are stopped for them."""

    ageing_seconds: float = Field(default=3600.0, gt=0)
    """Waiting this long is worth one step of priority, so that nothing waits for ever."""
    half_life_seconds: float = Field(default=604_800.0, gt=0)
    """After this long, what a team has used counts half against it."""
    reservations: int = Field(default=8, ge=1)
    """Jobs at the head of the queue that get a start time which back-filled jobs can't delay."""
    preemption: bool = True
    """Whether a job may evict others of lower priority."""
    patience_seconds: float = Field(default=60.0, ge=0)
    """How long to wait for a victim that says it will soon be safe to evict."""


class QueueConfig(Config):
    """The scheduler process."""

    executor: Literal["local", "ray"] = "local"
    """local: processes on this machine; ray: placement groups on the Ray cluster at `ray_address`.
    """
    ray_address: str = "auto"
    """Address of the Ray cluster."""
    nodes: dict[Name, NodeConfig] = Field(default_factory=dict)
    """local: how to divide this machine; empty is one node with all of it."""
    teams: dict[Name, TeamConfig] = Field(default_factory=dict)
    """Weights and quotas; a team that is not listed has weight 1 and no quota."""
    policy: PolicyConfig = PolicyConfig()
    """Order, back-fill and eviction."""
    poll_seconds: float = Field(default=0.5, gt=0)
    """Pause between two looks at the queue."""
    lease_seconds: float = Field(default=10.0, gt=0)
    """After this long without a sign of life another scheduler process may take over."""

    @model_validator(mode="after")
    def _lease_outlives_polls(self) -> Self:
        if self.lease_seconds < 4 * self.poll_seconds:
            raise ValueError(
                f"lease_seconds = {self.lease_seconds:g} must be at least 4 x poll_seconds"
            )
        return self
