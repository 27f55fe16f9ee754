"""Trace one denoising iteration: forward, choice of tokens, write-back and done flag as one graph."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dcompile.errors import DataDependentShape, DcompileError, UnsupportedModel
from dcompile.ir import operators
from dcompile.ir.meta import KEY, Facts
from dcompile.ir.program import Holds, Input, Output, Program, StepShape
from dcompile.ir.weights import Recipe
from dcompile.policies import Policy
from dcompile.step.ask_policy import fixes_batch
from dcompile.step.choose import Blocks, write_tokens
from dcompile.step.expert_loops import traceable
from dcompile.step.lengths import check_lengths
from dcompile.step.repeat_layers import Run, repeat_layers
from dcompile.step.smoothing import STATE, embeddings, softened

# Example sizes: different from each other and from common model sizes, so that no two get confused.
EXAMPLE_ROWS, EXAMPLE_BATCH = 43, 3


class Step(nn.Module):
    """One iteration, around a model `ids [1, T] -> logits [1, T, V]`; docs/formats.md names the inputs."""

    def __init__(
        self, model: nn.Module, mask_id: int, policy: Policy, table: nn.Embedding | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.mask_id = mask_id
        self.policy = policy
        # Not as a submodule: it is one of the model's already.
        self.smoothed = () if table is None else (table,)

    def forward(
        self,
        canvas: Tensor,
        row_seq: Tensor,
        row_pos: Tensor,
        block_seq: Tensor,
        block_pos: Tensor,
        choice_row: Tensor,
        iteration: Tensor,
        entered: Tensor,
        temperature: Tensor,
        seed: Tensor,
        tick: Tensor,
        parameters: dict[str, Tensor],
        extras: dict[str, Tensor],
        rows: dict[str, Tensor],
        state: dict[str, Tensor],
    ) -> tuple[Tensor, ...]:
        ids = canvas[row_seq, row_pos][None]
        soft = [state[STATE]] if self.smoothed else []
        state = {name: state[name] for name in self.policy.state}
        with traceable(self.model):
            logits = self._forward(ids, [held[row_seq, row_pos] for held in soft])[0]
        place = (block_seq[:, None], block_pos)
        clocks = (iteration, entered, temperature, seed, tick)
        written = write_tokens(
            self.policy,
            self.mask_id,
            logits[choice_row],
            Blocks(canvas[place], block_pos, *clocks, **extras),
            parameters,
            {name: held[block_seq] for name, held in state.items()},
        )
        kept = [held.index_put((block_seq,), written.state[name]) for name, held in state.items()]
        updated = canvas.index_put(place, written.updated)
        for table, held in zip(self.smoothed, soft, strict=True):
            still = updated[row_seq, row_pos] == self.mask_id
            mixed = operators.SOFT_EMBED(logits, table.weight, still, rows["row_weight"])
            kept.append(operators.WRITE_ROWS(held, mixed[:, None], row_seq, row_pos))
        return updated, written.done, written.commit, written.token, written.confidence, *kept

    def _forward(self, ids: Tensor, soft: Sequence[Tensor]) -> Tensor:
        with contextlib.ExitStack() as stack:
            for table, held in zip(self.smoothed, soft, strict=True):
                rows = held.reshape(-1, table.embedding_dim)
                stack.enter_context(softened(table, ids, self.mask_id, rows))
            return logits_of(self.model(ids))


def logits_of(out: object) -> Tensor:
    """A model may return the logits, a tuple that begins with them, or an object with `.logits`."""
    if isinstance(out, Tensor):
        return out
    if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
        return out[0]
    logits = vars(out).get("logits") if hasattr(out, "__dict__") else None
    if logits is None and isinstance(out, Mapping):
        logits = out.get("logits")
    if isinstance(logits, Tensor):
        return logits
    raise UnsupportedModel(
        f"the model returns a {type(out).__name__}, not logits",
        remedy="return a tensor [B, T, V], or an object with .logits",
    )


OUTPUTS = (
    Output("canvas", state="canvas"),
    Output("done"),
    Output("commit"),
    Output("token"),
    Output("confidence"),
)


@contextlib.contextmanager
def fake_weights() -> Iterator[None]:
    """Modules built inside have shapes and dtypes, but no storage."""
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        yield


@dataclass(frozen=True)
class Traced:
    """What tracing needs to know beside the module."""

    shape: StepShape
    policy: Policy
    recipes: Mapping[str, Recipe]  # by parameter name of the *full* model
    runs: Sequence[Run] = ()  # layers of which only the first is in the traced model
    pipelined: bool = False  # blocks may be there that need not make progress
    smoothing: bool = False  # masks are embedded together with what was predicted there

    def extras(self) -> tuple[str, ...]:
        """Inputs that only some steps have, i64 [B]."""
        return ("prompt_end",) * self.policy.edits + ("full",) * self.pipelined

    def rows(self) -> tuple[str, ...]:
        """The same of f32 [R]."""
        return ("row_weight",) * self.smoothing

    def states(self, table: nn.Embedding | None) -> dict[str, Tensor]:
        """Zeros for what a sequence carries beside its canvas."""
        slots, n = self.shape.slots, self.shape.block_length
        out = {
            name: torch.zeros(slots, *state.shape(n), dtype=state.dtype)
            for name, state in self.policy.state.items()
        }
        if table is not None:
            size = (slots, self.shape.positions, 1, table.embedding_dim)
            out[STATE] = torch.zeros(size, dtype=table.weight.dtype)
        return out

    def holds(self, name: str) -> Holds:
        """What a state of `states` is."""
        return "policy" if name in self.policy.state else "soft"


def trace(model: nn.Module, wanted: Traced) -> Program:
    """Export one iteration of `model` as a TRACED program.

    The model, in eval mode, sees one sequence of symbolic length R.  Raises UnsupportedModel (or a class of it)
    where export fails, with export's own reason in one line, PolicyError where the policy is to blame.
    """
    program = _exported(model, wanted, EXAMPLE_ROWS)
    check_lengths(program, EXAMPLE_ROWS, partial(_exported, model, wanted))
    if wanted.runs:
        repeat_layers(program, wanted.runs)
    return program


def _exported(model: nn.Module, wanted: Traced, rows: int, fixed: bool = False) -> Program:
    """The program of an example of so many positions; of that length alone where `fixed`."""
    table = embeddings(model, wanted.shape.mask_id) if wanted.smoothing else None
    step = Step(model, wanted.shape.mask_id, wanted.policy, table)
    states = wanted.states(table)
    arguments = _example(wanted, states, rows)
    dynamic = _dynamic(wanted, states, fixed)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # torch's own pickling of tree specs warns about torch's own classes.
            warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
            exported = torch.export.export(step, arguments, dynamic_shapes=dynamic, strict=False)
            exported = exported.run_decompositions({})
    except DcompileError:
        raise
    except Exception as failure:
        raise _explain(failure, wanted.policy) from failure
    return _program(exported, wanted, {n: wanted.holds(n) for n in states})


def _example(wanted: Traced, states: dict[str, Tensor], rows: int) -> tuple[object, ...]:
    # Equal sizes would become one symbol.
    shape, batch = wanted.shape, EXAMPLE_BATCH + (rows == EXAMPLE_BATCH)

    def whole(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64)

    return (
        whole(shape.slots, shape.positions),
        whole(rows),
        whole(rows),
        whole(batch),
        whole(batch, shape.block_length),
        whole(batch, shape.block_length),
        whole(batch),
        whole(batch),
        torch.zeros(batch),
        whole(batch),
        whole(batch),
        {name: torch.zeros(batch) for name in wanted.policy.parameters},
        {name: whole(batch) for name in wanted.extras()},
        {name: torch.zeros(rows) for name in wanted.rows()},
        states,
    )


def _dynamic(wanted: Traced, states: Mapping[str, Tensor], fixed: bool) -> tuple[object, ...]:
    rows, batch = None if fixed else {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}
    parameters = {name: batch for name in wanted.policy.parameters}
    extras = {name: batch for name in wanted.extras()}
    by_row = {name: rows for name in wanted.rows()}
    state = {name: None for name in states}
    return (None, rows, rows, *([batch] * 8), parameters, extras, by_row, state)


MODEL_INPUTS = {"row_seq", "row_pos"}


def _explain(failure: Exception, policy: Policy) -> DcompileError:
    text = str(failure)
    first = next((line for line in text.splitlines() if line.strip()), type(failure).__name__)
    kind = type(failure).__name__
    if "DataDependent" in kind or "data-dependent" in text.lower() or "unbacked" in text.lower():
        place = re.search(r'File "([^"]+)", line (\d+)', text)
        return DataDependentShape(
            f"the model's graph depends on its data: {first}",
            where=f"{place[1]}:{place[2]}" if place else None,
            remedy="select with masks (torch.where) instead of data-dependent shapes or branches",
        )
    if "specialized" in text.lower() or "Constraints violated" in text:
        named = set(re.findall(r"L\['(\w+)'\]", text))
        if named and not named & MODEL_INPUTS:
            return fixes_batch(policy)
        return UnsupportedModel(
            f"the model fixes its sequence length: {first}",
            remedy="take the length from ids.shape[1] everywhere",
        )
    return UnsupportedModel(
        f"the model cannot be exported: {kind}: {first}",
        remedy="make torch.export.export(model, (ids,), strict=False) work on it first",
    )


PARAMETER = "model."


def _program(exported: ExportedProgram, wanted: Traced, states: Mapping[str, Holds]) -> Program:
    """Our record of the exported graph: inputs by kind, outputs by name, facts on every node."""
    signature = exported.graph_signature
    module = torch.fx.GraphModule({}, exported.graph)
    inputs: list[Input] = []
    recipes: dict[str, Recipe] = {}
    constants: dict[str, Tensor] = {}
    # Export names an entry of the argument `state` after both.
    held: dict[str, Holds] = {"canvas": "canvas"}
    held |= {f"state_{name}": kind for name, kind in states.items()}
    holders = {n.name: n for n in module.graph.nodes if n.op == "placeholder"}
    for spec in signature.input_specs:
        node = holders[spec.arg.name]
        target = spec.target or ""
        if spec.kind is InputKind.PARAMETER or (
            spec.kind is InputKind.BUFFER and target.removeprefix(PARAMETER) in wanted.recipes
        ):
            path = target.removeprefix(PARAMETER)
            _rename(node, path.replace(".", "_"))
            recipes[node.name] = wanted.recipes[path]
            inputs.append(Input(node.name, "weight"))
        elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            _rename(node, "c_" + target.removeprefix(PARAMETER).replace(".", "_"))
            constants[node.name] = _constant(exported, target)
            inputs.append(Input(node.name, "constant"))
        elif spec.kind is InputKind.USER_INPUT:
            holds = held.get(node.name)
            _rename(node, re.sub("^(parameters|extras|rows|state)_", "", node.name))
            inputs.append(Input(node.name, "state" if holds else "step", holds))
        else:
            raise UnsupportedModel(f"the model has an input of kind {spec.kind.name.lower()}")
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        names = ", ".join([*signature.buffers_to_mutate.values()])
        raise UnsupportedModel(
            f"the model changes its own buffers while it runs: {names}",
            remedy="compute them from the input, or fix them before compiling",
        )
    for node in module.graph.nodes:
        node.meta = {"val": node.meta.get("val"), KEY: _facts(node)}
    _settle_shapes(module.graph)
    symbols = _symbols(module)
    outputs = [*OUTPUTS, *(Output(name, state=name) for name in states)]
    return Program(module, inputs, outputs, wanted.shape, recipes, constants, symbols)


VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.reshape.default,
}


def _settle_shapes(graph: torch.fx.Graph) -> None:
    """A view's one symbolic size is -1, so that no arithmetic on sizes is left for it."""
    for node in list(graph.nodes):
        if node.target not in VIEWS:
            continue
        shape = node.meta["val"].shape
        moving = [i for i, d in enumerate(shape) if not isinstance(d, int)]
        if len(moving) == 1:
            node.args = (node.args[0], [-1 if i in moving else d for i, d in enumerate(shape)])
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and _is_arithmetic(node):
            graph.erase_node(node)


def _is_arithmetic(node: Node) -> bool:
    return getattr(node.target, "__module__", "") in ("_operator", "operator") and isinstance(
        node.meta.get("val"), (int, torch.SymInt)
    )


def _symbols(module: torch.fx.GraphModule) -> dict[str, str]:
    """Export gives each input a symbol of its own until it sees that two must be equal."""
    found: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op != "placeholder" or node.name == "canvas":
            continue
        for dim in node.meta["val"].shape:
            if isinstance(dim, torch.SymInt):
                found[str(dim.node.expr)] = "R" if node.name.startswith("row_") else "B"
    return found


def _rename(node: Node, name: str) -> None:
    clean = re.sub(r"\W", "_", name)
    if node.name != clean:
        node._rename(clean)
    node.target = node.name


def _constant(exported: ExportedProgram, target: str) -> Tensor:
    tensor = exported.constants.get(target)
    if tensor is None:
        tensor = exported.state_dict.get(target)
    if not isinstance(tensor, Tensor) or isinstance(tensor, torch._subclasses.FakeTensor):
        raise UnsupportedModel(f"the model's constant {target} has no value at trace time")
    return tensor.detach()


def _facts(node: Node) -> Facts:
    """The innermost module that the node came from."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    origin = paths[-1].removeprefix("L['self'].").removeprefix("model.") if paths else ""
    if origin == "model":
        origin = ""
    layer = re.search(r"\b(?:layers|layer|h|blocks)\.(\d+)\b", origin)
    return Facts(origin=origin, layer=int(layer[1]) if layer else None)
