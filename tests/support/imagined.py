"""A runner whose model is any function of tokens: the real loop and the real policies, nothing compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dcompile.policies import Policy
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.plan import Plan
from dcompile.runtime.state import Memory
from dcompile.runtime.turns import Bools, Turns, repeat
from dcompile.step.choose import Blocks, write_tokens

Model = Callable[[list[int], int], npt.NDArray[np.float32]]
"""Tokens that a position sees, and its place -> logits [V]."""
PIPELINE = {"tau_add": 0.1, "tau_activate": 0.95}
DTYPES = {torch.float32: "f32", torch.int64: "i64"}


class Imagined:
    """Stands for an executor; `check_every` as an executor's."""

    def __init__(
        self, plan: Plan, policy: Policy, model: Model, mask_id: int, check_every: int = 1
    ) -> None:
        self.plan, self.policy, self.model, self.mask_id = plan, policy, model, mask_id
        self.check_every = check_every
        self.wanted = np.zeros(1, np.int32)
        self.memory = Memory(SimpleNamespace(plan=plan))  # type: ignore[arg-type]
        self.state = self.memory.state

    def bind(self, R: int, B: int) -> Any:
        return self.memory.bind(R, B)

    def repeat(self, binding: Any, turns: int) -> Turns:
        return repeat(
            lambda: self._step(binding), binding.arrays, turns, self.check_every, self.wanted
        )

    def _step(self, binding: Any) -> Bools:
        given = {name: torch.from_numpy(a.copy()) for name, a in binding.arrays.items()}
        # The same memory: what is written here is the loop's.
        state = {name: torch.from_numpy(array) for name, array in self.state.items()}
        canvas = state["canvas"]
        block_seq, block_pos = given["block_seq"], given["block_pos"]
        clocks = [given[k] for k in ("iteration", "entered", "temperature", "seed", "tick")]
        extras = {name: given[name] for name in ("prompt_end", "full") if name in given}
        place = (block_seq[:, None], block_pos)
        written = write_tokens(
            self.policy,
            self.mask_id,
            self._logits(given),
            Blocks(canvas[place], block_pos, *clocks, **extras),
            {name: given[name] for name in self.policy.parameters},
            {name: state[name][block_seq] for name in self.policy.state},
        )
        canvas[place] = written.updated
        for name, value in written.state.items():
            state[name][block_seq] = value
        return np.asarray(written.done)

    def _logits(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        B, n = given["choice_row"].shape
        rows = []
        for row in given["choice_row"].reshape(-1).tolist():
            slot, position, limit = (int(given[f"row_{k}"][row]) for k in ("seq", "pos", "limit"))
            rows.append(self.model(self.state["canvas"][slot, :limit].tolist(), position))
        return torch.tensor(np.array(rows), dtype=torch.float32).reshape(B, n, -1)

    def push(self, slot: int) -> None: ...

    def pull(self, slot: int) -> None: ...

    def clear(self, name: str, slot: int) -> None:
        self.state[name][slot] = 0


def imagined(
    policy: Policy,
    model: Model,
    *,
    vocab: int,
    mask_id: int,
    eos_ids: tuple[int, ...] = (),
    block: int,
    length: int,
    batch: int = 1,
    span: int | None = None,
    check_every: int = 1,
    **options: object,
) -> Runner:
    """A runner for that policy and model; `options` as the compiler's."""
    pipelined = options.get("manager") == "pipelined"
    most = options.pop("max_blocks", None) or -(-length // block)
    sizes = {"N": batch, "L": length, "n": block, **({"blocks": most} if pipelined else {})}
    plan = Plan.read(_plan(policy, sizes, pipelined), "imagined")
    parameters = {**policy.parameters, **(PIPELINE if pipelined else {})}
    manifest = {
        "model": {
            "vocab_size": vocab,
            "mask_id": mask_id,
            "eos_ids": list(eos_ids),
            "shift": False,
            "block_length": span,
        },
        "options": {"cache": "none", **options},
        "policy": {
            "parameters": parameters,
            "state": [{"name": n, "reset": s.reset} for n, s in policy.state.items()],
        },
    }
    files: dict[str, bytes] = {}
    artifact = SimpleNamespace(
        manifest=manifest, plan=plan, path="imagined", names=files, files=files
    )
    return Runner(artifact, Imagined(plan, policy, model, mask_id, check_every))  # type: ignore[arg-type]


def _plan(policy: Policy, sizes: dict[str, int], pipelined: bool) -> dict[str, Any]:
    R, B, n = {"R": 1}, {"B": 1}, sizes["n"]
    buffers: list[dict[str, Any]] = []
    places: dict[str, dict[str, int]] = {"state": {}, "input": {}, "slot": {}}

    def add(name: str, dtype: str, shape: list[Any], kind: str, **place: Any) -> None:
        places[kind][name] = len(buffers)
        buffers.append(
            {"name": name, "dtype": dtype, "shape": shape, "place": {"kind": kind, **place}}
        )

    add("canvas", "i64", [sizes["N"], sizes["L"]], "state", holds="canvas")
    for name, state in policy.state.items():
        shape = [sizes["N"], *state.shape(n)]
        add(name, DTYPES[state.dtype], shape, "state", holds="policy")
    for name in ("row_seq", "row_pos", "row_limit"):
        add(name, "i64", [R], "input")
    for name in ("block_pos", "choice_row"):
        add(name, "i64", [B, n], "input")
    clocks = ["block_seq", "iteration", "entered", "seed", "tick"]
    for name in (*clocks, *["prompt_end"] * policy.edits, *["full"] * pipelined):
        add(name, "i64", [B], "input")
    for name in ("temperature", *policy.parameters):
        add(name, "f32", [B], "input")
    add("done", "bool", [B], "slot", slot=0)
    return {
        "symbols": ["R", "B"],
        "sizes": sizes,
        "buffers": buffers,
        "slots": 1,
        "launches": [],
        "regions": [],
        "inputs": places["input"],
        "state": places["state"],
        "outputs": places["slot"],
    }
