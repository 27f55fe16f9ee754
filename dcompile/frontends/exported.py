"""Exported programs (.pt2): screened before torch reads them, because reading one can run what it says.

torch's loader unpickles members, evaluates expressions of sizes, resolves dotted names and pastes names into
source text. So all of the archive is held to a list of what an exported model needs; anything else is refused.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcompile.errors import CheckpointError
from dcompile.frontends.exported_lengths import longest
from dcompile.frontends.torchfiles import first_line, load_plain, map_file
from dcompile.untrusted import parse_json, stored_members

_AGAIN = "save it with torch.export.save of this torch version"
_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|\.format_version|"
    r"\.storage_alignment|models/model\.json|data/sample_inputs/model\.pt|"
    r"data/(weights|constants)/(model_(weights|constants)_config\.json|(weight|tensor)_\d+)"
)
_CONFIG = re.compile(r"data/(weights|constants)/model_\w+_config\.json")
_NAME = re.compile(r"[A-Za-z_]\w*|", re.ASCII)
_PATH = re.compile(r"[\w.@]*", re.ASCII)
_SYMBOL = re.compile(r"-?[a-z]+\d+", re.ASCII)
# What the compiler writes into the comments of emitted code.
_MODULES = re.compile(r"[\w .,;@\[\]<>()'-]*", re.ASCII)
_VERSION = re.compile(r"[\w.+<>= -]*", re.ASCII)
_TEXTS = {"nn_module_stack": _MODULES, "torch_version": _VERSION, "path_name": _NAME}
_NOTES = {"stack_trace", "torch_fn", "custom", "from_node", "source_fn_stack"}
_TREES = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
_PYTHON = {
    "_operator": "add sub mul truediv floordiv mod pow neg eq ne lt le gt ge and_ or_ not_ getitem",
    "math": "trunc ceil floor sqrt",
    "torch": "sym_int sym_float sym_not sym_max sym_min sym_sum sym_ite",
    "torch.ops.higher_order": "wrap_with_set_grad_enabled wrap_with_autocast cond",
}
_TARGETS = {f"{module}.{name}" for module, names in _PYTHON.items() for name in names.split()}
# By name, for what they do besides: read a file, move a tensor's memory, trust their caller.
_UNSAFE = {"from_file", "set_data", "record_stream", "data"}
_SIZES = """FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift
    PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat
    Identity Max Min Abs Add Mul Pow Integer Rational Float Equality Unequality StrictLessThan LessThan
    StrictGreaterThan GreaterThan Eq Ne Lt Le Gt Ge And Or Not floor ceiling true false"""
_SYMPY = frozenset(_SIZES.split())
_EXPRESSION = (
    ast.BinOp, ast.UnaryOp, ast.Compare,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.UAdd,
    ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip
_LONGEST, _MOST_POWERS = 2000, 4


def open_exported(path: Path) -> tuple[nn.Module, int | None]:
    """The module of an exported program, and the greatest length that it holds for (None: any).

    Raises CheckpointError for anything else.
    """
    if not path.is_file():
        raise CheckpointError("there is no such file", where=str(path))
    try:
        screen(path)
    except (ValueError, OSError, RecursionError) as error:
        what = f"it is not an exported program that can be loaded safely: {error}"
        raise CheckpointError(what, where=str(path), remedy=_AGAIN) from None
    try:
        program = torch.export.load(path)
        # Guards are source text of the file's own: they are read, never run.
        module = program.module(check_guards=False)
    except Exception as error:
        what = (
            f"torch cannot load this exported program: {type(error).__name__}: {first_line(error)}"
        )
        raise CheckpointError(what, where=str(path), remedy=_AGAIN) from error
    return module, longest(program, str(path))


def screen(path: Path) -> None:
    """Raise ValueError where an archive holds anything that an exported model does not need."""
    data = map_file(path)
    members = stored_members(data)
    roots = {name.partition("/")[0] for name in members}
    if len(roots) != 1:
        raise ValueError("its members are not in one folder")
    for name, (begin, end) in members.items():
        inner = name.partition("/")[2]
        if not _MEMBERS.fullmatch(inner):
            raise ValueError(f"it has the member {name!r}, which no exported model needs")
        if inner == "models/model.json":
            _Screen(inner).value(parse_json(data[begin:end]))
        elif _CONFIG.fullmatch(inner):
            _screen_payload(parse_json(data[begin:end]), inner)
        elif inner.endswith(".pt"):
            # torch would unpickle what the careful way refuses.
            load_plain(bytes(data[begin:end]))


def _screen_payload(config: Any, where: str) -> None:
    _Screen(where).value(config)
    try:
        pickled = [name for name, item in config["config"].items() if item["use_pickle"]]
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"{where} lists no tensors") from None
    if pickled:
        raise ValueError(f"the tensor {pickled[0]!r} is pickled")


class _Screen:
    """Walks JSON; each string must be of the kind that its key calls for, and names where it knows none."""

    def __init__(self, where: str) -> None:
        self.where = where

    def value(self, value: Any, key: str = "") -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                self._key(name)
                self.value(item, name)
        elif isinstance(value, list):
            for item in value:
                self.value(item, key)
        elif isinstance(value, str):
            self._text(value, key)

    def _key(self, name: str) -> None:
        if "custom_obj" in name and name != "custom_obj_values":
            raise ValueError(f"{self.where} holds an object of a class ({name})")
        if not _PATH.fullmatch(name) and not _SYMBOL.fullmatch(name):
            raise ValueError(f"{self.where} has a name that is none: {_short(name)}")

    def _text(self, text: str, key: str) -> None:
        if key in _NOTES:
            return
        if key in ("as_string", "as_strings"):
            fits = len(text) <= _LONGEST and text.isprintable()
        elif key in ("target", "as_operator"):
            fits = _is_operator(text)
        elif key == "expr_str":
            fits = _is_size(text)
        elif key in ("in_spec", "out_spec"):
            fits = _is_tree(text)
        elif key == "guards_code":
            fits = len(text) <= _LONGEST
        elif key in _TEXTS:
            fits = bool(_TEXTS[key].fullmatch(text))
        elif key in ("parameter_name", "buffer_name", "tensor_constant_name", "fqn"):
            fits = bool(_PATH.fullmatch(text))
        else:
            fits = bool(_NAME.fullmatch(text)) and not keyword.iskeyword(text)
        if not fits:
            raise ValueError(f"{self.where} says {key}: {_short(text)}")


def _is_operator(text: str) -> bool:
    """An operator of torch that computes values from values, or arithmetic of sizes."""
    if text in _TARGETS:
        return True
    found = re.fullmatch(r"torch\.ops\.(aten|prims)\.(\w+)\.(\w+)", text, re.ASCII)
    if found is None or found[2] in _UNSAFE or found[2].startswith(("set_", "_record", "resize")):
        return False
    packet = getattr(getattr(torch.ops, found[1]), found[2], None)
    return isinstance(getattr(packet, found[3], None), torch._ops.OpOverload)


def _is_size(text: str) -> bool:
    """Arithmetic over symbols and small numbers, as sympy writes it; evaluating it is cheap."""
    if len(text) > _LONGEST or text.count("Pow") + text.count("**") > _MOST_POWERS:
        return False
    try:
        return _is_part(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, MemoryError):
        return False


def _is_part(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        whole = type(node.value) is int and abs(node.value) < 1 << 63
        return whole or type(node.value) in (bool, float)
    if isinstance(node, ast.Name):
        return node.id in _SYMPY or bool(_SYMBOL.fullmatch(node.id))
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and _is_call(node.func.id, node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _is_part(node.left) and _is_power(node.right)
    return isinstance(node, _EXPRESSION) and all(map(_is_part, ast.iter_child_nodes(node)))


def _is_call(name: str, node: ast.Call) -> bool:
    if name == "Symbol":
        plain = all(isinstance(k.value, ast.Constant) for k in node.keywords)
        first = node.args[0] if len(node.args) == 1 else None
        named = isinstance(first, ast.Constant) and isinstance(first.value, str)
        return plain and named and bool(_SYMBOL.fullmatch(first.value))  # type: ignore[union-attr]
    powers = node.args[1:] if "Pow" in name else []
    return (
        name in _SYMPY
        and not node.keywords
        and all(map(_is_part, node.args))
        and all(map(_is_power, powers))
    )


def _is_power(node: ast.AST) -> bool:
    """A small whole number, also as `Integer(2)`."""
    if isinstance(node, ast.Call) and len(node.args) == 1:
        node = node.args[0]
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) <= 8


def _is_tree(text: str) -> bool:
    """How arguments nest: tuples, lists and dictionaries of text keys."""
    if not text:
        return True
    try:
        pending: list[Any] = [json.loads(text)[1]] if len(text) <= 1 << 20 else [None]
        while pending:
            item = pending.pop()
            if item["type"] not in _TREES or not isinstance(item["context"], str | None):
                return False
            pending += item["children_spec"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return False
    return True


def _short(text: str) -> str:
    return repr(text if len(text) < 60 else text[:60] + "...")
