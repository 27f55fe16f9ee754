"""What an artifact or a checkpoint is, as data; an artifact's facts need no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcompile.errors import ArtifactError, CheckpointError
from dcompile.options import Options
from dcompile.runtime.archive import MANIFEST, SUFFIX, Archive, open_archive
from dcompile.runtime.decode.caches import EXACT
from dcompile.runtime.processor import cpu_flags
from dcompile.runtime.tokens import Tokenizer
from dcompile.untrusted import parse_json

Facts = dict[str, Any]
_CODE = (".so", ".cubin")


def facts_of(path: Path) -> Facts:
    """What is at `path`; raises ArtifactError or CheckpointError where that cannot be read."""
    if path.suffix == SUFFIX or (path / "plan.json").is_file():
        return _of_artifact(path)
    return _of_checkpoint(path)


def _of_artifact(path: Path) -> Facts:
    archive = open_archive(path)
    try:
        manifest = parse_json(archive.read(MANIFEST))
        plan = parse_json(archive.read("plan.json"))
        return {"kind": "artifact", "path": str(path), **_manifest_facts(manifest, plan, archive)}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"what the artifact says of itself cannot be read ({error!r:.200})"
        raise ArtifactError(what, where=str(path), remedy="compile the model again") from error


def _manifest_facts(
    manifest: Mapping[str, Any], plan: Mapping[str, Any], archive: Archive
) -> Facts:
    model, policy, options = manifest["model"], manifest["policy"], manifest["options"]
    sizes = {str(name): int(claim["bytes"]) for name, claim in manifest["files"].items()}
    outside = manifest.get("external") or {"folder": None, "files": {}}
    layers = {
        int(launch["layer"]) for launch in plan["launches"] if launch.get("layer") is not None
    }
    return {
        "dcompile": str(manifest["dcompile"]),
        "format": int(manifest["format"]),
        "model": {
            "family": str(model["family"]),
            "layers": 1 + max(layers, default=-1),
            "dtype": str(model["dtype"]),
            "vocab_size": int(model["vocab_size"]),
            "mask_id": int(model["mask_id"]),
            "eos_ids": [int(token) for token in model["eos_ids"]],
            "attention_block": _count(model["block_length"]),
            "max_positions": _count(model["max_positions"]),
        },
        "target": str(manifest["target"]),
        "machine": str(manifest.get("machine") or ""),
        "runs_here": _variant(manifest["kernels"].get("isas") or {}),
        "manager": str(options.get("manager", "blockwise")),
        "policy": {
            "name": str(policy["name"]),
            "parameters": {str(k): float(v) for k, v in policy["parameters"].items()},
        },
        "cache": _cache(options.get("cache", "none")),
        "block_length": int(plan["sizes"]["n"]),
        "max_length": int(plan["sizes"]["L"]),
        "batch": int(plan["sizes"]["N"]),
        **_texts(Tokenizer(_Files(tuple(sizes), archive.read))),
        "bytes": _bytes(sizes, outside["files"]),
        "weights_folder": outside["folder"],
        "options": dict(options),
    }


def _count(value: Any) -> int | None:
    return None if value is None else int(value)


def _variant(isas: Mapping[str, Any]) -> str | None:
    """The code that this machine would run; None where it is a GPU's, or for other processors."""
    flags = cpu_flags()
    return next((str(isa) for isa, needs in isas.items() if flags >= {*needs["requires"]}), None)


def _cache(name: Any) -> Facts:
    return {"name": str(name), "exact": name in EXACT}


def _texts(tokenizer: Tokenizer) -> Facts:
    return {"tokenizer": tokenizer.present, "chat_template": tokenizer.has_template}


def _bytes(sizes: Mapping[str, int], outside: Mapping[str, Any]) -> Facts:
    """Sizes by what they are for; code by instruction set or architecture."""
    code: Counter[str] = Counter()
    weights = sum(int(claim["bytes"]) for claim in outside.values())
    for name, size in sizes.items():
        if name.startswith("weights/"):
            weights += size
        elif name.endswith(_CODE):
            code[name.split("/")[1]] += size
    whole = sum(sizes.values()) + sum(int(claim["bytes"]) for claim in outside.values())
    other = whole - weights - code.total()
    return {"all": whole, "weights": weights, "code": dict(code), "other": other}


@dataclass(frozen=True)
class _Files:
    """A tokenizer's files where they are not an opened artifact's."""

    names: tuple[str, ...]
    bytes: Any

    def text(self, name: str) -> str:
        return str(self.bytes(name), "utf-8")


def _of_checkpoint(path: Path) -> Facts:
    from dcompile.driver.settle import settle
    from dcompile.frontends.checkpoint import open_checkpoint

    if path.suffix == ".pt2" and path.is_file():
        what = "an exported program does not say what model it is"
        remedy = f"dcompile {path} --mask-id N, and then dcompile info of what that writes"
        raise CheckpointError(what, where=str(path), remedy=remedy)
    checkpoint = open_checkpoint(path)
    spec = checkpoint.spec
    settled = settle(Options(), spec)
    combination, shape = settled.combination, settled.shape
    files = {f"tokenizer/{name}": data for name, data in checkpoint.tokenizer_files().items()}
    values, size = checkpoint.size()
    return {
        "kind": "checkpoint",
        "path": str(path),
        "model": {
            "family": spec.family,
            "layers": len(spec.layer_kinds),
            "parameters": values,
            "dtype": str(spec.dtype).removeprefix("torch."),
            "vocab_size": spec.vocab_size,
            "mask_id": spec.mask_id,
            "eos_ids": list(spec.eos_ids),
            "attention_block": spec.block_length,
            "max_positions": spec.max_positions,
        },
        "manager": combination.manager,
        "policy": {"name": settled.policy.name, "parameters": dict(settled.parameters)},
        "cache": _cache(combination.cache),
        "block_length": shape.block_length,
        "max_length": shape.positions,
        "batch": shape.slots,
        **_texts(Tokenizer(_Files(tuple(files), lambda name: memoryview(files[name])))),
        "bytes": {"weights": size},
    }
