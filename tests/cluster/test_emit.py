"""Job specs for other schedulers: golden files, and the rules of who will read them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate
import pytest
import yaml

from minigpt.cluster.config import JobConfig
from minigpt.cluster.emit import Target, emit_job
from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"
SITE = {"slurm": ["partition=gpu"], "kueue": ["image=registry.example/minigpt:1.0"], "sky": []}
SUFFIX = {"slurm": "sh", "kueue": "yaml", "sky": "yaml"}
TARGETS: tuple[Target, ...] = ("slurm", "kueue", "sky")


def make(**values: object) -> JobConfig:
    defaults: dict[str, object] = {
        "name": "llm-350m",
        "command": ["minigpt", "train", "recipes/350m.yaml", "--run-dir", "runs/350 m"],
        "workdir": "/home/ada/minigpt",
        "env": {"NOTE": "it's $HOME"},
        "workers": 16,
        "resources": {"cpus": 7.5, "memory_gib": 96, "gpus": 1},
        "team": "research",
        "priority": 10,
        "max_seconds": 172_800,
        "retries": 3,
        "grace_seconds": 120,
    }
    return from_mapping(JobConfig, defaults | values)


SINGLE = make(name="tiny", workers=1, resources={"cpus": 2, "memory_gib": 4}, env={}, priority=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("job", [make(), SINGLE], ids=lambda job: str(job.name))
def test_golden(job: JobConfig, target: Target) -> None:
    """To accept a change: MINIGPT_UPDATE_GOLDEN=1, then read the difference."""
    path = GOLDEN / f"{job.name}.{target}.{SUFFIX[target]}"
    text = emit_job(job, target, SITE[target])
    if os.environ.get("MINIGPT_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


# Slurm's sbatch(1): the options used and the form of their values.
DIRECTIVES = {
    "job-name": r"[a-z0-9-]+",
    "account": r"[a-z0-9-]+",
    "partition": r"\w+",
    "nodes": r"[1-9]\d*",
    "ntasks-per-node": r"[1-9]\d*",
    "cpus-per-task": r"[1-9]\d*",
    "mem": r"[1-9]\d*M",
    "gres": r"gpu:[1-9]\d*",
    "time": r"\d+-[0-2]\d:[0-5]\d:[0-5]\d",
    "signal": r"B:TERM@([1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d)",
    "nice": r"-?\d+",
    "chdir": r"/\S*",
    "output": r"[\w.-]+-%j\.log",
    "open-mode": "append",
}


@pytest.mark.parametrize("job", [make(), SINGLE], ids=lambda job: str(job.name))
def test_slurm_directives_and_syntax(job: JobConfig, tmp_path: Path) -> None:
    text = emit_job(job, "slurm", SITE["slurm"])
    script = tmp_path / "job.sh"
    script.write_text(text)
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    directives = [line for line in lines if line.startswith("#SBATCH")]
    # sbatch stops reading directives at the first command.
    assert lines[1 : 1 + len(directives)] == directives
    for line in directives:
        matched = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
        assert matched, line
        name, value = matched.groups()
        if name in ("requeue", "no-requeue"):
            assert value is None
        else:
            assert re.fullmatch(DIRECTIVES[name], value), line


def run_slurm_script(tmp_path: Path, job: JobConfig, srun: str, **env: str) -> tuple[int, str]:
    """Run the script with stand-ins for Slurm's commands that note what they were given."""
    tools = tmp_path / "bin"
    tools.mkdir()
    log = tmp_path / "calls"
    for name, body in {
        "srun": srun,
        "scontrol": f'echo "scontrol $*" >> {log}; [ "$1" = show ] && echo node1 && echo node2; :',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(emit_job(job, "slurm", SITE["slurm"]))
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "LOG": str(log),
    }
    process = subprocess.Popen(["bash", str(script)], env=environment | env)
    if "READY" in srun:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
        process.terminate()
    code = process.wait(30)
    return code, log.read_text() if log.exists() else ""


def test_slurm_passes_the_signal_on_and_requeues(tmp_path: Path) -> None:
    """TERM to the batch shell reaches the step, whose own exit code counts."""
    ready = tmp_path / "ready"
    srun = (
        f"# READY\ntrap 'echo saved >> $LOG; exit 143' TERM; touch {ready}\n"
        "for i in {1..200}; do sleep 0.1; done; exit 1"
    )
    code, log = run_slurm_script(tmp_path, make(), srun, SLURM_RESTART_COUNT="1")
    assert code == 143 and "saved" in log and "scontrol requeue 42" in log


@pytest.mark.parametrize(("exits", "restarts", "requeued"), [(0, "0", 0), (3, "2", 1), (3, "3", 0)])
def test_slurm_requeues_failures_as_often_as_told(
    tmp_path: Path, exits: int, restarts: str, requeued: int
) -> None:
    code, log = run_slurm_script(tmp_path, make(), f"exit {exits}", SLURM_RESTART_COUNT=restarts)
    assert code == exits and log.count("requeue") == requeued


def test_slurm_starts_the_command_with_its_quoting(tmp_path: Path) -> None:
    srun = 'echo "srun $*" >> $LOG; echo "head $MASTER_ADDR note $NOTE" >> $LOG; exec "${@:2}"'
    job = make(command=["bash", "-c", 'echo "ran $1" >> $LOG', "x", "a  'b'"], workers=1)
    code, log = run_slurm_script(tmp_path, job, srun)
    assert code == 0
    assert "srun --kill-on-bad-exit=1 bash -c exec bash" in log
    assert "head node1 note it's $HOME" in log and "ran a  'b'" in log


@pytest.mark.parametrize("job", [make(), SINGLE], ids=lambda job: str(job.name))
def test_kueue_manifests_are_valid_and_locked_down(job: JobConfig) -> None:
    service, manifest = yaml.safe_load_all(emit_job(job, "kueue", SITE["kueue"]))
    for document in (service, manifest):
        kubernetes_validate.validate(document, "1.33", strict=True)
    assert manifest["spec"]["suspend"] is True
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    pod = manifest["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    container = pod["containers"][0]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    # Label values and names as Kubernetes wants them (RFC 1123, 63 characters).
    for value in manifest["metadata"]["labels"].values():
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value)


def test_kubernetes_expands_nothing_of_ours() -> None:
    job = make(command=["echo", "$(HOSTNAME)"], env={"A": "$(PATH)"}, workers=1)
    _, manifest = yaml.safe_load_all(emit_job(job, "kueue", SITE["kueue"]))
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    assert container["command"][-1] == "exec echo '$$(HOSTNAME)'"
    assert {"name": "A", "value": "$$(PATH)"} in container["env"]


def test_kubernetes_validation_would_notice() -> None:
    _, manifest = yaml.safe_load_all(emit_job(make(), "kueue", SITE["kueue"]))
    manifest["spec"]["parallelsim"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.33", strict=True)


# The part of SkyPilot's task schema that is used here, stricter where a task of ours is; written
# from its documentation (docs.skypilot.co/en/latest/reference/yaml-spec.html) and compared by eye
# with get_task_schema and get_resources_schema in its sky/utils/schemas.py. It is not installed.
SKY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "num_nodes", "resources", "run"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
        "workdir": {"type": "string"},
        "num_nodes": {"type": "integer", "minimum": 1},
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "infra": {"type": "string"},
                "accelerators": {"type": "string", "pattern": r"^[\w-]+:\d+$"},
                "cpus": {"type": "string", "pattern": r"^\d+\+?$"},
                "memory": {"type": "string", "pattern": r"^\d+\+?$"},
                "use_spot": {"type": "boolean"},
                "job_recovery": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"max_restarts_on_errors": {"type": "integer", "minimum": 0}},
                },
            },
        },
        "envs": {
            "type": "object",
            "additionalProperties": False,
            "patternProperties": {"^[a-zA-Z_][a-zA-Z0-9_]*$": {"type": "string"}},
        },
        "run": {"type": "string"},
    },
}


@pytest.mark.parametrize("job", [make(), SINGLE], ids=lambda job: str(job.name))
def test_sky_tasks_follow_the_schema(job: JobConfig, tmp_path: Path) -> None:
    task = yaml.safe_load(emit_job(job, "sky", ["infra=aws/us-east-1"]))
    jsonschema.validate(task, SKY_SCHEMA)
    script = tmp_path / "run.sh"
    script.write_text(task["run"])
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    words = shlex.split(task["run"].splitlines()[-1])
    assert words[-5:] == job.command


@pytest.mark.parametrize(
    ("values", "target", "site", "message"),
    [
        ({"workers": 9}, "slurm", [], "workers = 9 does not divide evenly into 2 nodes"),
        ({"placement": "strict-pack"}, "sky", [], "need 2 nodes"),
        ({}, "kueue", [], "kueue needs a container image"),
        ({}, "sky", ["gpu=H100"], "unknown key 'gpu'"),
        ({"resources": {"cpus": 65}}, "slurm", [], "does not fit a node"),
        ({"workdir": "/my home"}, "slurm", [], "a directive can't hold spaces"),
    ],
)
def test_what_cannot_be_said_is_refused(
    values: dict[str, object], target: Target, site: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        emit_job(make(**values), target, site)
