"""Against Triton's own compiler: what it makes is read alike, and the loop's PTX assembles everywhere."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fake_cuda import FakeCuda

from dcompile.codegen.kernels import norms
from dcompile.codegen.triton.aot import compile_variants
from dcompile.cubin import read_cubin
from dcompile.runtime.cuda.graphs import SET_CONDITION, Call, packed
from dcompile.runtime.cuda.table import Argument, layout

triton = pytest.importorskip("triton")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@pytest.mark.parametrize("arch", ["80", "86", "89", "90a", "100a", "120a"])
def test_the_condition_assembles(arch: str, tmp_path: Path) -> None:
    source, out = tmp_path / "c.ptx", tmp_path / "c.cubin"
    source.write_text(SET_CONDITION)
    tool = "ptxas-blackwell" if int(arch.rstrip("a")) >= 100 else "ptxas"
    command = [str(TOOLS / tool), f"-arch=sm_{arch}", str(source), "-o", str(out)]
    subprocess.run(command, check=True)
    facts = read_cubin(out.read_bytes())
    assert facts.entry == "set_condition" and facts.stack == 0
    assert facts.arch == int(arch.rstrip("a"))
    assert facts.parameters == ((0, 0, 8), (1, 8, 8))


@pytest.mark.parametrize("arch", [80, 120])
def test_a_real_cubin_is_read_as_the_vendors_tool_reads_it(
    arch: int, fake: FakeCuda, tmp_path: Path
) -> None:
    (step,) = norms.launches(rows={"R": 1}, hidden=256, dtype="bf16", eps=1e-6).steps
    (made,) = compile_variants([step.variant], arch)
    facts = read_cubin(made.cubin)
    assert facts.arch == arch
    # What the worker kept beside the binary is what is read of it again.
    for name in ("entry", "registers", "stack", "static_shared", "parameters"):
        assert getattr(facts, name) == getattr(made, name)
    dump = str(TOOLS / "cuobjdump")
    (tmp_path / "kernel.cubin").write_bytes(made.cubin)
    command = [dump, "--dump-resource-usage", str(tmp_path / "kernel.cubin")]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"REG:{facts.registers} STACK:{facts.stack} SHARED:{facts.static_shared} " in told
    arguments = [Argument(p.name, p.type, p.aligned) for p in step.variant.arguments]
    assert facts.parameters == layout(arguments)
    fake.attribute(75, arch // 10)
    fake.attribute(76, arch % 10)
    device = fake.device()
    # The fake driver finds where the file ends, as it finds the kernel's parameters: it gets neither.
    launched: list[str] = []
    fake.by_digest[fake.digest(made.cubin)] = lambda launch: launched.append(launch.name)
    function = device.function(device.module(made.cubin, "a kernel"), facts.entry)
    values = [bytes(size) for _, _, size in facts.parameters]
    pointers, data = packed(values, facts.parameters)
    Call(function, (1, 1, 1), 32, 0, pointers, data, "").launch(
        device.driver.function("cuLaunchKernel"), device.stream
    )
    device.wait()
    assert launched == [facts.entry]
