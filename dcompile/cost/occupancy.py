"""How many warps of a kernel a streaming multiprocessor holds at once, by what the kernel needs.

The rules are those of NVIDIA's occupancy calculator for compute capability 8.0 to 12.0: registers are given
out a warp at a time in units of 256, to a multiple of four warps; shared memory a block in units of 128 bytes,
1 KiB of which the system keeps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dcompile.codegen.triton.tiles import ARCHITECTURES
from dcompile.runtime.artifact import Artifact

_REGISTERS, _REGISTER_UNIT, _WARP_UNIT = 65536, 256, 4
_SHARED_UNIT, _RESERVED = 128, 1024


def resident_blocks(arch: int, warps: int, registers: int, shared: int) -> int:
    """Blocks of `warps` warps that fit beside each other; `registers` a thread, `shared` bytes a block."""
    chip = ARCHITECTURES[arch]
    found = [chip.blocks, chip.warps // warps]
    if registers:
        each = -(-32 * registers // _REGISTER_UNIT) * _REGISTER_UNIT
        found.append(_REGISTERS // each // _WARP_UNIT * _WARP_UNIT // warps)
    block = -(-(shared + _RESERVED) // _SHARED_UNIT) * _SHARED_UNIT
    found.append((chip.shared + _RESERVED) // block)
    return min(found)


def occupancy(arch: int, warps: int, registers: int, shared: int) -> float:
    """Resident warps as a share of what the multiprocessor can hold."""
    return resident_blocks(arch, warps, registers, shared) * warps / ARCHITECTURES[arch].warps


def kernel_resources(artifact: Artifact, arch: int | None = None) -> dict[str, dict[str, Any]]:
    """Of each kernel of a CUDA artifact: registers and spilled bytes a thread, shared bytes a block, occupancy.

    `arch` is the architecture of the GPU that ran them, by default the first that the artifact is for. Empty
    where the artifact is for a processor.
    """
    if artifact.manifest["target"] != "cuda":
        return {}
    held = artifact.manifest["kernels"]
    kernels: Mapping[str, Any] = json.loads(artifact.text(held["table"]))["kernels"]
    name = f"sm_{arch if arch in held['architectures'] else held['architectures'][0]}"
    return {k: resources(entry["binaries"][name], int(name[3:])) for k, entry in kernels.items()}


def resources(binary: Mapping[str, Any], arch: int) -> dict[str, Any]:
    """What one binary needs of the chip."""
    shared = binary["static_shared"] + binary["dynamic_shared"]
    warps = binary["warps"]
    share = occupancy(arch, warps, binary["registers"], shared)
    return {
        **{"registers": binary["registers"], "spills": binary["stack"], "shared": shared},
        **{"warps": warps, "occupancy": f"{share:.0%}"},
    }
