"""Compile: frontend -> trace -> passes -> emit, on one screen."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from dcompile.codegen.backends import Code, backend_of
from dcompile.codegen.cpu.lower import stored_tensors
from dcompile.codegen.targets import parse_target
from dcompile.decoding.rules import Combination, check_together
from dcompile.driver.pipeline import Record, run
from dcompile.errors import ConfigError, OptionError
from dcompile.explain.command import report
from dcompile.frontends.base import ModelSpec
from dcompile.ir.program import Program, StepShape
from dcompile.ir.show import show
from dcompile.ir.stored import dump
from dcompile.ir.weights import Read, Recipe, Source
from dcompile.options import Options, WatchedOptions
from dcompile.policies import Policy, find_policy
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.writing import ArtifactWriter
from dcompile.step.repeat_layers import Run, runs_of
from dcompile.step.trace import Traced, fake_weights, trace

log = logging.getLogger(__name__)

Progress = Callable[[str], None]
Chosen = TypeVar("Chosen", bound=Options)
DEFAULT_LENGTH = 2048
# What share of a block is decided when the next is added, and when it is fully activated (D2F).
PIPELINE = {"tau_add": 0.1, "tau_activate": 0.95}


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


def compile_checkpoint(
    path: str | Path, options: Options, out: Path, progress: Progress = log.info
) -> Path:
    """Compile a checkpoint (folder, model.pt, model.pt2) into the artifact `out`."""
    options = WatchedOptions.of(options)
    return _compile(open_origin(Path(path), options), options, out, progress)


def compile_module(
    module: nn.Module, options: Options, out: Path, progress: Progress = log.info
) -> Path:
    """Compile a user's own module `ids i64 [B, T] -> logits [B, T, V]`."""
    options = WatchedOptions.of(options)
    return _compile(_of_module(module, options), options, out, progress)


def compile_model(
    model: nn.Module | str | Path,
    options: Options | None = None,
    *,
    out: str | Path | None = None,
    **changes: Any,
) -> Runner:
    """Compile a module or a checkpoint's path, and load the result.

    `changes` are fields of Options.  Without `out` the artifact lives in a temporary folder that goes
    with the runner.  Raises DcompileError.
    """
    chosen = replace(options or Options(), **changes)
    if out is not None:
        made = _compile_any(model, chosen, Path(out))
        return Runner.load(made)
    with tempfile.TemporaryDirectory(prefix="dcompile-") as folder:
        # The mapped weights keep their pages after the folder is gone.
        return Runner.load(_compile_any(model, chosen, Path(folder) / "model.dcx"))


def _compile_any(model: nn.Module | str | Path, options: Options, out: Path) -> Path:
    if isinstance(model, nn.Module):
        return compile_module(model, options, out)
    return compile_checkpoint(model, options, out)


def _compile(origin: Origin, options: WatchedOptions, out: Path, progress: Progress) -> Path:
    options.validate()
    options = settle(options, origin.spec)
    torch_dtype = getattr(torch, options.dtype)
    program = trace_origin(origin, options, torch_dtype, progress)
    traced = show(program)
    check = _checker(options)
    records = run(program, options, check, progress)
    _check_block(program, options)
    check_together(_combination(options, program.shape.model_block, program.shape.shift))
    progress("lower and build kernels")
    code = backend_of(options.target)(program)
    progress("write")
    with ArtifactWriter(out, external=options.weights == "external") as writer:
        writer.add_bytes("plan.json", _json(code.plan))
        writer.add_bytes("program.json", _json(dump(program, code.stored)))
        for name, text in _texts(program, code, traced, records).items():
            writer.add_bytes(name, text.encode())
        manifest = {**_manifest(origin, options, program), **code.manifest}
        notes = {"remarks": [vars(r) for r in program.remarks], "unread": options.unread}
        writer.add_bytes("remarks.json", _json(notes))
        for name, data in code.files.items():
            writer.add_bytes(name, data)
        for name, data in origin.tokenizer.items():
            writer.add_bytes(f"tokenizer/{name}", data)
        writer.add_weights(stored_tensors(program, code.stored, origin.read))
        writer.finish(manifest)
    return out


def settle(options: Chosen, spec: ModelSpec) -> Chosen:
    """Fill what the user left open from the family's defaults; raises OptionError on contradiction."""
    given = spec.defaults
    block = options.block_length or int(given.get("block_length", 32))  # type: ignore[call-overload]
    cache = options.cache or str(given.get("cache", "none"))
    if spec.block_length is not None:
        if options.block_length not in (None, spec.block_length):
            raise OptionError(
                f"the model's blocks have {spec.block_length} positions, not {options.block_length}",
                remedy=f"--block-length {spec.block_length}, or leave it out",
            )
        block = spec.block_length
    length = options.max_length or min(spec.max_positions or DEFAULT_LENGTH, DEFAULT_LENGTH)
    if spec.max_positions is not None and length > spec.max_positions:
        raise OptionError(
            f"the model has {spec.max_positions} positions, not {length}",
            remedy=f"--max-length {spec.max_positions}",
        )
    if block > length:
        raise OptionError(
            f"a block of {block} does not fit into {length} positions",
            remedy="a smaller --block-length",
        )
    dtype = options.dtype
    if dtype == "auto":
        dtype = str(spec.dtype).removeprefix("torch.")
    if options.manager == "canvas" and options.block_length is None:
        raise OptionError(
            "how many positions has the canvas?",
            where="--manager canvas",
            remedy="--block-length with the number of positions to generate",
        )
    settled = options.changed(
        target=str(parse_target(options.target)),
        dtype=dtype,
        block_length=block,
        cache=cache,
        max_length=length,
        policy=_policy(options.policy, spec),
    )
    # What a module's mask is, only the trace shows.
    if spec.layer_kinds:
        check_together(_combination(settled, spec.block_length, spec.shift))
    return settled


def _policy(wanted: str | None, spec: ModelSpec) -> str:
    """`auto`, as nothing, is the family's own policy, with the threshold that the family publishes.

    On held-out questions of two small models no other was confirmed to lose nothing to it and take
    fewer forwards (bench/results, 2026-11-25).
    """
    own = str(spec.defaults.get("policy", "threshold"))
    return own if wanted in (None, "auto") else wanted


def open_origin(path: Path, options: Options) -> Origin:
    """What a checkpoint is, without reading its tensors."""
    if path.suffix == ".pt2":
        from dcompile.frontends.exported import open_exported

        return _of_module(open_exported(path), options)
    from dcompile.frontends.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path, mask_id=options.mask_id)
    spec = checkpoint.spec
    if options.eos_ids is not None:
        spec = replace(spec, eos_ids=options.eos_ids)
    runs = runs_of(spec.layer_kinds)

    def build_traced() -> nn.Module:
        return checkpoint.build([r.layers[0] for r in runs])

    return Origin(
        spec,
        checkpoint.recipes,
        checkpoint.read,
        runs,
        build_traced,
        checkpoint.tokenizer_files(),
        checkpoint.digest(),
    )


def _of_module(module: nn.Module, options: Options) -> Origin:
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
        max_positions=None,
        block_length=None,
        shift=False,
        dtype=max(set(floating), key=floating.count) if floating else torch.float32,
        layer_kinds=(),
        defaults={},
    )
    recipes = {name: Source(name) for name in parameters}
    return Origin(
        spec, recipes, lambda name: tensors[name].detach(), (), lambda: module, {}, "module"
    )


def trace_origin(
    origin: Origin, options: Options, dtype: torch.dtype, progress: Progress
) -> Program:
    """Trace with settled options; layers of one kind once, without their weights."""
    progress("trace")
    spec = origin.spec
    assert options.max_length is not None and options.block_length is not None and options.policy
    shape = StepShape(
        slots=options.batch,
        positions=options.max_length,
        block_length=options.block_length,
        mask_id=spec.mask_id,
        dtype=dtype,
        shift=spec.shift,
        blocks=_blocks(options),
    )
    policy = find_policy(options.policy, options.score)
    pipelined = options.manager == "pipelined"
    smoothing = options.smoothing is not None
    wanted = Traced(shape, policy, origin.recipes, origin.runs, pipelined, smoothing)
    if not origin.runs:
        module = origin.build()
        return trace(module if dtype == spec.dtype else _in_dtype(module, dtype), wanted)
    with fake_weights():
        module = origin.build()
        module.eval()
        return trace(module if dtype == spec.dtype else _in_dtype(module, dtype), wanted)


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


def _blocks(options: Options) -> int:
    """How many blocks of a sequence may be undecided at a time: in a pipeline, all where unsaid."""
    assert options.max_length is not None and options.block_length is not None
    if options.manager != "pipelined":
        return 1
    return options.max_blocks or -(-options.max_length // options.block_length)


def _check_block(program: Program, options: Options) -> None:
    block = program.shape.model_block
    if block is not None and block != options.block_length:
        raise OptionError(
            f"the model's blocks have {block} positions, not {options.block_length}",
            remedy=f"--block-length {block}",
        )


def _combination(options: Options, span: int | None, shift: bool) -> Combination:
    assert options.policy is not None and options.cache is not None
    return Combination(
        find_policy(options.policy, options.score),
        options.manager,
        options.cache,
        span,
        options.smoothing is not None,
        options.aligned,
        options.cross_block,
        shift,
    )


def _checker(options: Options):  # type: ignore[no-untyped-def]
    if not options.check:
        return None
    from dcompile.driver.check import Checker

    return Checker()


def _json(value: object) -> bytes:
    import json

    return (json.dumps(value, indent=1) + "\n").encode()


def _texts(program: Program, code: Code, traced: str, records: list[Record]) -> dict[str, str]:
    out = {"stages/00_traced.txt": traced}
    for i, record in enumerate(records, start=1):
        out[f"stages/{i:02}_{record.name}.txt"] = record.text
    out["report.txt"] = report(program, code, records)
    out.update(code.texts)
    return out


def _manifest(origin: Origin, options: Options, program: Program) -> dict[str, Any]:
    return {
        "dcompile": version("dcompile"),
        "checkpoint": origin.digest,
        **manifest_facts(origin, options, program),
        "options": options.record(),
    }


def manifest_facts(origin: Origin, options: Options, program: Program) -> dict[str, dict[str, Any]]:
    """What an artifact's manifest says of its model and its policy."""
    spec = origin.spec
    assert options.policy is not None
    policy = find_policy(options.policy, options.score)
    vocab = spec.vocab_size or _vocabulary(program)
    return {
        "model": {
            "family": spec.family,
            "vocab_size": vocab,
            "mask_id": spec.mask_id,
            "eos_ids": list(spec.eos_ids),
            "shift": spec.shift,
            "block_length": program.shape.model_block,
            "dtype": options.dtype,
            "max_positions": spec.max_positions,
        },
        "policy": {
            "name": policy.name,
            "parameters": _parameters(policy, options, spec),
            "state": [{"name": n, "reset": s.reset} for n, s in policy.state.items()],
        },
    }


def _parameters(policy: Policy, options: Options, spec: ModelSpec) -> dict[str, float]:
    """The policy's defaults; the family's threshold is for the policy that the family names."""
    parameters = dict(policy.parameters)
    threshold = spec.defaults.get("threshold")
    # The reports of block-diffusion models tune theirs for `dynamic` as well.
    tuned = {spec.defaults.get("policy"), *(["dynamic"] if spec.block_length is not None else [])}
    if threshold is not None and policy.name in tuned:
        parameters["threshold"] = float(threshold)  # type: ignore[arg-type]
    # Dream's number of steps is for its whole canvas.
    blocks = options.manager != "canvas" or not policy.canvas
    if "steps" in parameters and blocks and options.block_length is not None:
        parameters["steps"] = float(options.block_length)
    if options.manager == "pipelined":
        parameters |= PIPELINE
    if options.smoothing is not None:
        parameters["smoothing"] = options.smoothing
    return parameters


def _vocabulary(program: Program) -> int:
    """Rows of the embedding or of the vocabulary projection, for a module that does not say."""
    from dcompile.ir import ops
    from dcompile.ir.edit import value

    for node in program.calls(ops.VOCAB_CHOICE, ops.VOCAB_CHOICE_ASKED):
        return int(value(node.args[1]).shape[0])  # type: ignore[arg-type]
    for node in program.calls(ops.CHOOSE, ops.CHOOSE_ASKED):
        return int(value(node.args[0]).shape[-1])  # type: ignore[arg-type]
    raise AssertionError("a step chooses tokens")
