"""Where a model comes from: what a checkpoint or a module is, and how it is traced."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dcompile.driver.settle import Settled
from dcompile.errors import ConfigError
from dcompile.frontends.base import Defaults, ModelSpec
from dcompile.ir.program import Program
from dcompile.ir.remarks import Remark
from dcompile.ir.weights import Read, Recipe, Source
from dcompile.options import Options
from dcompile.step.repeat_layers import Run, runs_of
from dcompile.step.trace import Traced, fake_weights, trace

log = logging.getLogger(__name__)
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: its facts, how to trace it, and its tensors."""

    spec: ModelSpec
    recipes: Mapping[str, Recipe]
    read: Read
    runs: tuple[Run, ...]
    build: Callable[[], nn.Module]
    tokenizer: Mapping[str, bytes]
    digest: str
    remarks: tuple[Remark, ...] = ()


def open_origin(path: Path, options: Options) -> Origin:
    """What a checkpoint is, without reading its tensors."""
    if path.suffix == ".pt2":
        from dcompile.frontends.exported import open_exported

        return of_module(*open_exported(path), options=options)
    from dcompile.frontends.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path, options.mask_id, options.block_length)
    spec = checkpoint.spec
    if options.eos_ids is not None:
        spec = replace(spec, eos_ids=options.eos_ids)
    runs = runs_of(spec.layer_kinds)

    def build_traced() -> nn.Module:
        return checkpoint.build([r.layers[0] for r in runs]).eval()

    return Origin(
        spec,
        checkpoint.recipes,
        checkpoint.read,
        runs,
        build_traced,
        checkpoint.tokenizer_files(),
        checkpoint.digest(),
        _unread(path, checkpoint.unread),
    )


def _unread(path: Path, keys: tuple[str, ...]) -> tuple[Remark, ...]:
    """Says which keys of a config the compile does not know, and remarks them."""
    if keys:
        text = "%s: the config has keys that are not known and not obeyed: %s"
        log.warning(text, path, ", ".join(keys))
    return tuple(Remark("open", key, "this key of the config is not known") for key in keys)


def of_module(module: nn.Module, longest: int | None = None, *, options: Options) -> Origin:
    """A user's own module, which holds for sequences of up to `longest` positions (None: any)."""
    if options.mask_id is None:
        raise ConfigError("a module does not say its mask token", remedy="--mask-id / mask_id=...")
    # An exported program has no modes; it was exported in the one that it has.
    if not isinstance(module, torch.fx.GraphModule):
        module.eval()
    # Tied weights keep all their names.
    parameters = dict(module.named_parameters(remove_duplicate=False))
    tensors = {**parameters, **dict(module.named_buffers(remove_duplicate=False))}
    floating = [t.dtype for t in tensors.values() if t.is_floating_point()]
    spec = ModelSpec(
        family="module",
        vocab_size=0,
        mask_id=options.mask_id,
        eos_ids=options.eos_ids or (),
        max_positions=longest,
        block_length=None,
        shift=False,
        dtype=max(set(floating), key=floating.count) if floating else torch.float32,
        layer_kinds=(),
        defaults=Defaults(),
    )
    recipes = {name: Source(name) for name in parameters}
    return Origin(
        spec, recipes, lambda name: tensors[name].detach(), (), lambda: module, {}, "module"
    )


def trace_origin(origin: Origin, settled: Settled, progress: Progress) -> Program:
    """Trace with settled options; layers of one kind once, without their weights."""
    progress("trace")
    wanted = Traced(
        settled.shape,
        settled.policy,
        origin.recipes,
        origin.runs,
        pipelined=settled.combination.manager == "pipelined",
        smoothing=settled.combination.smoothing,
    )
    with fake_weights() if origin.runs else nullcontext():
        module = origin.build()
        dtype = settled.shape.dtype
        made = trace(module if dtype == origin.spec.dtype else _in_dtype(module, dtype), wanted)
    made.remarks += origin.remarks
    return made


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy that computes in `dtype`: `module.to` would change the user's, and fails on fake tensors."""
    made: dict[int, object] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        held = tensor.detach()
        held = held.to(dtype) if held.is_floating_point() else held
        kept = isinstance(tensor, nn.Parameter)
        made[id(tensor)] = nn.Parameter(held, requires_grad=False) if kept else held
    try:
        return copy.deepcopy(module, made)
    except (TypeError, RuntimeError) as error:
        name = str(dtype).removeprefix("torch.")
        what = (
            f"the module cannot be copied to compute in {name}: {str(error).partition(chr(10))[0]}"
        )
        remedy = f"convert it before, module.to(torch.{name}), or leave --dtype out"
        raise ConfigError(what, remedy=remedy) from error
