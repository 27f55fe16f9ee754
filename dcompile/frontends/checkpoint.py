"""Opens a checkpoint: checks all of it from headers, reads tensor data only when asked for."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import nn

from dcompile.errors import CheckpointError, ConfigError, TensorError
from dcompile.frontends import files, tokens
from dcompile.frontends.base import Config, Definition, ModelSpec
from dcompile.frontends.byte_bpe import with_tokenizer_json
from dcompile.frontends.families import family_of
from dcompile.frontends.unused import refuse_what_differs, replaced
from dcompile.ir.weights import Recipe, Stack

# What transformers writes into any config, and what says how a model was trained or is to be used.
HARMLESS = """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures
    attention_dropout attn_implementation auto_map bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size eos_token_id finetuning_task gradient_checkpointing id2label
    initializer_range is_decoder is_encoder_decoder label2id length_penalty mask_token_id max_length
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torchscript transformers_version typical_p
    unsloth_fixed unsloth_version use_bfloat16 use_cache use_return_dict
"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_checkpoint(
    path: str | Path, mask_id: int | None = None, block_length: int | None = None
) -> Checkpoint:
    """Opens a Hugging Face folder or a `model.pt`.

    `mask_id` overrules what the files say; `block_length` is a block-causal mask's where they say
    nothing of it.
    """
    path = Path(path)
    if (path.suffix == ".dcx" and path.exists()) or (path / "plan.json").is_file():
        raise CheckpointError(
            "an artifact, which is compiled already",
            where=str(path),
            remedy=f"dcompile run {path} --prompt TEXT",
        )
    if path.is_dir():
        return _open_folder(path, mask_id, block_length)
    if path.is_file() and path.suffix != ".safetensors":
        values, tensors = files.open_state_dict(path)
        return _open(Config(values, f"{path}, config", block_length), tensors, {}, mask_id)
    raise CheckpointError(
        "no checkpoint is there"
        if not path.exists()
        else "one file of a checkpoint, not all of it",
        where=str(path),
        remedy="give the folder with config.json and *.safetensors, or a model.pt",
    )


@dataclass(frozen=True)
class Checkpoint:
    """A model's facts, its plain definition and its weights."""

    spec: ModelSpec
    recipes: Mapping[str, Recipe]  # by the full module's parameter names
    unread: tuple[str, ...]  # keys of the config that may mean something, and were not read
    _definition: Definition
    _tensors: files.Tensors
    _tokenizer_files: Mapping[str, bytes]

    def build(self, layers: Sequence[int] | None = None) -> nn.Module:
        """The plain module with the named layers (default: all), parameters uninitialised."""
        chosen = range(len(self.spec.layer_kinds)) if layers is None else layers
        return self._definition.build(chosen, self.spec.dtype).requires_grad_(False).eval()

    def read(self, name: str) -> torch.Tensor:
        """One tensor of the checkpoint as stored: mapped, not copied."""
        return self._tensors.read(name)

    def reference(self) -> nn.Module:
        """The full module with its weights; what everything is compared with."""
        module = self.build()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(self.recipes[name].read(self.read))
        return module

    def size(self) -> tuple[int, int]:
        """How many values the tensors hold, and how many bytes they take."""
        headers = self._tensors.headers.values()
        kinds = [(prod(h.shape), h.dtype) for h in headers if isinstance(h.dtype, torch.dtype)]
        return sum(n for n, _ in kinds), sum(n * dtype.itemsize for n, dtype in kinds)

    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Those of the checkpoint, and a tokenizer.json also where it has only what that is made of."""
        return with_tokenizer_json(self._tokenizer_files)

    def digest(self) -> str:
        """sha256 over the names, shapes and dtypes of the tensors: a cheap identity, no more."""
        listed = sorted((n, h.shape, str(h.dtype)) for n, h in self._tensors.headers.items())
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _open_folder(folder: Path, mask_id: int | None, block_length: int | None) -> Checkpoint:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            "the folder has no config.json",
            where=str(folder),
            remedy="give the folder of a Hugging Face checkpoint: config.json, *.safetensors",
        )
    config = Config(files.read_json(file), str(file), block_length)
    beside = {name: folder / name for name in tokens.FILES}
    beside |= {path.relative_to(folder).as_posix(): path for path in folder.glob(tokens.TEMPLATES)}
    try:
        present = {n: files.read_small(path) for n, path in beside.items() if path.is_file()}
    except (OSError, ValueError) as error:
        what = f"a file beside the weights cannot be read: {error}"
        raise CheckpointError(what, where=str(folder), remedy="restore the file") from None
    # An unknown architecture is said before anything about its tensors.
    family_of(config)
    return _open(config, files.open_folder(folder), present, mask_id)


def _open(
    config: Config, tensors: files.Tensors, present: Mapping[str, bytes], mask_id: int | None
) -> Checkpoint:
    definition = family_of(config)(config)
    recipes = _check_tensors(definition, tensors.headers)
    dtype = _dtype(config, tensors.headers)
    refuse_what_differs(definition, dtype, tensors)
    spec = ModelSpec(
        family=definition.family,
        vocab_size=definition.vocab_size,
        mask_id=tokens.find_mask_id(config, present, definition.vocab_size, mask_id),
        eos_ids=tokens.find_eos_ids(config, present, definition.vocab_size),
        max_positions=definition.max_positions,
        block_length=definition.block_length,
        shift=definition.shift,
        dtype=dtype,
        layer_kinds=definition.layer_kinds,
        defaults=definition.defaults,
    )
    config.ignore(HARMLESS)
    return Checkpoint(spec, recipes, config.unread(), definition, tensors, present)


def _check_tensors(
    definition: Definition, headers: Mapping[str, files.Header]
) -> dict[str, Recipe]:
    """The recipes, once every tensor that they name is there as the config says, and no other."""
    with torch.device("meta"):
        full = definition.build(range(len(definition.layer_kinds)), torch.float32)
    shapes = {name: tuple(parameter.shape) for name, parameter in full.named_parameters()}
    recipes = definition.recipes(list(shapes))
    expected = {
        source: shapes[name][1:] if isinstance(recipe, Stack) else shapes[name]
        for name, recipe in recipes.items()
        for source in recipe.names()
    }
    for name, shape in expected.items():
        _check_tensor(name, shape, headers)
    surplus = [name for name in headers if name not in expected and not replaced(definition, name)]
    if surplus:
        raise TensorError(
            f"{len(surplus)} tensors that the config does not describe, such as {surplus[0]!r}",
            where=headers[surplus[0]].file,
            remedy="correct the config (sizes, flags), or save the checkpoint without them",
        )
    return recipes


def _check_tensor(name: str, shape: tuple[int, ...], headers: Mapping[str, files.Header]) -> None:
    if name not in headers:
        raise TensorError(
            f"the tensor {name!r} of shape {list(shape)} is missing",
            where=", ".join(sorted({header.file for header in headers.values()})) or None,
            remedy="download the checkpoint again, or correct the config's sizes and flags",
        )
    header = headers[name]
    if header.shape != shape:
        raise TensorError(
            f"{name!r} has the shape {list(header.shape)}; the config says {list(shape)}",
            where=header.file,
            remedy="use config and weights of one model",
        )
    if not isinstance(header.dtype, torch.dtype):
        raise TensorError(
            f"{name!r} has the dtype {header.dtype}; expected one of {', '.join(DTYPES)}",
            where=header.file,
            remedy="save the checkpoint's weights in one of these dtypes",
        )


def _dtype(config: Config, headers: Mapping[str, files.Header]) -> torch.dtype:
    """What the config says, else the dtype that most of the weights have."""
    stated = {key: config.get(key) for key in ("torch_dtype", "dtype") if config.given(key)}
    named = {key: str(value).removeprefix("torch.") for key, value in stated.items()}
    for key, name in named.items():
        if name not in DTYPES or name != next(iter(named.values())):
            raise config.error(key, f"one of {', '.join(DTYPES)}, the same under either key")
    if named:
        return DTYPES[next(iter(named.values()))]
    elements: Counter[torch.dtype] = Counter()
    for header in headers.values():
        if isinstance(header.dtype, torch.dtype):
            elements[header.dtype] += prod(header.shape)
    if not elements:
        raise ConfigError("no weights", where=config.file, remedy="save the weights with it")
    return elements.most_common(1)[0][0]
