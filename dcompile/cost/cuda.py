"""A CUDA plan with what its kernels' table says of each launch: function, argument names, constants."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dcompile.runtime.artifact import Artifact


def described(artifact: Artifact) -> Mapping[str, Any]:
    """An artifact's plan; each launch of a CUDA kernel says its function, named arguments and constants."""
    plan = artifact.plan.text
    if artifact.manifest["target"] != "cuda":
        return plan
    kernels = json.loads(artifact.text(artifact.manifest["kernels"]["table"]))["kernels"]
    return {**plan, "launches": [_described(one, kernels) for one in plan["launches"]]}


def _described(launch: Mapping[str, Any], kernels: Mapping[str, Any]) -> Mapping[str, Any]:
    entry = kernels[launch["kernel"]]
    names = [argument["name"] for argument in entry["arguments"]]
    return {
        **launch,
        "function": entry["kernel"].removeprefix("dcompile.codegen.kernels."),
        "named": dict(zip(names, launch["args"], strict=True)),
        "constants": dict(entry["constants"]),
    }
