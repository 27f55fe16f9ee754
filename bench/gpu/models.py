"""Models of real sizes with random weights: compiled from a checkpoint of holes, weights drawn on the GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from checkpoints import SHAPES, make_config
from torch import Tensor

from dcompile.codegen.backends import Code, backend_of
from dcompile.driver.origin import Origin, open_origin, trace_origin
from dcompile.driver.pipeline import run
from dcompile.driver.settle import Settled, settle
from dcompile.ir.edit import value
from dcompile.ir.program import Program
from dcompile.options import Options
from dcompile.runtime.artifact import Artifact
from dcompile.runtime.cuda.executor import CudaExecutor
from dcompile.runtime.plan import Plan
from dcompile.runtime.tensors import array_of
from dcompile.runtime.weights import Array, Entry, raw
from gpu.machine import Machine

HF = {
    "max_position_embeddings": 8192,
    "vocab_size": 157184,
    "hidden_size": 2048,
    "num_attention_heads": 16,
}
REAL: Mapping[str, tuple[str, dict[str, Any]]] = {
    "LLaDA-MoE-7B-A1B": (
        "llada_moe",
        {
            **HF,
            "num_key_value_heads": 16,
            "num_hidden_layers": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "expert_intermediate_size": 1024,
            "dense_intermediate_size": 8192,
            "moe_layer_freq": [1] * 16,
        },
    ),
    "LLaDA2.0-mini": (
        "llada2",
        {
            **HF,
            "num_key_value_heads": 4,
            "num_hidden_layers": 20,
            "head_dim": 128,
            "rotary_dim": 64,
            "intermediate_size": 5120,
            "moe_intermediate_size": 512,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "block_length": 32,
        },
    ),
    "LLaDA-8B": (
        "llada",
        {
            "d_model": 4096,
            "n_heads": 32,
            "n_kv_heads": 32,
            "n_layers": 32,
            "mlp_hidden_size": 12288,
            "vocab_size": 126464,
            "embedding_size": 126464,
            "max_sequence_length": 8192,
        },
    ),
}
TINY: Mapping[str, tuple[str, dict[str, Any]]] = {
    "tiny LLaDA-MoE": ("llada_moe", {}),
    "tiny LLaDA2": ("llada2", {"block_length": 8}),
    "tiny LLaDA": ("llada", {}),
}


@dataclass
class Model:
    """A compiled step with random weights on the device, and what rivals are made from."""

    name: str
    origin: Origin
    settled: Settled
    program: Program
    code: Code
    executor: CudaExecutor
    tensors: dict[str, Tensor]
    where: str
    experts: int

    def close(self) -> None:
        self.executor.close()
        self.tensors.clear()
        if self.where == "cuda":
            torch.cuda.empty_cache()


def build(
    machine: Machine, name: str, folder: Path, batch: int, length: int, touched: int | None = None
) -> Model:
    """Compile and place a model; with `touched`, only so many experts of a layer are ever chosen."""
    family, sizes = (TINY if machine.dry else REAL)[name]
    checkpoint = holes(folder / name.replace(" ", "_"), family, sizes)
    options = Options(
        target=f"cuda:sm_{machine.device.arch}", dtype="bfloat16", batch=batch, max_length=length
    )
    if "block_length" not in sizes:
        options = replace(options, block_length=8 if machine.dry else 32, cache="dual")
    origin = open_origin(checkpoint, options)
    settled = settle(options, origin.spec)
    program = trace_origin(origin, settled, lambda _: None)
    run(program, settled.options)
    code = backend_of(settled.target)(program)
    experts = int(make_config(family, torch.bfloat16, **sizes).get("num_experts", 0))
    tensors = draw(program, code.stored, machine.where, experts, touched)
    artifact = _artifact(code, settled.options)
    held = {n: t.data_ptr() for n, t in tensors.items()} if machine.where == "cuda" else None
    if held is None:
        artifact = _with_weights(artifact, tensors)
    executor = CudaExecutor(artifact, machine.device, held=held)
    return Model(name, origin, settled, program, code, executor, tensors, machine.where, experts)


def holes(folder: Path, family: str, sizes: Mapping[str, Any]) -> Path:
    """A checkpoint whose tensors are there by name and shape only: the file is sparse."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(family, torch.bfloat16, **{"mask_token_id": 129, **sizes})
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in SHAPES[family](config).items():
        wide = name.endswith("expert_bias")
        size = torch.Size(shape).numel() * (4 if wide else 2)
        kind = "F32" if wide else "BF16"
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def draw(
    program: Program,
    stored: list[tuple[str, str, str]],
    where: str,
    experts: int = 0,
    touched: int | None = None,
) -> dict[str, Tensor]:
    """Random values for every stored tensor, scaled by what they sum over; norms are ones.

    A router's rows beyond `touched` are zeros (or their bias is far below the others): never chosen.
    """
    generator = torch.Generator(where).manual_seed(0)
    out = {}
    for tensor, name, _ in stored:
        if name in program.constants:
            out[tensor] = program.constants[name].contiguous().to(where)
            continue
        like = value(program.placeholder(name))
        shape = [int(d) for d in like.shape]
        made = torch.ones(shape, dtype=like.dtype, device=where)
        if len(shape) > 1:
            made.normal_(0.0, shape[-1] ** -0.5, generator=generator)
        if touched is not None and shape[0] == experts and len(shape) <= 2:
            made[touched:] = -100 if len(shape) == 1 else 0
        elif len(shape) == 1 and shape[0] == experts and like.dtype == torch.float32:
            made.zero_()
        out[tensor] = made
    return out


class _Files:
    """An archive in memory."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)

    def read(self, name: str) -> memoryview:
        return memoryview(self.files[name])


def _artifact(code: Code, options: Options) -> Artifact:
    files = dict(code.files)
    manifest = {"files": dict.fromkeys(files), "options": options.record(), **code.manifest}
    plan = Plan.read(json.loads(json.dumps(code.plan)), "the plan")
    return Artifact(Path("in memory"), manifest, plan, "", _Files(files))  # type: ignore[arg-type]


def _with_weights(artifact: Artifact, tensors: Mapping[str, Tensor]) -> Artifact:
    files: _Files = artifact._archive  # type: ignore[assignment]
    for name, tensor in tensors.items():
        held = array_of(tensor)
        data = raw(held)
        files.files[f"w/{name}"] = bytes(data)
        artifact.manifest["files"][f"w/{name}"] = None
        entry = Entry(f"w/{name}", held.dtype, held.shape, 0, data.nbytes)
        artifact._tensors[name] = entry
    return artifact


def inputs(model: Model, batch: int, window: int, context: int) -> dict[str, Array]:
    """One iteration of `batch` sequences: the last `window` rows of each, the last block undecided."""
    block = model.settled.shape.block_length
    slots = torch.arange(batch)
    positions = torch.arange(context - window, context)
    at = torch.arange(context - block, context)
    shift = int(model.origin.spec.shift)
    rows = (at - shift - (context - window)).clamp_min(0)
    known = {
        "row_seq": slots.repeat_interleave(window),
        "row_pos": positions.repeat(batch),
        "row_limit": torch.full((batch * window,), context),
        "block_seq": slots,
        "block_pos": at.repeat(batch, 1),
        "choice_row": rows + slots[:, None] * window,
        "iteration": torch.zeros(batch, dtype=torch.int64),
        "entered": torch.full((batch,), block),
        "temperature": torch.zeros(batch),
        "seed": torch.zeros(batch, dtype=torch.int64),
        "tick": torch.zeros(batch, dtype=torch.int64),
        "prompt_end": torch.full((batch,), context - block),
    }
    names = model.executor.plan.inputs
    return {n: array_of(known.get(n, torch.ones(batch))) for n in names}


def canvas(model: Model, batch: int, context: int) -> None:
    """Random tokens with an undecided block at the end, on the host and on the device."""
    held = model.executor.state["canvas"]
    spec, block = model.origin.spec, model.settled.shape.block_length
    generator = torch.Generator().manual_seed(1)
    held[:batch, :context] = torch.randint(0, 100, (batch, context), generator=generator)
    held[:batch, context - block : context] = spec.mask_id
    model.executor.memory.state.push()
