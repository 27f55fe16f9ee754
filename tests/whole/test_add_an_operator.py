"""CONTRIBUTING's way for an operator, walked with a toy: refused until the tables have it, then whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from check import check_pass
from checkpoints import write_checkpoint
from tables import TABLES, missing
from torch import Tensor
from torch.fx import Node
from torch.library import custom_op

from dcompile.codegen.cpu import select as cpu
from dcompile.codegen.cuda import select as cuda
from dcompile.codegen.kernels import silu_mul as triton_kernel
from dcompile.codegen.launches import Launch, Value
from dcompile.driver import pipeline
from dcompile.driver.compile import compile_checkpoint
from dcompile.errors import UnsupportedModel
from dcompile.ir.edit import replace, value
from dcompile.ir.operators import Operator
from dcompile.ir.program import Exactness, Pass, Program
from dcompile.ir.work import Extent, Operands, Touched, Work
from dcompile.options import Options
from dcompile.passes.fuse_silu_mul import FuseSiluMul
from dcompile.runtime.decode.loop import Runner

aten = torch.ops.aten
OPTIONS = Options(max_length=32, block_length=8)


# 1. The operator: what it means, its fake, its work.


def mul_silu(up: Tensor, gate: Tensor) -> Tensor:
    """up * silu(gate): silu_mul with its operands in the other order."""
    return torch.nn.functional.silu(gate) * up


def work(of: Operands, touched: Touched) -> Work:
    return Work(of.bytes(), 4 * of["y"].elements)


registered = custom_op("dcompile::mul_silu", mul_silu, mutates_args=())
registered.register_fake(lambda up, gate: up.new_empty(up.shape))
MUL_SILU = torch.ops.dcompile.mul_silu.default
OPERATOR = Operator(MUL_SILU, mul_silu, ("y",), work, body=mul_silu)


# 2. The pass that makes it, and its place in the pipeline.


@dataclass(frozen=True)
class FuseMulSilu:
    """u * silu(g)  ->  mul_silu(u, g)"""

    exactness = Exactness.ROUNDING

    def __call__(self, program: Program) -> int:
        sites = [n for n in program.calls(aten.mul.Tensor) if _gate(n) is not None]
        for node in sites:
            gate = _gate(node)
            assert gate is not None
            (up,) = (a for a in node.args if a is not gate)
            replace(program, node, MUL_SILU, up, gate.args[0])
        return len(sites)


def _gate(node: Node) -> Node | None:
    gates = [a for a in node.args if isinstance(a, Node) and a.target is aten.silu.default]
    return gates[0] if len(gates) == 1 and len(gates[0].users) == 1 else None


@pytest.fixture
def in_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy's pass in the place of fuse_silu_mul."""
    theirs: Callable[[Options], tuple[Pass, ...]] = pipeline.passes

    def passes(options: Options) -> tuple[Pass, ...]:
        return tuple(FuseMulSilu() if isinstance(p, FuseSiluMul) else p for p in theirs(options))

    monkeypatch.setattr(pipeline, "passes", passes)


# 3. The tables.


def cpu_selector(program: Program, node: Node) -> Launch | None:
    up, gate = node.args
    end = cpu._suffix(up, gate)
    if end is None:
        return None
    width = cpu.last(node)
    args = [Value(node), Value(gate), Value(up), cpu.rows_of(program, node), width, width, width]
    return Launch("native", f"silu_mul_{end}", node, args, writes=[node], covers=[node])


def cuda_selector(f: cuda.Families, node: Node) -> cuda.Site | None:
    up, gate = node.args
    dtype = cuda.short(up, gate)
    if dtype is None:
        return None
    width = int(value(node).shape[-1])
    lowering = triton_kernel.launches(rows=f.rows(node), width=width, dtype=dtype)
    return cuda.Site(lowering, cuda.operands(y=node, gate=gate, up=up), [node], [node])


SELECTORS = {"CPU selectors": cpu_selector, "CUDA selectors": cuda_selector}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("toy") / "checkpoint", "llada")


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, (table, _) in TABLES.items():
        monkeypatch.setitem(table, MUL_SILU, SELECTORS.get(name, OPERATOR.body))  # type: ignore
    yield


def test_its_pass_runs_without_any_kernel() -> None:
    check_pass(
        FuseMulSilu(),
        lambda g, u: (torch.nn.functional.silu(g) * u,),
        {"g": torch.randn(5, 8), "u": torch.randn(5, 8)},
        after="""
            v0: f32[R, 8] = dcompile.mul_silu(u, g)
            return (v0,)
        """,
    )


def test_its_work_is_counted() -> None:
    given = {name: Extent((5, 8), 160) for name in ("y", "gate")}
    assert set(given) <= set(OPERATOR.operands) and OPERATOR.name == "mul_silu"
    # `up` is in no memory.
    assert OPERATOR.work(Operands(given), Touched()) == Work(bytes=320, flops=160)


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
@pytest.mark.usefixtures("in_the_pipeline")
def test_without_a_kernel_it_is_refused(target: str, checkpoint: Path, tmp_path: Path) -> None:
    assert missing(MUL_SILU) == list(TABLES)
    with pytest.raises(UnsupportedModel) as refused:
        compile_checkpoint(checkpoint, OPTIONS.changed(target=target), tmp_path / "model.dcx")
    name = target.partition(":")[0].upper()
    assert refused.value.what == f"dcompile.mul_silu has no {name} kernel"
    # The graph's line, and the module of the model that it came from.
    assert "dcompile.mul_silu(" in str(refused.value.where)
    assert "# layers.0" in str(refused.value.where)
    assert "CONTRIBUTING.md" in str(refused.value.remedy)


@pytest.mark.parametrize(("target", "table"), [("cpu", cpu.TABLE), ("cuda:sm_90", cuda.TABLE)])
@pytest.mark.usefixtures("in_the_pipeline")
def test_a_kernel_for_other_dtypes_is_another_refusal(
    target: str,
    table: dict[object, object],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(table, MUL_SILU, lambda program, node: None)
    with pytest.raises(UnsupportedModel) as refused:
        compile_checkpoint(checkpoint, OPTIONS.changed(target=target), tmp_path / "model.dcx")
    name = target.partition(":")[0].upper()
    stem = f"no {name} kernel of dcompile.mul_silu takes these dtypes and shapes: f32["
    assert refused.value.what.startswith(stem)
    assert "--dtype" in str(refused.value.remedy)


@pytest.mark.usefixtures("in_the_pipeline", "whole")
def test_with_the_tables_it_is_whole(checkpoint: Path, tmp_path: Path) -> None:
    assert missing(MUL_SILU) == []
    made = compile_checkpoint(checkpoint, OPTIONS, tmp_path / "toy.dcx")
    assert "silu_mul_f32" in {launch.kernel for launch in Runner.load(made).executor.plan.launches}
    (ours,) = Runner.load(made).generate([[3, 14, 15]], gen_length=8)
    compile_checkpoint(checkpoint, OPTIONS.changed(target="cuda:sm_90"), tmp_path / "gpu.dcx")
    plain = compile_checkpoint(
        checkpoint, OPTIONS.changed(skip=("fuse_mul_silu",)), tmp_path / "plain.dcx"
    )
    (theirs,) = Runner.load(plain).generate([[3, 14, 15]], gen_length=8)
    assert ours.tokens == theirs.tokens
