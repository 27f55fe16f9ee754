"""Compare an artifact with the checkpoint that it is said to come from, tensor by tensor and by running it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dcompile.bench import _options, prepare, step_inputs
from dcompile.codegen.lower import lower, stored_tensors
from dcompile.driver import open_origin, settle, trace_origin
from dcompile.errors import VerificationError
from dcompile.ir import ops
from dcompile.options import Options
from dcompile.pipeline import run
from dcompile.runtime.loop import Runner

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


def verify(artifact: str | Path, checkpoint: str | Path, *, run_model: bool = True) -> str:
    """Raise VerificationError at the first departure; a sentence of what was compared otherwise.

    Every stored tensor is made again from the checkpoint and compared bit by bit (weights, rotary
    tables, stacked experts); then one step is run beside the plain reference, at several lengths.
    """
    runner = Runner.load(artifact)
    manifest = runner.artifact.manifest
    options = Options(**_options(manifest["options"]))
    origin = open_origin(Path(checkpoint), options)
    settled = replace(settle(options, origin.spec), stop_after=None)
    program = trace_origin(origin, settled, getattr(torch, settled.dtype), lambda _: None)
    run(program, settled)
    lowered = lower(program)
    stored = {tensor for tensor, _, _ in lowered.stored}
    held = {b.tensor for b in runner.artifact.plan.buffers if b.kind == "weight"}
    if stored != held:
        odd = ", ".join(sorted(stored ^ held)[:4])
        raise VerificationError(
            f"the artifact holds other tensors than this compiler makes: {odd}",
            where=str(artifact),
            remedy="compile the checkpoint again with this version",
        )
    count = 0
    for name, wanted in stored_tensors(program, lowered, origin.read):
        _same_bits(name, wanted, runner.artifact.weights(name))
        count += wanted.numel()
    text = f"{len(stored)} tensors, {count:,} values: equal\n"
    if run_model and origin.runs:
        text += _run_beside(runner, Path(checkpoint), options)
    return text


def _same_bits(name: str, wanted: Tensor, found: Tensor) -> None:
    a, b = (t.reshape(-1).view(torch.uint8) for t in (wanted, found))
    if a.shape == b.shape and torch.equal(a, b):
        return
    if wanted.numel() != found.numel():
        raise VerificationError(f"tensor {name} has {found.numel()} values, not {wanted.numel()}")
    differ = (wanted.reshape(-1) != found.reshape(-1)).sum()
    raise VerificationError(
        f"tensor {name} departs from the checkpoint in {int(differ)} of {wanted.numel()} values",
        where=name,
        remedy="compile the checkpoint again",
    )


def _run_beside(runner: Runner, checkpoint: Path, options: Options) -> str:
    """Confidences of one whole step against softmax(reference logits)."""
    from dcompile.frontends.checkpoint import open_checkpoint

    model = runner.artifact.manifest["model"]
    block = runner.artifact.manifest["options"]["block_length"]
    longest = runner.artifact.manifest["options"]["max_length"]
    reference = open_checkpoint(checkpoint, mask_id=options.mask_id).reference()
    reference = reference.to(getattr(torch, model["dtype"]))
    worst = 0.0
    lengths = sorted({min(block * k, longest // block * block) for k in (1, 2, 5)})
    for context in lengths:
        executor = runner.executor
        plan = runner.artifact.plan
        parameters = runner.artifact.manifest["policy"]["parameters"]
        inputs = step_inputs(list(plan.inputs), context, block, context, parameters)
        if model["block_length"] is not None:
            span = model["block_length"]
            inputs["row_limit"] = (inputs["row_pos"] // span + 1) * span
        if model["shift"]:
            inputs["choice_row"] = (inputs["choice_row"] - 1).clamp_min(0)
        canvas = executor.state["canvas"]
        prepare(canvas, context, block, model["mask_id"], model["vocab_size"])
        ids = canvas[:1, :context].clone()
        got = executor.step(inputs)["confidence"].clone()
        with torch.no_grad():
            logits = reference(ids)[0][inputs["choice_row"][0]][None]
        nothing = torch.zeros(1, dtype=torch.int64)
        live = torch.ones(1, block, dtype=torch.bool)
        wanted = ops.choose(
            logits, live, torch.zeros(1), nothing, nothing, inputs["block_pos"], model["mask_id"]
        )[1]
        worst = max(worst, float((got - wanted).norm() / wanted.norm()))
    if not worst <= TOLERANCE[model["dtype"]]:
        raise VerificationError(
            f"the artifact's confidences depart from the plain model's by {worst:.2e} of their norm",
            where=str(runner.artifact.path),
            remedy="report it, with the artifact's report.txt",
        )
    return f"one step at lengths {lengths}: confidences within {worst:.1e} of the plain model's\n"
