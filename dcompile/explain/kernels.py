"""The kernels of an artifact as a table: launches, MB read, roles, sources; CUDA's needs of the chip.

MB read are what all launches of a kernel must read of weights and caches in one forward of a block at
the end of the longest canvas, with uniform routing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from dcompile.cost.cuda import described
from dcompile.cost.launches import costs, window_facts
from dcompile.cost.occupancy import occupancy
from dcompile.cost.sources import source_of
from dcompile.runtime.artifact import Artifact

Launch = Mapping[str, Any]


def kernel_table(artifact: Artifact) -> str:
    """Each kernel with its launches, most first."""
    grouped: dict[str, list[Launch]] = {}
    for launch in artifact.plan.text["launches"]:
        grouped.setdefault(launch["kernel"], []).append(launch)
    ordered = dict(sorted(grouped.items(), key=lambda item: -len(item[1])))
    streamed = _streamed(artifact)
    if artifact.manifest["target"] == "cuda":
        return _cuda_table(artifact, ordered, streamed)
    lines = [f"{'kernel':32}{'launches':>9}{'MB read':>10}  {'source':32}roles"]
    for kernel, launches in ordered.items():
        source = source_of(artifact, kernel)
        file = source.file if source is not None else "torch"
        counts = f"{len(launches):9}{_megabytes(streamed[kernel])}"
        lines.append(f"{kernel:32}{counts}  {file:32}{_roles(kernel, launches)}")
    return "\n".join(lines) + "\n"


def _streamed(artifact: Artifact) -> Counter[str]:
    """Bytes by kernel."""
    plan, out = described(artifact), Counter[str]()
    for launch, work in zip(plan["launches"], costs(plan, window_facts(plan)), strict=True):
        out[launch["kernel"]] += round(work.streamed)
    return out


def _megabytes(count: int) -> str:
    return f"{count / 1e6:10.2f}" if count else f"{'-':>10}"


def _roles(kernel: str, launches: list[Launch]) -> str:
    return ", ".join(dict.fromkeys(str(launch.get("role") or kernel) for launch in launches))


def _cuda_table(
    artifact: Artifact, grouped: Mapping[str, list[Launch]], streamed: Counter[str]
) -> str:
    """For each architecture: registers and spilled bytes a thread, shared bytes a block, instructions."""
    kernels = json.loads(artifact.text(artifact.manifest["kernels"]["table"]))["kernels"]
    lines = []
    width = max(map(len, kernels)) + 1
    for arch in artifact.manifest["kernels"]["architectures"]:
        columns = f"{'launches':>9}{'MB read':>10}{'warps':>6}{'registers':>10}{'spills':>7}"
        columns += f"{'shared':>8}{'occ.':>6}"
        lines.append(f"{f'sm_{arch}':{width}}{columns}{'tensor':>7}{'wide':>5}  roles")
        for name, entry in kernels.items():
            launches = grouped.get(name, [])
            lines.append(
                f"{name:{width}}{len(launches):9}{_megabytes(streamed[name])}"
                f"{_resources(entry, arch)}  {_roles(name, launches)}"
            )
        lines.append("")
    return "\n".join([*lines, *_per_layer(grouped)]) + "\n"


def _resources(entry: Mapping[str, Any], arch: int) -> str:
    found = entry["binaries"][f"sm_{arch}"]
    counts = found["instructions"]
    tensor = counts["mma"] + counts["wgmma"] + counts["tcgen05"]
    shared = found["static_shared"] + found["dynamic_shared"]
    share = occupancy(arch, found["warps"], found["registers"], shared)
    needs = f"{found['warps']:6}{found['registers']:10}{found['stack']:7}{shared:8}{share:6.0%}"
    return f"{needs}{tensor:7}{counts['wide_loads']:5}"


def _per_layer(grouped: Mapping[str, list[Launch]]) -> Iterator[str]:
    """How many launches a layer has, layers of one count together."""
    by_layer = Counter(launch["layer"] for found in grouped.values() for launch in found)
    outside = by_layer.pop(None, 0)
    by_count: dict[int, list[int]] = {}
    for layer, count in sorted(by_layer.items()):
        by_count.setdefault(count, []).append(layer)
    for count, layers in sorted(by_count.items(), reverse=True):
        which = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
        yield f"{count} launches a layer: {which}"
    yield f"{outside} launches outside layers"
