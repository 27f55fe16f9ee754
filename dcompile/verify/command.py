"""Compare an artifact with the checkpoint that it is said to come from: stages, tensors, plan, layers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from dcompile.codegen.backends import lower_cuda
from dcompile.codegen.cpu.lower import Lowered, lower
from dcompile.codegen.launches import Launch, Value
from dcompile.codegen.plan import stored_tensors
from dcompile.driver.manifest import manifest_facts, vocabulary
from dcompile.driver.origin import Origin, Progress, open_origin, trace_origin
from dcompile.driver.pipeline import Observer, run
from dcompile.driver.record import Announcer
from dcompile.driver.settle import Settled, settle
from dcompile.errors import DeviceError, VerificationError, WrongArchitecture
from dcompile.ir.program import Program
from dcompile.ir.stored import dump
from dcompile.options import Options, recorded_options
from dcompile.runtime.artifact import Artifact, open_artifact
from dcompile.runtime.backend import Backend
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.opening import open_backend
from dcompile.runtime.state import Binding
from dcompile.runtime.tensors import array_of, tensor_of
from dcompile.untrusted import parse_json
from dcompile.verify.kernels import compare_kernels
from dcompile.verify.stages import TOLERANCE, Case, Recorded, Stages, cases, distance

if TYPE_CHECKING:
    from dcompile.codegen.cuda.lower import CudaLowered

PROGRAM = "program.json"
_AGAIN = "compile the checkpoint again with this version"
_REPORT = "report it, with the artifact's report.txt"
LAUNCH_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 4e-3}
"""Of a norm, for one launch on given values."""
_FEW = 0.25
"""Share of a launch's whole numbers (experts, tokens) that rounding may decide otherwise."""


@dataclass
class Compiled:
    """A checkpoint compiled again as an artifact says that it was, up to the native code."""

    origin: Origin
    settled: Settled
    program: Program
    lowered: Lowered | CudaLowered
    stages: Stages | None


def verify(
    artifact: str | Path,
    checkpoint: str | Path,
    *,
    run_model: bool = True,
    progress: Progress = lambda _: None,
) -> str:
    """Raise VerificationError at the first departure; a sentence for each comparison otherwise.

    Each pass's program is run by the interpreter beside the eager module. Every stored tensor is made again
    and compared bit by bit, and the plan and what the manifest says of the model with what the compiler makes.
    Then each launch of one step is compared with the last stage, layer by layer. Without `run_model` nothing
    is run.
    """
    opened = open_artifact(artifact)
    # What cannot run here is said before anything is computed.
    runner = _runner(opened) if run_model else None
    made = compile_again(Path(checkpoint), opened.manifest["options"], run_model, progress)
    lines = []
    if made.stages is not None:
        count = len(made.stages.passed)
        lines.append(f"{count} stages: within {made.stages.worst:.1e} of the eager module\n")
    progress("tensors")
    lines.append(compare_tensors(opened, made))
    compare_plan(opened, made)
    if not isinstance(made.lowered, Lowered):
        progress("kernels")
        lines.append(compare_kernels(opened, made.lowered, made.settled.target))
    if runner is not None:
        progress("layers")
        lines.append(compare_layers(runner, made))
    return "".join(lines)


def _runner(artifact: Artifact) -> Runner:
    """Raises DeviceError where this machine has not what the artifact was compiled for."""
    try:
        return Runner(artifact, open_backend(artifact))
    except (DeviceError, WrongArchitecture) as missing:
        raise DeviceError(
            f"the launches of an artifact for {artifact.manifest['target']} cannot be run here: {missing.what}",
            where=missing.where,
            remedy="--no-run compares tensors, plan and kernels without a GPU; with one, `dcompile verify` "
            "there compares each launch too",
        ) from missing


def compile_again(
    checkpoint: Path,
    recorded: Mapping[str, Any],
    run_model: bool = True,
    progress: Progress = lambda _: None,
) -> Compiled:
    """Compile with an artifact's recorded options; raises VerificationError at a pass that departs."""
    options = recorded_options(recorded, "manifest.json")
    if isinstance(recorded.get("target"), str):
        options = options.changed(target=recorded["target"])
    options.validate()
    origin = open_origin(checkpoint, options)
    settled = settle(options, origin.spec)
    program = trace_origin(origin, settled, lambda _: None)
    stages = None
    if run_model:
        progress("reading the model")
        model = _eager(checkpoint, origin, options).to(settled.shape.dtype)
        inputs = cases(program.shape, vocabulary(origin, program))
        stages = Stages(model, origin.read, settled.parameters, inputs)
    observers: list[Observer] = [Announcer(progress), *([stages] if stages else [])]
    run(program, settled.options, *observers)
    target = settled.target
    made = lower(program) if target.kind == "cpu" else lower_cuda(program, target)
    return Compiled(origin, settled, program, made, stages)


def _eager(checkpoint: Path, origin: Origin, options: Options) -> nn.Module:
    if not origin.runs:
        return origin.build()
    from dcompile.frontends.checkpoint import open_checkpoint

    return open_checkpoint(checkpoint, options.mask_id, options.block_length).reference()


def compare_tensors(artifact: Artifact, made: Compiled) -> str:
    """Every stored tensor, bit by bit."""
    stored = {tensor for tensor, _, _ in made.lowered.stored}
    held = {b.tensor for b in artifact.plan.buffers if b.kind == "weight"}
    if stored != held:
        odd = ", ".join(sorted(stored ^ held)[:4])
        raise VerificationError(
            f"the artifact holds other tensors than this compiler makes: {odd}",
            where=str(artifact.path),
            remedy=_AGAIN,
        )
    count = 0
    for name, wanted in stored_tensors(made.program, made.lowered.stored, made.origin.read):
        _same_bits(name, wanted, tensor_of(artifact.weights(name)), _layer(made, name))
        count += wanted.numel()
    return f"{len(stored)} tensors, {count:,} values: equal\n"


def _layer(made: Compiled, tensor: str) -> str:
    """Whose tensor it is, as the plan's launches say."""
    index = next(
        i for i, b in enumerate(made.lowered.plan["buffers"]) if b["place"].get("tensor") == tensor
    )
    for launch in made.lowered.plan["launches"]:
        if any(isinstance(a, dict) and a.get("b") == index for a in launch["args"]):
            return f"layer {launch['layer']}" if launch["layer"] is not None else launch["role"]
    return "the step"


def _same_bits(name: str, wanted: Tensor, found: Tensor, layer: str) -> None:
    a, b = (t.reshape(-1).view(torch.uint8) for t in (wanted, found))
    if a.shape == b.shape and torch.equal(a, b):
        return
    where = f"{name}, of {layer}"
    if wanted.numel() != found.numel():
        what = f"tensor {name} has {found.numel()} values, not {wanted.numel()}"
        raise VerificationError(what, where=where, remedy=_AGAIN)
    differ = (wanted.reshape(-1) != found.reshape(-1)).sum()
    raise VerificationError(
        f"tensor {name} departs from the checkpoint in {int(differ)} of {wanted.numel()} values",
        where=where,
        remedy="compile the checkpoint again",
    )


def compare_plan(artifact: Artifact, made: Compiled) -> None:
    """The plan, and what the manifest says of model and policy, are what the compiler makes."""
    plan, wanted = artifact.plan.text, made.lowered.plan
    for index, (launch, other) in enumerate(
        zip(plan["launches"], wanted["launches"], strict=False)
    ):
        if launch != other:
            where = f"launch {index}, {other['name']}, layer {other['layer']}"
            raise VerificationError("the plan launches something else", where=where, remedy=_AGAIN)
    if different := sorted(k for k in {*plan, *wanted} if plan.get(k) != wanted.get(k)):
        what = f"the plan's {different[0]} are not what this compiler makes"
        raise VerificationError(what, where=str(artifact.path), remedy=_AGAIN)
    facts = manifest_facts(made.origin, made.settled, made.program)
    for part, values in facts.items():
        held = artifact.manifest.get(part)
        # What was added to an artifact later, such as a calibrated threshold, stands beside.
        if held != values and not _calibrated(part, held, values):
            what = f"the manifest's {part} is not what the checkpoint and options give"
            raise VerificationError(what, where=str(artifact.path), remedy=_AGAIN)

    _compare_files(artifact, made)


def _compare_files(artifact: Artifact, made: Compiled) -> None:
    """The tokenizer's files, and the program as data, where the artifact has it."""
    wanted = {f"tokenizer/{name}": data for name, data in made.origin.tokenizer.items()}
    held = {name for name in artifact.names if name.startswith("tokenizer/")}
    odd = sorted(held ^ set(wanted))
    odd += [name for name in sorted(held & set(wanted)) if artifact.bytes(name) != wanted[name]]
    if odd:
        what = "a file of the tokenizer is not the checkpoint's"
        raise VerificationError(what, where=odd[0], remedy=_AGAIN)
    if PROGRAM not in artifact.names:
        return
    program = json.loads(json.dumps(dump(made.program, made.lowered.stored)))
    try:
        same = parse_json(artifact.bytes(PROGRAM)) == program
    except ValueError:
        same = False
    if not same:
        what = "the stored program is not what this compiler makes"
        raise VerificationError(what, where=PROGRAM, remedy=_AGAIN)


def _calibrated(part: str, held: Any, values: Mapping[str, Any]) -> bool:
    """Whether only the policy's default parameters differ, which `calibrate --record` changes."""
    if part != "policy" or not isinstance(held, dict):
        return False
    mine, others = held.get("parameters"), values["parameters"]
    rest = {k: v for k, v in held.items() if k != "parameters"}
    return (
        isinstance(mine, dict)
        and mine.keys() == others.keys()
        and all(type(v) in (int, float) and abs(v) < 1e30 for v in mine.values())
        and rest == {k: v for k, v in values.items() if k != "parameters"}
    )


def compare_layers(runner: Runner, made: Compiled) -> str:
    """One step beside the eager module, and each of its launches beside the last stage.

    Each launch is given the last stage's values, so that what it departs by is its own; raises at the first.
    """
    assert made.stages is not None
    worst, whole = 0.0, 0.0
    for case, wanted in zip(made.stages.inputs, made.stages.wanted, strict=True):
        worst = max(worst, _compare_launches(runner.executor, made, case))
        outputs = _prepare(runner.executor, made, case)
        runner.executor.launch(outputs)
        live = wanted["live"]
        got = tensor_of(outputs.outputs["confidence"])
        whole = max(whole, distance(got[live], wanted["confidence"][live]))
    if not whole <= TOLERANCE[made.program.shape.dtype]:
        raise VerificationError(
            f"the artifact's confidences depart from the eager module's by {whole:.1e} of their norm",
            where=str(runner.artifact.path),
            remedy=_REPORT,
        )
    lengths = ", ".join(str(case.length) for case in made.stages.inputs)
    count = len(made.lowered.launches)
    return (
        f"{count} launches, each within {worst:.1e} of the last stage; one step at lengths {lengths}: "
        f"confidences within {whole:.1e} of the eager module's\n"
    )


def _prepare(executor: Backend, made: Compiled, case: Case) -> Binding:
    """The artifact's buffers with a case's inputs in them."""
    values = _arguments(made, case)
    for name in executor.state:
        executor.put(name, array_of(values[name]))
    return executor.fill({n: array_of(values[n]) for n in executor.plan.inputs})


def _arguments(made: Compiled, case: Case) -> dict[str, Tensor]:
    assert made.stages is not None
    arguments = made.stages.arguments(made.program, case)
    return dict(zip((i.name for i in made.program.inputs), arguments, strict=True))


def _compare_launches(executor: Backend, made: Compiled, case: Case) -> float:
    recorded = Recorded(made.program)
    with torch.no_grad():
        recorded.run(*_arguments(made, case).values())
    binding = _prepare(executor, made, case)
    worst, limit = 0.0, LAUNCH_TOLERANCE[made.program.shape.dtype]
    for index, launch in enumerate(made.lowered.launches):
        text = made.lowered.plan["launches"][index]
        for node, buffer in _reads(launch, text["args"]):
            value = recorded.values.get(node)
            target = binding.values(buffer)
            if value is not None and value.numel() == target.size:
                binding.put(buffer, array_of(value).reshape(target.shape))
        executor.launch(binding, part=(index, index + 1))
        for node, buffer in _writes(launch, text["writes"]):
            value = recorded.values.get(node)
            # What is decided outside of layers, rounding may decide otherwise; by what, is compared.
            if value is None or (not value.is_floating_point() and text["layer"] is None):
                continue
            away = distance(tensor_of(binding.values(buffer)).reshape(value.shape), value)
            allowed = limit if value.is_floating_point() else _FEW
            if not away <= allowed:
                layer = text["layer"]
                whose = f"layer {layer}" if layer is not None else "the step"
                raise VerificationError(
                    f"{whose} departs from the last stage: {node.name} by {away:.1e}, {allowed:.0e} is "
                    "allowed",
                    where=f"launch {index}, {text['name']}, length {case.length}",
                    remedy=_REPORT,
                )
            worst = max(worst, away if value.is_floating_point() else 0.0)
    return worst


def _reads(launch: Launch, text: list[Any]) -> Iterator[tuple[Node, int]]:
    """The computed values that a launch takes, with the plan's buffers of them."""
    given = launch.node.args if launch.kind == "aten" else launch.args
    for argument, said in zip(given, text, strict=True):
        several: Any = argument if isinstance(said, list) else [argument]
        for one, place in zip(several, said if isinstance(said, list) else [said], strict=True):
            node = one.node if isinstance(one, Value) and not one.offset else one
            if isinstance(node, Node) and node.op == "call_function" and isinstance(place, dict):
                yield node, place["b"]


def _writes(launch: Launch, buffers: list[int | None]) -> list[tuple[Node, int]]:
    """The values that a launch computes, with the plan's buffers of them."""
    written = [index for index in buffers if index is not None]
    nodes = list(launch.writes)
    if launch.kind == "aten" and isinstance(launch.node.meta["val"], (tuple, list)):
        nodes.sort(key=lambda n: n.args[1])  # type: ignore[arg-type, return-value]
    return list(zip(nodes, written, strict=False))
