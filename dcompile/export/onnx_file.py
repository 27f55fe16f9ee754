"""Writes the ONNX model with its weights, in one file or beside it; it appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import IO

import onnx
import onnx_ir
import torch
from torch import Tensor

from dcompile.export.files import appearing, check_target
from dcompile.export.onnx_model import onnx_model
from dcompile.export.source import Source, facts
from dcompile.export.step import Entry, portable
from dcompile.ir.stored import StoredInput
from dcompile.runtime.tensors import array_of
from dcompile.runtime.weights import raw

INLINE_BYTES = (2 << 30) - (64 << 20)
"""More weights than this lie in a file of their own: protobuf ends at 2 GiB."""
_SMALL = 1 << 10  # bytes; what is smaller stays in the model
_PAGE = 4096
_TYPES = {
    torch.float32: onnx_ir.DataType.FLOAT,
    torch.float16: onnx_ir.DataType.FLOAT16,
    torch.bfloat16: onnx_ir.DataType.BFLOAT16,
    torch.float64: onnx_ir.DataType.DOUBLE,
    torch.int64: onnx_ir.DataType.INT64,
    torch.int32: onnx_ir.DataType.INT32,
    torch.int16: onnx_ir.DataType.INT16,
    torch.int8: onnx_ir.DataType.INT8,
    torch.uint8: onnx_ir.DataType.UINT8,
    torch.bool: onnx_ir.DataType.BOOL,
}
RUNNER = "run_onnx.py"


def write_onnx(
    source: Source, out: Path, entry: Entry, dtype: torch.dtype, inline_bytes: int = INLINE_BYTES
) -> list[Path]:
    """Write the step as `out`; beside it the weights where they are many, the tokenizer, `run_onnx.py`.

    The model is checked by onnx.checker, with full shape inference, before anything appears.  Weights are
    read and written one at a time.  Raises OutputError.
    """
    check_target(out)
    step = portable(source, entry, dtype)
    model = onnx_model(step)
    model.metadata_props["dcompile"] = json.dumps(facts(source, entry), sort_keys=True)
    with appearing(out) as folder:
        _add_weights(model, step.weights, source, dtype, folder / out.name, inline_bytes)
        onnx_ir.save(model, folder / out.name)
        onnx.checker.check_model(str(folder / out.name), full_check=True)
        if text := source.tokenizer.get("tokenizer.json"):
            (folder / f"{out.stem}.tokenizer.json").write_bytes(text)
        shutil.copyfile(Path(__file__).with_name(RUNNER), folder / RUNNER)
        names = sorted(path.name for path in folder.iterdir())
    return [out.parent / name for name in names]


def _add_weights(
    model: onnx_ir.Model,
    weights: tuple[StoredInput, ...],
    source: Source,
    dtype: torch.dtype,
    path: Path,
    inline_bytes: int,
) -> None:
    """Turn the graph's weight inputs into initializers, inside or in `path.data`."""
    values = [model.graph.inputs.pop(0) for _ in weights]
    total = sum(_bytes(value) for value in values)
    data = f"{path.name}.data" if total > inline_bytes else None
    with (path.with_name(data) if data else Path(os.devnull)).open("wb") as file:
        for item, value in zip(weights, values, strict=True):
            assert value.name == item.name
            tensor = source.read(item)
            tensor = tensor.to(dtype) if tensor.dtype == source.dtype else tensor
            if data is None or _bytes(value) < _SMALL:
                value.const_value = _inside(tensor, item.name)
            else:
                value.const_value = _outside(tensor, item.name, file, data, path.parent)
            model.graph.register_initializer(value)
            del tensor


def _bytes(value: onnx_ir.Value) -> int:
    assert value.shape is not None and value.dtype is not None
    size = 1
    for dim in value.shape:
        assert isinstance(dim, int)
        size *= dim
    return int(size * value.dtype.itemsize)


def _inside(tensor: Tensor, name: str) -> onnx_ir.TensorProtocol:
    proto = onnx.TensorProto(
        name=name,
        data_type=_TYPES[tensor.dtype],
        dims=tensor.shape,
        raw_data=bytes(raw(array_of(tensor))),
    )
    return onnx_ir.serde.deserialize_tensor(proto)


def _outside(
    tensor: Tensor, name: str, file: IO[bytes], location: str, folder: Path
) -> onnx_ir.TensorProtocol:
    file.write(bytes(-file.tell() % _PAGE))
    offset = file.tell()
    length = file.write(raw(array_of(tensor)))
    return onnx_ir.ExternalTensor(
        location,
        offset,
        length,
        _TYPES[tensor.dtype],
        shape=onnx_ir.Shape(tensor.shape),
        name=name,
        base_dir=folder,
    )
