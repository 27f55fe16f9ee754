"""Every operator is whole: in each table, or in its list of exceptions with a reason."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tables import TABLES, missing

from dcompile import codegen
from dcompile.codegen.cpu import operands as cpu
from dcompile.codegen.cpu.build import library_abi
from dcompile.codegen.cuda import operands as cuda
from dcompile.codegen.operands import Kernel
from dcompile.cost.call import family
from dcompile.ir import operators
from dcompile.ir.operators import ATEN, OPERATORS, Operator
from dcompile.ir.work.formulas import WORKS
from dcompile.runtime.cpu.abi import read_kernels

aten = torch.ops.aten
FUSED = {operator.overload for operator in OPERATORS}
NAMED = {operator.name: operator for operator in (*OPERATORS, *ATEN)}
# Of ATen, what a table has besides the operators with kernels: another spelling, and a write.
OTHERS = {aten.index.Tensor, aten.index_put.default}
KERNELS = {**cpu.KERNELS, **cuda.KERNELS}


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_an_operator_is_in_each_table_or_excused(operator: Operator) -> None:
    assert missing(operator.overload) == []
    assert operator.work is WORKS[operator.name]
    assert "dcompile" in operator.overload.name() and operator.reference.__doc__


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_nothing_else(name: str) -> None:
    table, excused = TABLES[name]
    assert not table.keys() & excused.keys()
    assert set(table) <= FUSED | {o.overload for o in ATEN} | OTHERS
    assert set(excused) <= FUSED and all(excused.values())


def test_every_file_of_an_operator_is_listed() -> None:
    found = set()
    for module in pkgutil.iter_modules(operators.__path__):
        if module.name != "aten":
            loaded = importlib.import_module(f"{operators.__name__}.{module.name}")
            found |= {v.overload for v in vars(loaded).values() if isinstance(v, Operator)}
    assert found == FUSED
    assert set(WORKS) == set(NAMED)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_names_operands_that_are_there(name: str) -> None:
    for part in KERNELS[name].parts:
        operands = [operand.name for operand in part.read()]
        assert set(operands) <= set(NAMED[part.operator].operands)
        assert len(operands) == len(set(operands)) and 0 <= part.share <= 1


def arguments(kernel: Kernel) -> set[str]:
    parts = {operand.argument for part in kernel.parts for operand in part.read()}
    return (parts | set(kernel.beside.split())) - {""}


def test_every_kernel_of_the_library_says_what_it_computes() -> None:
    library = read_kernels(library_abi())
    assert {family(name) for name in library} == set(cpu.KERNELS)
    for name, kernel in library.items():
        buffers = {p.name for p in kernel.parameters if p.kind == "b"}
        assert arguments(cpu.KERNELS[family(name)]) == buffers, name


def test_every_triton_kernel_says_what_it_computes() -> None:
    folder = Path(codegen.__file__).parent / "kernels"
    text = "".join(path.read_text() for path in sorted(folder.glob("*.py")))
    names = re.findall(r'"([a-z_]+:[a-z_]+)"', text)
    launched = {n for n in names if (folder / f"{n.partition(':')[0]}.py").exists()}
    assert launched == set(cuda.KERNELS) | set(cuda.WITHOUT_OPERATOR)
    for name, kernel in cuda.KERNELS.items():
        module, _, function = name.partition(":")
        loaded = importlib.import_module(f"dcompile.codegen.kernels.{module}")
        parameters = inspect.signature(getattr(loaded, function).fn).parameters
        assert arguments(kernel) <= set(parameters), name


def test_shares_of_a_split_operator_add_up() -> None:
    split = ("moe_ffn:sort_by_expert", "moe_ffn:gate_up", "moe_ffn:down")
    assert sum(cuda.KERNELS[name].parts[0].share for name in split) == pytest.approx(1)


def test_what_an_operator_costs_needs_no_torch() -> None:
    """An artifact is profiled and explained where torch is not installed."""
    names = ("ir.work.formulas", "codegen.cpu.operands", "codegen.cuda.operands")
    code = f"import sys, {', '.join(f'dcompile.{n}' for n in names)}; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
