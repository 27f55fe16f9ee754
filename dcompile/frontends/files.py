"""The tensors of a checkpoint's files: what they are from headers, their data when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from dcompile.errors import CheckpointError
from dcompile.frontends.torchfiles import Refused, load_plain
from dcompile.untrusted import MOST_HEADER, MOST_JSON, parse_json

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
WAYS_OUT = (
    'torch.save({"config": config_dict, "state_dict": model.state_dict()}, path), '
    "or compile the module from Python: dcompile.compile(module, ...)"
)


@dataclass(frozen=True)
class Header:
    """A tensor's shape and dtype, and the file that it lies in; other dtypes stay as text."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    file: str


class Tensors(Protocol):
    """Where a checkpoint's tensors come from."""

    @property
    def headers(self) -> Mapping[str, Header]: ...

    def read(self, name: str) -> torch.Tensor: ...


class Safetensors:
    """One or more safetensors files, mapped into memory."""

    def __init__(self, files: list[Path]) -> None:
        self.headers: dict[str, Header] = {}
        self._files: dict[str, Any] = {}
        for file in files:
            self._open(file)

    def _open(self, path: Path) -> None:
        try:
            _check_header(path)
            opened: Any = safe_open(path, framework="pt")
            self._files[path.name] = opened
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                part = opened.get_slice(name)
                dtype = part.get_dtype()
                shape = tuple(part.get_shape())
                self.headers[name] = Header(shape, DTYPES.get(dtype, dtype), path.name)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"not a whole safetensors file: {error}",
                where=str(path),
                remedy="copy or download the file again",
            ) from None

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[self.headers[name].file].get_tensor(name)
        return tensor


def _check_header(path: Path) -> None:
    """The library would make objects of a header of any size."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MOST_HEADER:
            raise ValueError(f"its header claims {size} bytes, most {MOST_HEADER}")


class StateDict:
    """The tensors of a loaded `model.pt`, mapped into memory by torch."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], file: str) -> None:
        self._tensors = tensors
        self.headers = {
            name: Header(tuple(tensor.shape), _float_or_text(tensor), file)
            for name, tensor in tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()


def open_folder(folder: Path) -> Safetensors:
    """The tensors of a Hugging Face folder: one file, or shards with an index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return Safetensors([single])
    if index.is_file():
        return _open_shards(folder, index)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt"))
    raise CheckpointError(
        "the folder has neither model.safetensors nor model.safetensors.index.json",
        where=str(folder),
        remedy=(
            f"convert {others[0]} to safetensors, or compile a model.pt that holds config and "
            "state_dict"
            if others
            else "download the checkpoint's *.safetensors files (and the index of a sharded one)"
        ),
    )


def open_state_dict(path: Path) -> tuple[dict[str, object], StateDict]:
    """The config and the tensors of a `model.pt`, loaded without running code from it."""
    loaded = _load(path)
    config, tensors = (
        (loaded.get("config"), loaded.get("state_dict")) if isinstance(loaded, dict) else (0, 0)
    )
    if not (_is_config(config) and isinstance(tensors, dict) and _all_dense(tensors)):
        raise CheckpointError(
            'not a dictionary {"config": {...}, "state_dict": {name: tensor}}',
            where=str(path),
            remedy=f"save it so: {WAYS_OUT}",
        )
    assert isinstance(config, dict)
    return config, StateDict(tensors, path.name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; anything else is named."""
    try:
        value = parse_json(read_small(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot be read as JSON: {error}", where=str(path), remedy="restore the file"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError("not a JSON object", where=str(path), remedy="restore the file")
    return value


def read_small(path: Path) -> bytes:
    """The bytes of a file beside the weights; ValueError where it is larger than any such file."""
    size = path.stat().st_size
    if size > MOST_JSON:
        raise ValueError(f"{path.name} has {size} bytes, most {MOST_JSON}")
    return path.read_bytes()


def _open_shards(folder: Path, index: Path) -> Safetensors:
    places = _weight_map(index)
    shards = sorted(set(places.values()))
    for shard in shards:
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"the index names the shard {shard!r}, which is not there",
                where=str(index),
                remedy=f"download {shard} into {folder}",
            )
    opened = Safetensors([folder / shard for shard in shards])
    for name, shard in places.items():
        if name not in opened.headers or opened.headers[name].file != shard:
            raise CheckpointError(
                f"the index places {name!r} in {shard!r}, which does not have it",
                where=str(index),
                remedy="download index and shards again, of one revision",
            )
    return opened


def _weight_map(index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(
            "the index has no object 'weight_map'", where=str(index), remedy="restore the file"
        )
    for name, shard in places.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or _leaves(shard):
            raise CheckpointError(
                f"the index places {name!r} in {shard!r}, which is not a file name of the folder",
                where=str(index),
                remedy="name *.safetensors files that lie beside the index",
            )
    return places


def _leaves(shard: str) -> bool:
    return "/" in shard or "\\" in shard or "\0" in shard


def _load(path: Path) -> object:
    try:
        return load_plain(path)
    except Refused as error:
        raise CheckpointError(
            str(error),
            where=str(path),
            remedy=f"save config and state_dict instead: {WAYS_OUT}",
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(
            str(error), where=str(path), remedy=f"copy the file again, or save anew: {WAYS_OUT}"
        ) from None


def _is_config(config: object) -> bool:
    return isinstance(config, dict) and all(isinstance(key, str) for key in config)


def _all_dense(tensors: Mapping[object, object]) -> bool:
    return all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.is_cpu
        and tensor.layout is torch.strided
        for name, tensor in tensors.items()
    )  # fmt: skip


def _float_or_text(tensor: torch.Tensor) -> torch.dtype | str:
    return tensor.dtype if tensor.dtype in DTYPES.values() else str(tensor.dtype)
