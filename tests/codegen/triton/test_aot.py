"""Every family compiles for sm_90 without a GPU, at the widths of real checkpoints, and passes the gate."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from kernel_shapes import MODELS, lowerings, variants

from dcompile.codegen.kernels import linear
from dcompile.codegen.triton import gate
from dcompile.codegen.triton.aot import Compiled, compile_variants, key
from dcompile.codegen.triton.tiles import Tiles
from dcompile.codegen.triton.variant import Parameter, Variant, unaligned
from dcompile.errors import BuildError

ARCH = 90
SIZES = {"i32": 4, "i64": 8, "fp32": 4}
LINEAR = linear.launches(rows={"R": 1}, n=256, k=512, dtype="bf16", arch=ARCH).steps[0].variant


@cache
def binaries() -> dict[str, list[Compiled]]:
    """All models' kernels, compiled in one go."""
    wanted = {name: variants(lowerings(model, ARCH)) for name, model in MODELS.items()}
    distinct = list(dict.fromkeys(v for found in wanted.values() for v in found))
    built = dict(zip(distinct, compile_variants(distinct, ARCH), strict=True))
    return {name: [built[v] for v in found] for name, found in wanted.items()}


@pytest.mark.parametrize("model", MODELS)
def test_the_kernels_of_a_model_pass_the_gate(model: str) -> None:
    for compiled in binaries()[model]:
        assert not list(gate.problems(compiled)), compiled.variant.name


def expected_parameters(arguments: tuple[Parameter, ...]) -> list[tuple[int, int, int]]:
    """The launch rule: arguments in order at their own width, then two pointers."""
    found, offset = [], 0
    for i, size in enumerate([8 if p.is_pointer else SIZES[p.type] for p in arguments] + [8, 8]):
        offset = -(-offset // size) * size
        found.append((i, offset, size))
        offset += size
    return found


def test_parameters_are_those_of_the_variant() -> None:
    for compiled in binaries()["llada_moe"]:
        assert list(compiled.parameters) == expected_parameters(compiled.variant.arguments)
        assert compiled.scratch == 0
        assert compiled.entry == compiled.variant.kernel.partition(":")[2]
        assert compiled.warps == compiled.variant.num_warps


def test_names_are_unique_in_a_model() -> None:
    for model in MODELS.values():
        names = [v.name for v in variants(lowerings(model, ARCH))]
        assert len(set(names)) == len(names)


def test_the_gate_refuses_a_spiller() -> None:
    """One warp cannot hold a 128 x 128 tile of sums in its registers."""
    tiles = Tiles(128, 128, 32, warps=1, stages=2)
    lowering = linear.launches(rows={"R": 1}, n=256, k=512, dtype="bf16", arch=ARCH, tiles=tiles)
    compiled = compile_variants([lowering.steps[0].variant], ARCH)
    assert compiled[0].stack > 0
    with pytest.raises(BuildError, match="spills"):
        gate.check(compiled)


def test_the_gate_refuses_what_only_the_loader_would() -> None:
    tiles = Tiles(32, 128, 256, warps=4, stages=4)
    lowering = linear.launches(rows={"R": 1}, n=256, k=2048, dtype="bf16", arch=ARCH, tiles=tiles)
    compiled = compile_variants([lowering.steps[0].variant], ARCH)
    with pytest.raises(BuildError, match="shared memory"):
        gate.check(compiled)


def test_the_gate_refuses_narrow_loads_and_missing_tensor_cores() -> None:
    (compiled,) = compile_variants([LINEAR], ARCH)
    assert not list(gate.problems(compiled))
    found = {**compiled.instructions, "mma": 0, "wgmma": 0, "wide_loads": 0, "narrow_loads": 48}
    problems = list(gate.problems(replace(compiled, instructions=found)))
    assert [p.partition(",")[0] for p in problems] == [
        "a product without tensor-core instructions",
        *["contiguous rows"] * 2,
    ]


def test_forgotten_alignment_makes_narrow_loads() -> None:
    """The gate's fact is real: the same kernel without the promise of alignment has no wide load of x."""
    moved = unaligned(LINEAR, frozenset(p.name for p in LINEAR.arguments))
    (compiled,) = compile_variants([moved], ARCH)
    assert compiled.instructions["wide_loads"] == 0


def test_binaries_are_the_same_from_any_folder(tmp_path: Path) -> None:
    text = "import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef double(x):\n" + (
        "    i = tl.arange(0, 32)\n    tl.store(x + i, 2 * tl.load(x + i))\n"
    )
    variant = Variant(
        "double", "emitted:double", (Parameter("x", "*fp32", True),), (), (1, 1, 1), 1, 1
    )
    first, second = (
        compile_variants([variant], ARCH, {"emitted": text}, folder=tmp_path / name)[0].cubin
        for name in ("one", "another/folder")
    )
    assert first == second
    assert str(tmp_path).encode() not in first


def test_the_key_holds_all_that_a_binary_depends_on() -> None:
    keys = {
        key(LINEAR, 90, {}),
        key(LINEAR, 80, {}),
        key(replace(LINEAR, num_stages=2), 90, {}),
        key(LINEAR, 90, {"dcompile.codegen.kernels.pointwise": "changed"}),
    }
    assert len(keys) == 4


def test_a_refused_kernel_is_named(tmp_path: Path) -> None:
    text = "import triton\n\n\n@triton.jit\ndef broken(x):\n    no_such_function(x)\n"
    variant = Variant("broken_1", "emitted:broken", (Parameter("x", "*fp32"),), (), (1, 1, 1), 1, 1)
    with pytest.raises(
        BuildError, match=r"broken_1 does not compile for sm_90: .*no_such_function"
    ):
        compile_variants([variant], ARCH, {"emitted": text}, folder=tmp_path)
