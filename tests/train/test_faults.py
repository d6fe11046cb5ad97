from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minigpt.core.errors import ConfigError
from minigpt.train.faults import Fault, Faults, InjectedError, parse_faults


def test_faults_are_read() -> None:
    faults = parse_faults("kill:rank=1,step=5,phase=backward; slow:seconds=0.25,times=3")
    assert faults == [
        Fault("kill", rank=1, step=5, phase="backward"),
        Fault("slow", seconds=0.25, times=3),
    ]
    assert parse_faults(" ") == []


@pytest.mark.parametrize("text", ["explode", "kill:rank=x", "kill:rnk=1", "kill:phase=lunch"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="MINIGPT_FAULTS"):
        parse_faults(text)


def test_a_fault_strikes_once_a_run_at_its_place(tmp_path: Path) -> None:
    fault = Fault("raise", rank=1, step=3, phase="reduce", micro_batch=1)
    Faults([fault], 0, tmp_path).strike("reduce", 3, 1)  # another rank
    faults = Faults([fault], 1, tmp_path)
    for phase, step, micro_batch in [("reduce", 2, 1), ("reduce", 3, 0), ("forward", 3, 1)]:
        faults.strike(phase, step, micro_batch)
    with pytest.raises(InjectedError, match="step 4"):
        faults.strike("reduce", 3, 1)
    faults.strike("reduce", 3, 1)
    Faults([fault], 1, tmp_path).strike("reduce", 3, 1)  # the run was restarted


def test_numbers_are_spoiled_as_often_as_asked(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    faults = Faults([Fault("nan", phase="reduce", times=2), Fault("flip")], 0, tmp_path)
    faults.weights = lambda: [weight]
    for strike in range(3):
        weight.grad = torch.ones(3)
        faults.strike("reduce", strike, 0)
        assert bool(weight.grad.isnan().all()) == (strike < 2)
    faults.strike("forward", 0, 0)
    assert weight[0] != 1 and bool((weight[1:] == 1).all())
