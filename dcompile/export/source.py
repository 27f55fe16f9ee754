"""What is exported: the planned program, its tensors and the model's facts, from an artifact or a checkpoint.

From a checkpoint the program goes through the same JSON that an artifact holds, so both give the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcompile.codegen.pack import packed_size, unpack_linear
from dcompile.driver.manifest import manifest_facts
from dcompile.driver.origin import open_origin, trace_origin
from dcompile.driver.pipeline import run
from dcompile.driver.record import Announcer
from dcompile.driver.settle import settle
from dcompile.errors import ArtifactError, OptionError
from dcompile.export.containers import is_artifact
from dcompile.ir import stored
from dcompile.ir.edit import value
from dcompile.ir.sizes import evaluate
from dcompile.ir.stored import StoredInput, StoredProgram
from dcompile.options import Options
from dcompile.runtime.artifact import Artifact, open_artifact
from dcompile.runtime.tensors import tensor_of

PROGRAM = "program.json"
_TOKENIZER = "tokenizer/"
_LOOP = (
    "manager",
    "aligned",
    "cache",
    "look_back",
    "look_ahead",
    "warmup",
    "refresh_every",
    "cross_block",
)


@dataclass(frozen=True)
class Source:
    """A planned program with everything that an export says of the model."""

    program: StoredProgram
    dtype: torch.dtype  # of the model's weights and activations, as compiled
    read: Callable[[StoredInput], Tensor]  # a weight or constant, in the program's dtype
    model: Mapping[str, Any]  # family, vocab_size, mask_id, eos_ids, shift, block_length
    policy: Mapping[str, Any]  # name, parameters with their defaults, state with its resets
    loop: Mapping[str, Any]  # the compile-time choices of the loop: order of blocks, rows
    tokenizer: Mapping[str, bytes]


def open_source(path: Path, options: Options, progress: Callable[[str], None]) -> Source:
    """Open an artifact, or trace and plan a checkpoint with `options`; reads no weights yet.

    Raises DcompileError: what cannot be opened or compiled, or an artifact from before `program.json`.
    """
    if is_artifact(path):
        return _of_artifact(open_artifact(path))
    return _of_checkpoint(path, options, progress)


def _of_artifact(artifact: Artifact) -> Source:
    if PROGRAM not in artifact.names:
        raise ArtifactError(
            "the artifact does not hold its program: an older dcompile wrote it",
            where=str(artifact.path),
            remedy="compile the model again, or export from the checkpoint",
        )
    where = f"{artifact.path}: {PROGRAM}"
    try:
        text = json.loads(artifact.text(PROGRAM))
    except (ValueError, RecursionError) as error:
        raise ArtifactError("the stored program is no JSON", where=where) from error
    manifest = artifact.manifest
    tokenizer = {
        name.removeprefix(_TOKENIZER): bytes(artifact.bytes(name))
        for name in artifact.names
        if name.startswith(_TOKENIZER)
    }
    return _source(
        stored.load(text, where),
        lambda item: _unpacked(artifact, item),
        manifest["model"],
        manifest["policy"],
        manifest["options"],
        tokenizer,
    )


def _unpacked(artifact: Artifact, item: StoredInput) -> Tensor:
    """A stored tensor in its plain order, exactly as the checkpoint has it."""
    if item.tensor is None or item.tensor not in artifact.tensors:
        what = f"the artifact lacks the tensor of {item.name!r}"
        raise ArtifactError(what, where=str(artifact.path), remedy="compile the model again")
    held = tensor_of(artifact.weights(item.tensor))
    shape = [evaluate(size, {}) for size in item.shape]
    if item.layout == "plain":
        return held.reshape(shape)
    n, k = shape[-2:]
    if item.layout == "packed":
        return unpack_linear(held, n, k)
    size = packed_size(n, k, held.dtype)
    out = torch.empty(shape, dtype=held.dtype)
    for e in range(shape[0]):
        out[e] = unpack_linear(held[e * size : (e + 1) * size], n, k)
    return out


def _of_checkpoint(path: Path, options: Options, progress: Callable[[str], None]) -> Source:
    options.validate()
    origin = open_origin(path, options)
    settled = settle(options, origin.spec)
    program = trace_origin(origin, settled, progress)
    run(program, settled.options, Announcer(progress))

    def read(item: StoredInput) -> Tensor:
        if item.kind == "constant":
            return program.constants[item.name].contiguous()
        wanted = value(program.placeholder(item.name)).dtype
        return program.recipes[item.name].read(origin.read).to(wanted).contiguous()

    described = json.loads(json.dumps(manifest_facts(origin, settled, program)))
    recorded = json.loads(json.dumps(settled.options.record()))
    text = json.loads(json.dumps(stored.dump(program)))
    return _source(
        stored.load(text, str(path)),
        read,
        described["model"],
        described["policy"],
        recorded,
        origin.tokenizer,
    )


def _source(
    program: StoredProgram,
    read: Callable[[StoredInput], Tensor],
    model: Mapping[str, Any],
    policy: Mapping[str, Any],
    options: Mapping[str, Any],
    tokenizer: Mapping[str, bytes],
) -> Source:
    if options.get("manager", "blockwise") == "pipelined":
        raise OptionError(
            "a step of pipelined blocks cannot be exported: its sequences have several blocks each",
            remedy="--manager blockwise",
        )
    loop = {key: options[key] for key in _LOOP if key in options}
    dtype = getattr(torch, model["dtype"])
    return Source(program, dtype, read, model, policy, loop, tokenizer)


def facts(source: Source, entry: str) -> Mapping[str, object]:
    """What a loop has to know of the model beside the graph."""
    sizes = source.program.sizes
    return {
        "entry": entry,
        "model": {**source.model, "block_length": source.program.model_block},
        "policy": source.policy,
        "loop": source.loop,
        "block_length": sizes["n"],
        "max_length": sizes["L"],
    }
