"""A policy that fails is named with its own file and line, not the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dcompile.errors import PolicyError
from dcompile.ir.program import Program, StepShape
from dcompile.ir.weights import Source
from dcompile.policies import find_policy
from dcompile.step.trace import Traced, trace

SHAPE = StepShape(slots=2, positions=32, block_length=8, mask_id=0, dtype=torch.float32)
HEAD = """\
import torch
from dcompile.policies import Decision, Policy, State
from dcompile.policies.base import rank


"""
LINES = len(HEAD.splitlines())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(ids))
        return out


@dataclass(frozen=True)
class Case:
    """A policy's source, the line of it that is to blame, and what is said."""

    source: str
    line: int
    says: str


CASES = {
    "a call that lacks an argument": Case(
        "def mine(choice, parameters):\n    first = rank(choice.confidence)\n    return first == 0\n",
        2,
        r"raises TypeError: rank\(\) missing",
    ),
    "an index that is not there": Case(
        "def mine(choice, parameters):\n    return choice.candidate[:, 0, 0]\n",
        2,
        "raises IndexError",
    ),
    "the line in its own file, not in one that it called": Case(
        "def inner(choice):\n    return torch.cat((choice.candidate, 3))\n\n"
        "def mine(choice, parameters):\n    return inner(choice)\n",
        2,
        "raises TypeError",
    ),
    "a signature that nothing calls": Case(
        "def mine(choice):\n    return choice.candidate\n", 1, "raises TypeError: mine"
    ),
    "a branch on values": Case(
        "def mine(choice, parameters):\n    if choice.candidate.any():\n"
        "        return choice.candidate\n    return choice.filled\n",
        2,
        "decides by values",
    ),
    "a wrong shape": Case(
        "def mine(choice, parameters):\n    return choice.candidate.any(-1)\n",
        1,
        r"returns commit as bool \[B\], not bool \[B, 8\]",
    ),
    "the shape of an example": Case(
        "def mine(choice, parameters):\n    return torch.ones(3, 8, dtype=torch.bool)\n",
        1,
        r"returns commit as bool \[3, 8\], not bool \[B, 8\]",
    ),
    "a batch that is fixed": Case(
        "def mine(choice, parameters):\n    some = torch.ones(3, 8, dtype=torch.bool)\n"
        "    return choice.candidate & some\n",
        1,
        "fixes how many sequences",
    ),
    "a wrong dtype": Case(
        "def mine(choice, parameters):\n    return choice.confidence\n",
        1,
        r"returns commit as float32 \[B, 8\], not bool",
    ),
    "nothing": Case("def mine(choice, parameters):\n    pass\n", 1, "returns a NoneType"),
    "a wrong part of a decision": Case(
        "def mine(choice, parameters):\n    return Decision(choice.candidate, more=choice.candidate)\n",
        1,
        r"returns more as bool \[B, 8\], not bool \[B\]",
    ),
    "a state that it does not declare": Case(
        "def mine(choice, parameters):\n"
        "    return Decision(choice.candidate, state={'last': choice.token})\n",
        1,
        r"returns the state \['last'\], but declares \[\]",
    ),
    "a state of another dtype": Case(
        "def commit(choice, parameters):\n"
        "    return Decision(choice.candidate, state={'last': choice.token})\n\n"
        "mine = Policy('mine', commit, state={'last': State(lambda n: (n,))})\n",
        1,
        r"returns state 'last' as int64 \[B, 8\], not float32 \[B, 8\]",
    ),
    "what it asks about": Case(
        "def asks(current, state):\n    return state['tokens']\n\n"
        "def commit(choice, parameters):\n    return choice.candidate\n\n"
        "mine = Policy('mine', commit, asks=asks)\n",
        2,
        "raises KeyError: 'tokens'",
    ),
}


def traced(file: Path) -> Program:
    model = Model().eval()
    recipes = {name: Source(name) for name, _ in model.named_parameters()}
    return trace(model, Traced(SHAPE, find_policy(f"{file}:mine"), recipes))


@pytest.mark.parametrize("name", CASES)
def test_a_policy_s_error_is_its_own(name: str, tmp_path: Path) -> None:
    case, file = CASES[name], tmp_path / "own.py"
    file.write_text(HEAD + case.source)
    with pytest.raises(PolicyError, match=f"policy 'mine' {case.says}") as found:
        traced(file)
    assert found.value.where == f"{file}:{LINES + case.line}"
    assert found.value.remedy


@pytest.mark.parametrize(
    ("source", "line"), [("x = 1\nif x\n", 2), ("import torch\n\nimport nothing.there\n", 3)]
)
def test_a_file_that_cannot_be_run(source: str, line: int, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(source)
    with pytest.raises(PolicyError, match="policy 'mine' raises") as found:
        traced(file)
    assert found.value.where == f"{file}:{line}"


def test_a_model_that_fails_is_still_the_model(tmp_path: Path) -> None:
    class Branches(Model):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) if ids.sum() > 3 else super().forward(ids * 0)

    (tmp_path / "own.py").write_text("def mine(choice, parameters):\n    return choice.candidate\n")
    model = Branches().eval()
    recipes = {name: Source(name) for name, _ in model.named_parameters()}
    with pytest.raises(Exception, match="the model's graph depends on its data") as found:
        trace(model, Traced(SHAPE, find_policy(f"{tmp_path / 'own.py'}:mine"), recipes))
    assert not isinstance(found.value, PolicyError)
