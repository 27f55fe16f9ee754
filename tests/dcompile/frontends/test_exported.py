"""Exported programs: what runs code, reads files or inflates is refused before torch sees it."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcompile.driver.compile import compile_checkpoint
from dcompile.errors import CheckpointError, OptionError
from dcompile.frontends.exported import _is_operator, _is_size, open_exported
from dcompile.options import Options

Members = dict[str, bytes]
MODEL, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
CONSTANTS, INPUTS = "data/constants/model_constants_config.json", "data/sample_inputs/model.pt"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.head = nn.Linear(16, 40)
        self.register_buffer("scale", torch.rand(16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        flat = self.embed(ids).reshape(ids.shape[1] * 2, 8)
        return self.head(flat.reshape(1, -1, 16) * self.scale * torch.tensor([2.0]))


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    length = torch.export.Dim("length", min=2, max=64)
    ids = torch.ones(1, 9, dtype=torch.int64)
    torch.export.save(torch.export.export(Small(), (ids,), dynamic_shapes=({1: length},)), path)
    module, (again, longest) = Small(), open_exported(path)
    assert longest == 64
    module.load_state_dict(dict(again.state_dict()), strict=False)
    more = torch.randint(0, 40, (1, 31))
    assert torch.equal(module(more), again(more))
    with zipfile.ZipFile(path) as file:
        return {name.partition("/")[2]: file.read(name) for name in file.namelist()}


def write(path: Path, members: Members, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(f"model/{name}", data)
    return path


def edited(members: Members, member: str, change: Callable[[Any], object]) -> Members:
    value = json.loads(members[member])
    change(value)
    return {**members, member: json.dumps(value).encode()}


class Bomb:
    """Pickled, it is a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def nodes(model: Any) -> list[Any]:
    return model["graph_module"]["graph"]["nodes"]  # type: ignore[no-any-return]


def test_rewritten_as_it_was_it_loads(members: Members, tmp_path: Path) -> None:
    open_exported(write(tmp_path / "a.pt2", edited(members, MODEL, lambda model: None)))


def test_pickles_are_refused_and_not_run(members: Members, tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    bomb = Bomb(flag)

    def pickled(config: Any) -> None:
        config["config"]["embed.weight"] |= {"use_pickle": True}

    weights = edited(members, WEIGHTS, pickled) | {"data/weights/weight_0": saved(bomb)}
    opaque = {
        "path_name": "opaque_obj_0",
        "is_param": False,
        "use_pickle": True,
        "tensor_meta": None,
    }
    constants = edited(members, CONSTANTS, lambda c: c["config"].update(x=opaque))
    cases = {
        "inputs": {**members, INPUTS: saved(bomb)},
        "inputs_raw": {**members, INPUTS: pickle.dumps(bomb)},
        "weights": weights,
        "opaque": constants | {"data/constants/opaque_obj_0": pickle.dumps(bomb)},
        "legacy": {**members, "data/weights/model.pt": saved(bomb)},
        "compiled": {**members, "data/aotinductor/model/model.so": b"\x7fELF"},
        "second": {**members, "models/other.json": members[MODEL]},
    }
    for name, case in cases.items():
        with pytest.raises(CheckpointError, match="safely"):
            open_exported(write(tmp_path / f"{name}.pt2", case))
        assert not flag.exists(), name


RUN = "__import__('pathlib').Path('{}').touch()"


def rename_input(model: Any, name: str) -> None:
    text = json.dumps(model["graph_module"]).replace('"ids"', json.dumps(name))
    model["graph_module"] = json.loads(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda m, run: nodes(m)[0].update(target="torch.os.system"),
        lambda m, run: nodes(m)[0].update(target="torch.hub.load"),
        lambda m, run: nodes(m)[0].update(target="torch.ops.aten.from_file.default"),
        lambda m, run: nodes(m)[0].update(target="torch.ops.aten.__class__.mro"),
        lambda m, run: nodes(m)[0].update(target="#anything"),
        lambda m, run: nodes(m)[0]["inputs"][0].update(name=f"a=1, b={run}"),
        lambda m, run: nodes(m)[0].update(name=f"x\n{run}"),
        lambda m, run: nodes(m)[0]["metadata"].update(nn_module_stack="a,*/\nint f(){},c"),
        lambda m, run: rename_input(m, f"ids={run}"),
        lambda m, run: rename_input(m, "def"),
        lambda m, run: m["graph_module"]["graph"]["sym_int_values"].update(
            x={"as_expr": {"expr_str": run, "hint": {"as_int": 3}}}
        ),
        lambda m, run: m["range_constraints"].update({run: {"min_val": 0, "max_val": 1}}),
        lambda m, run: m["graph_module"]["module_call_graph"][0]["signature"].update(
            out_spec='[1, {"type": "os.system", "context": "1", "children_spec": []}]'
        ),
        lambda m, run: m["graph_module"]["signature"]["input_specs"][0]["parameter"].update(
            parameter_name=f'x"), {run}, ("'
        ),
        lambda m, run: nodes(m)[0]["inputs"].append(
            {"name": "x", "arg": {"as_custom_obj": {"name": "x", "class_fqn": "y"}}, "kind": 1}
        ),
    ],
)
def test_text_that_would_run_is_refused(
    change: Callable[[Any, str], object], members: Members, tmp_path: Path
) -> None:
    flag = tmp_path / "ran"
    case = edited(members, MODEL, lambda model: change(model, RUN.format(flag)))
    with pytest.raises(CheckpointError, match="safely"):
        open_exported(write(tmp_path / "a.pt2", case))
    assert not flag.exists()


def test_what_the_file_says_of_guards_is_not_run(members: Members, tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    case = edited(members, MODEL, lambda m: m.update(guards_code=[RUN.format(flag)]))
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_exported(write(tmp_path / "a.pt2", case))
    assert not flag.exists()


def test_sizes_are_arithmetic() -> None:
    for text in ("s27", "2*s0 + 1", "Symbol('s27', positive=True, integer=True)", "u0**2"):
        assert _is_size(text)
    assert _is_size("Add(Mul(Integer(2), Symbol('s1')), Pow(Symbol('s1'), Integer(-1)))")
    bad = ["9**9**9", "Pow(Integer(9), Integer(9999))", "().__class__", "open('x')", "s0.x", "[1]"]
    bad += ["Symbol('x y')", "Symbol('s0', positive=open('x'))", "'a'*9", "lambda: 1", "1" * 3000]
    bad += ["Pow(" * 5 + "s0" + ", Integer(8))" * 5, "Integer(99999999999999999999)", ""]
    for text in bad:
        assert not _is_size(text), text


def test_operators_compute() -> None:
    for name in ("torch.ops.aten.mul.Tensor", "torch.sym_max", "_operator.add"):
        assert _is_operator(name)
    for name in ("torch.load", "_operator.attrgetter", "math.__loader__", "torch.ops.aten.x.y"):
        assert not _is_operator(name)


def test_archives_that_lie_are_refused(members: Members, tmp_path: Path) -> None:
    deflated = write(tmp_path / "deflated.pt2", members, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        open_exported(deflated)
    twice = write(tmp_path / "twice.pt2", members)
    with zipfile.ZipFile(twice, "a") as file:
        file.writestr("model/Models/model.json", "{}")
    with pytest.raises(CheckpointError, match="twice"):
        open_exported(twice)
    # Two archives, one after the other: which is read depends on the reader.
    two = write(tmp_path / "two.pt2", members)
    two.write_bytes(two.read_bytes() * 2)
    with pytest.raises(CheckpointError, match="not where its end says"):
        open_exported(two)


@pytest.mark.parametrize("data", [b"", b"PK\5\6" + bytes(18), b"hello"])
def test_what_is_no_archive_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt2").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.pt2"):
        open_exported(tmp_path / "a.pt2")
    with pytest.raises(CheckpointError, match="no such file"):
        open_exported(tmp_path / "b.pt2")


class Branches(Small):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x * 2 if ids.shape[1] > self.at else x)


@pytest.mark.parametrize("at", [20, 64, 500])
def test_a_branch_ends_the_lengths_that_it_holds_for(at: int, tmp_path: Path) -> None:
    """Export took the short side: the other one is in no graph."""
    length = torch.export.Dim.DYNAMIC
    ids = torch.ones(1, 9, dtype=torch.int64)
    program = torch.export.export(Branches(at), (ids,), dynamic_shapes=({1: length},))
    torch.export.save(program, tmp_path / "a.pt2")
    assert open_exported(tmp_path / "a.pt2")[1] == at
    options = Options(mask_id=39, max_length=at + 4, block_length=4)
    with pytest.raises(OptionError, match=f"has {at} positions") as refused:
        compile_checkpoint(tmp_path / "a.pt2", options, tmp_path / "a.dcx")
    assert refused.value.remedy == f"--max-length {at}"


def test_a_branch_that_short_sequences_do_not_take_is_refused(tmp_path: Path) -> None:
    ids = torch.ones(1, 9, dtype=torch.int64)
    dynamic = ({1: torch.export.Dim.DYNAMIC},)
    torch.export.save(
        torch.export.export(Branches(5), (ids,), dynamic_shapes=dynamic), tmp_path / "a.pt2"
    )
    with pytest.raises(CheckpointError, match="holds only for lengths where"):
        open_exported(tmp_path / "a.pt2")
