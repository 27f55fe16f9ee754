"""Opening checkpoints: what is read, and what each damaged or contradicting file is told."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import EOS, FAMILIES, MASK, make_tensors, write_checkpoint, write_model_pt
from checkpoints import make_config as config_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from dcompile.errors import (
    CheckpointError,
    ConfigError,
    DcompileError,
    TensorError,
    UnknownArchitecture,
)
from dcompile.frontends.checkpoint import open_checkpoint


def refused(kind: type[DcompileError], path: Path, *named: str, mask_id: int | None = None) -> None:
    """Opening the path raises this very kind, which names these things, a place and a remedy."""
    with pytest.raises(DcompileError) as caught:
        open_checkpoint(path, mask_id=mask_id)
    assert type(caught.value) is kind, caught.value
    assert caught.value.where and caught.value.remedy
    for text in named:
        assert text in str(caught.value)


def edit_config(folder: Path, **changes: object) -> Path:
    """Replaces keys of config.json; a value of `...` removes its key."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


# What is read


@pytest.mark.parametrize("family", FAMILIES)
def test_spec(tmp_path: Path, family: str) -> None:
    spec = open_checkpoint(write_checkpoint(tmp_path, family)).spec
    assert (spec.family, spec.mask_id, spec.eos_ids) == (family, MASK, (EOS,))
    assert (spec.dtype, spec.max_positions) == (torch.float32, 256)
    assert spec.shift == (family == "dream")
    assert spec.block_length == {"llada2": 32, "sdar": 4, "sdar_moe": 4}.get(family)
    assert spec.defaults.cache == ("block" if spec.block_length else "dual")
    tuned = {"threshold": spec.defaults.threshold}
    assert spec.defaults.threshold and spec.defaults.parameters("threshold") == tuned
    # Only the reports of block-diffusion models name `dynamic` too.
    assert spec.defaults.parameters("dynamic") == (tuned if spec.block_length else {})
    assert spec.defaults.parameters("factor") == {}


def test_layer_kinds(tmp_path: Path) -> None:
    kinds = open_checkpoint(write_checkpoint(tmp_path, "llada2")).spec.layer_kinds
    assert kinds == ("dense", "moe", "moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_folder_and_model_pt_hold_the_same_model(tmp_path: Path, family: str) -> None:
    whole = open_checkpoint(write_checkpoint(tmp_path / "whole", family))
    shards = open_checkpoint(write_checkpoint(tmp_path / "shards", family, sharded=True))
    single = open_checkpoint(write_model_pt(tmp_path / "model.pt", family))
    assert whole.spec == shards.spec == single.spec
    assert whole.digest() == shards.digest() == single.digest()
    ids = torch.arange(9)[None]
    expected = whole.reference()(ids)
    assert torch.equal(shards.reference()(ids), expected)
    assert torch.equal(single.reference()(ids), expected)


def test_digest_tells_shapes_apart(tmp_path: Path) -> None:
    one = open_checkpoint(write_checkpoint(tmp_path / "a", "sdar")).digest()
    other = open_checkpoint(write_checkpoint(tmp_path / "b", "sdar", intermediate_size=96))
    assert one != other.digest()


def test_read_gives_tensors_as_stored(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "sdar", dtype=torch.bfloat16)
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.spec.dtype is torch.bfloat16
    assert checkpoint.read("model.norm.weight").dtype is torch.float32
    assert checkpoint.reference().norm.weight.dtype is torch.bfloat16


def test_dtype_without_a_key_is_that_of_most_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llada_moe", dtype=torch.float16, torch_dtype=...)
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}))
    assert open_checkpoint(folder).spec.dtype is torch.float16
    assert open_checkpoint(edit_config(folder, dtype="bfloat16")).spec.dtype is torch.bfloat16


def test_tokenizer_files_are_those_that_exist(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "dream")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    files = open_checkpoint(folder).tokenizer_files()
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    assert tokenizer.encode("a <|mdm_mask|>").ids == [65, 0, MASK]
    assert tokenizer.token_to_id("<|endoftext|>") == EOS


def frequencies(theta: float) -> torch.Tensor:
    """Of a rotary embedding of 16 dimensions: [8]"""
    return theta ** (-torch.arange(8) / 8)


def test_surplus_that_says_the_same_is_ignored(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "sdar", tie_word_embeddings=True)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    surplus = {
        "model.rotary_emb.inv_freq": frequencies(1e6),
        "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies(1e6).bfloat16(),
        "model.layers.1.self_attn.rotary_emb.inv_freq": frequencies(1e6).half(),
        "lm_head.weight": table.clone(),
    }
    checkpoint = open_checkpoint(edit_tensors(folder, lambda t: t.update(surplus)))
    model = checkpoint.reference()
    assert torch.equal(model.lm_head.weight, model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("family", "tie", "head", "table"),
    [
        ("llada", "weight_tying", "model.transformer.ff_out", "model.transformer.wte"),
        ("llada2", "tie_word_embeddings", "lm_head", "model.word_embeddings"),
        ("dream", "tie_word_embeddings", "lm_head", "model.embed_tokens"),
    ],
)
def test_a_tied_model_with_another_head_is_refused(
    tmp_path: Path, family: str, tie: str, head: str, table: str
) -> None:
    def another(tensors: dict[str, torch.Tensor]) -> None:
        made = tensors[f"{table}.weight"].clone()
        made[-1, -1] += 1
        tensors[f"{head}.weight"] = made

    folder = edit_tensors(write_checkpoint(tmp_path, family, **{tie: True}), another)
    refused(TensorError, folder, f"{head}.weight", f"{table}.weight", "differs", tie)
    # The remedy works: the stored one is used.
    model = open_checkpoint(edit_config(folder, **{tie: False})).reference()
    assert (model.lm_head.weight != model.embed_tokens.weight).sum() == 1


@pytest.mark.parametrize(
    "stored", [frequencies(1e4), frequencies(1e4).bfloat16(), frequencies(1e6)[:4]]
)
def test_other_rotary_frequencies_than_the_configs_are_refused(
    tmp_path: Path, stored: torch.Tensor
) -> None:
    surplus = {"model.rotary_emb.inv_freq": stored}
    folder = edit_tensors(write_checkpoint(tmp_path, "sdar"), lambda t: t.update(surplus))
    refused(TensorError, folder, "model.rotary_emb.inv_freq", "rotary", "1e+06")


def test_null_stands_for_none_where_the_authors_say_so(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", "llada2", num_shared_experts=0)
    assert open_checkpoint(edit_config(folder, num_shared_experts=None))
    folder = write_checkpoint(tmp_path / "b", "llada", n_kv_heads=4, embedding_size=131)
    spec = open_checkpoint(edit_config(folder, n_kv_heads=None, embedding_size=None)).spec
    assert spec.vocab_size == 131


# Keys that published configs have beside those of `write_checkpoint`; the families' own, then all's.
PUBLISHED: dict[str, dict[str, object]] = {
    "llada": {
        **{
            "alibi_bias_max": 8.0,
            "attention_layer_norm_with_affine": True,
            "flash_attention": False,
        },
        **{"block_group_size": 1, "embedding_dropout": 0.0, "init_cutoff_factor": None},
        **{"init_device": "meta", "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False},
        **{"layer_norm_with_affine": True, "bias_for_layer_norm": False, "precision": "amp_bf16"},
        **{"residual_dropout": 0.0, "scale_logits": False},
    },
    "llada_moe": {
        **{"clip_qkv": None, "output_router_logits": False, "router_aux_loss_coef": 0.01},
        **{"router_num_group": None, "router_topk_group": None},
    },
    "llada2": {
        **{"embedding_dropout": 0.0, "max_window_layers": 28, "norm_head": False},
        **{"norm_softmax": False, "output_dropout": 0.0, "output_router_logits": False},
        **{"router_dtype": "fp32", "use_rmsnorm": True},
        "using_split_qkv_in_self_attention": False,
    },
    "dream": {"max_window_layers": 28, "use_mrope": False},
    "sdar": {
        **{"debug": False, "ep_size": 1, "fuse_cross_entropy": True, "max_window_layers": 28},
        **{"micro_forward": False, "skip_checkpoint": False, "use_deepep": False},
    },
    "sdar_moe": {
        **{"max_window_layers": 28, "output_router_logits": False, "router_aux_loss_coef": 0.001},
    },
}
OF_TRANSFORMERS: dict[str, object] = {
    **{"attention_dropout": 0.0, "auto_map": {"AutoModel": "modeling.Model"}, "bos_token_id": 1},
    **{"initializer_range": 0.02, "transformers_version": "4.46.2", "use_cache": False},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_a_published_config_is_known(tmp_path: Path, family: str) -> None:
    assert open_checkpoint(write_checkpoint(tmp_path / "plain", family)).unread == ()
    whole = write_checkpoint(tmp_path / "whole", family, **PUBLISHED[family], **OF_TRANSFORMERS)
    assert open_checkpoint(whole).unread == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_may_mean_something_are_named(tmp_path: Path, family: str) -> None:
    odd = {"attention_chunk_size": 8, "final_logit_softcapping": 30.0, "qk_gain": None}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, family, **odd))
    assert checkpoint.unread == ("attention_chunk_size", "final_logit_softcapping")


def test_an_expert_key_of_a_dense_model_is_named(tmp_path: Path) -> None:
    assert open_checkpoint(write_checkpoint(tmp_path, "dream", n_group=4)).unread == ("n_group",)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_attend_in_a_window_are_refused(tmp_path: Path, family: str) -> None:
    layers = 3 if family == "llada2" else 2
    full = ["full_attention"] * layers
    folder = write_checkpoint(tmp_path, family, layer_types=full, use_sliding_window=...)
    assert open_checkpoint(folder).unread == ()
    for kinds in (["sliding_attention", *full[1:]], full[1:], "full_attention", []):
        refused(ConfigError, edit_config(folder, layer_types=kinds), "'layer_types'", str(kinds))


ROTARY: list[tuple[str, dict[str, object]]] = [
    ("llada2", {"partial_rotary_factor": 0.75}),
    ("llada2", {"rotary_dim": 12}),
    ("llada2", {"partial_rotary_factor": 0.75, "rotary_dim": 12}),
    ("llada2", {"rope_parameters": {"partial_rotary_factor": 0.75, "rope_theta": 600000}}),
    ("llada2", {"rope_parameters": {"rotary_dim": 12}}),
    ("llada2", {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.75}}),
    ("llada_moe", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}}),
    ("llada_moe", {"rotary_dim": 12}),
]


@pytest.mark.parametrize(("family", "keys"), ROTARY)
def test_rotary_dimensions_from_any_of_their_places(
    tmp_path: Path, family: str, keys: dict[str, object]
) -> None:
    absent: dict[str, object] = {"partial_rotary_factor": ..., "rotary_dim": ...}
    folder = edit_config(write_checkpoint(tmp_path, family), **{**absent, **keys})
    assert open_checkpoint(folder).build([]).sizes.rotary_dim == 12


def test_rope_parameters_of_newer_configs(tmp_path: Path) -> None:
    old = open_checkpoint(write_checkpoint(tmp_path / "old", "sdar"))
    rope = {"rope_type": "default", "rope_theta": 1000000}
    new = write_checkpoint(tmp_path / "new", "sdar", rope_theta=..., rope_parameters=rope)
    ids = torch.arange(9)[None]
    assert torch.equal(old.reference()(ids), open_checkpoint(new).reference()(ids))


# Mask and end-of-sequence ids


@pytest.mark.parametrize("token", ["<|mdm_mask|>", "<|mask|>", "<mask>", "<|MASK|>"])
@pytest.mark.parametrize("where", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_mask_id_from_the_tokenizer(tmp_path: Path, token: str, where: str) -> None:
    folder = write_checkpoint(tmp_path, "llada_moe")
    (folder / "tokenizer.json").unlink()
    contents: dict[str, Any] = {
        "tokenizer.json": {"added_tokens": [{"id": 101, "content": token}]},
        "tokenizer_config.json": {"added_tokens_decoder": {"101": {"content": token}}},
        "added_tokens.json": {token: 101},
    }
    (folder / where).write_text(json.dumps(contents[where]))
    assert open_checkpoint(folder).spec.mask_id == 101


def test_mask_id_named_by_the_tokenizer_comes_first(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llada_moe")
    tokens = [{"id": 100, "content": "<|odd|>"}, {"id": 101, "content": "<mask>"}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    (folder / "tokenizer_config.json").write_text('{"mask_token": {"content": "<|odd|>"}}')
    assert open_checkpoint(folder).spec.mask_id == 100


def test_mask_id_given_by_the_user_wins(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "dream")
    assert open_checkpoint(folder, mask_id=5).spec.mask_id == 5
    refused(ConfigError, folder, "--mask-id", "131", mask_id=131)


@pytest.mark.parametrize(
    ("family", "keys", "expected"),
    [
        ("sdar", {}, 64),
        ("llada2", {}, 64),
        ("sdar", {"block_size": 8}, 8),
        ("llada2", {"block_length": 16}, 16),
        ("dream", {}, None),
    ],
)
def test_a_mask_s_block_length_is_the_user_s_where_the_config_has_none(
    tmp_path: Path, family: str, keys: dict[str, object], expected: int | None
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, family, **keys), block_length=64)
    assert checkpoint.spec.block_length == expected
    assert checkpoint.build([]).sizes.block_length == expected


def test_mask_id_missing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llada_moe")
    (folder / "tokenizer.json").unlink()
    refused(ConfigError, folder, "mask_token_id", "--mask-id")


@pytest.mark.parametrize("value", [131, -1, "129", True, 1.5])
def test_ids_out_of_the_vocabulary(tmp_path: Path, value: object) -> None:
    folder = write_checkpoint(tmp_path, "dream")
    refused(ConfigError, edit_config(folder, mask_token_id=value), "mask_token_id", "0 to 130")
    folder = edit_config(folder, mask_token_id=MASK, eos_token_id=[EOS, value])
    refused(ConfigError, folder, "eos_token_id", "0 to 130")


def test_eos_ids(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "sdar", eos_token_id=[EOS, 3])
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert open_checkpoint(folder).spec.eos_ids == (EOS, 3, 4)
    (folder / "generation_config.json").unlink()
    assert open_checkpoint(edit_config(folder, eos_token_id=...)).spec.eos_ids == (EOS,)
    (folder / "tokenizer_config.json").unlink()
    refused(ConfigError, folder, "eos_token_id")
    assert open_checkpoint(edit_config(folder, eos_token_id=None)).spec.eos_ids == ()


# Configs

REQUIRED = {
    "llada": "architectures d_model n_layers n_heads n_kv_heads mlp_hidden_size rope_theta "
    "embedding_size vocab_size rms_norm_eps",
    "llada_moe": "architectures hidden_size num_hidden_layers num_attention_heads "
    "num_key_value_heads num_experts num_experts_per_tok expert_intermediate_size norm_topk_prob "
    "qk_layernorm rope_theta rms_norm_eps vocab_size",
    "llada2": "hidden_size num_hidden_layers num_attention_heads num_key_value_heads num_experts "
    "num_experts_per_tok first_k_dense_replace n_group topk_group routed_scaling_factor "
    "num_shared_experts moe_intermediate_size intermediate_size rope_theta rms_norm_eps vocab_size",
    "dream": "hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
    "intermediate_size rope_theta rms_norm_eps vocab_size",
    "sdar": "hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
    "intermediate_size rope_theta rms_norm_eps vocab_size",
    "sdar_moe": "hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
    "num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_missing_key_is_named(tmp_path: Path, family: str) -> None:
    folder = write_checkpoint(tmp_path, family)
    whole = (folder / "config.json").read_text()
    for key in REQUIRED[family].split():
        (folder / "config.json").write_text(whole)
        refused(
            ConfigError, edit_config(folder, **{key: ...}), repr(key), "config.json", "expected"
        )


@pytest.mark.parametrize("value", [0, -4, 64.0, "64", None, True, [64], 10**30])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_experts", "vocab_size"])
def test_sizes_are_positive_integers(tmp_path: Path, key: str, value: object) -> None:
    folder = write_checkpoint(tmp_path, "llada_moe")
    refused(ConfigError, edit_config(folder, **{key: value}), repr(key), "integer")


@pytest.mark.parametrize("value", [0, -1.0, "1e-5", None, float("nan"), float("inf"), 10**400])
def test_numbers_are_positive_and_finite(tmp_path: Path, value: object) -> None:
    folder = write_checkpoint(tmp_path, "sdar")
    refused(ConfigError, edit_config(folder, rms_norm_eps=value), "'rms_norm_eps'", "positive")


CONTRADICTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("llada_moe", "hidden_size", {"num_attention_heads": 5}),
    ("llada_moe", "num_attention_heads", {"num_key_value_heads": 3}),
    ("llada_moe", "num_experts_per_tok", {"num_experts_per_tok": 9}),
    ("llada_moe", "head_dim", {"head_dim": 32}),
    ("llada_moe", "moe_layer_freq", {"moe_layer_freq": [1, 1, 1]}),
    ("llada_moe", "moe_layer_freq", {"moe_layer_freq": [1, 2]}),
    ("llada_moe", "dense_intermediate_size", {"moe_layer_freq": 0, "dense_intermediate_size": 0}),
    ("llada_moe", "norm_topk_prob", {"norm_topk_prob": "no"}),
    ("llada_moe", "partial_rotary_factor", {"partial_rotary_factor": 1.5}),
    ("llada_moe", "partial_rotary_factor", {"partial_rotary_factor": 0.2}),
    ("llada_moe", "moe_router_score_function", {"moe_router_score_function": "sigmoid"}),
    ("llada_moe", "moe_router_enable_expert_bias", {"moe_router_enable_expert_bias": True}),
    ("llada_moe", "shared_expert_intermediate_size", {"shared_expert_intermediate_size": 24}),
    ("llada_moe", "attention_bias", {"attention_bias": True}),
    ("llada_moe", "hidden_act", {"hidden_act": "gelu"}),
    ("llada_moe", "rope_scaling", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ("llada_moe", "rope_scaling", {"rope_scaling": "linear"}),
    ("llada_moe", "rope_parameters", {"rope_parameters": {"rope_theta": 1e6}}),
    ("llada_moe", "rope_parameters", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ("llada_moe", "rotary_dim", {"rotary_dim": 8}),
    ("llada_moe", "rotary_dim", {"rotary_dim": 32, "partial_rotary_factor": ...}),
    ("llada_moe", "torch_dtype", {"torch_dtype": "int8"}),
    ("llada_moe", "dtype", {"torch_dtype": "float32", "dtype": "bfloat16"}),
    ("llada", "activation_type", {"activation_type": ...}),
    ("llada", "block_type", {"block_type": ...}),
    ("llada", "layer_norm_type", {"layer_norm_type": ...}),
    ("llada", "rope", {"rope": ...}),
    ("llada", "num_hidden_layers", {"num_hidden_layers": 3}),
    ("llada", "d_model", {"n_heads": 7}),
    ("llada", "n_heads", {"n_kv_heads": 3}),
    ("llada", "embedding_size", {"embedding_size": 100}),
    ("llada", "alibi", {"alibi": True}),
    ("llada", "include_qkv_bias", {"include_qkv_bias": True}),
    ("llada", "block_type", {"block_type": "sequential"}),
    ("llada", "layer_norm_type", {"layer_norm_type": "default"}),
    ("llada", "multi_query_attention", {"multi_query_attention": False}),
    ("llada2", "num_experts", {"n_group": 3}),
    ("llada2", "n_group", {"n_group": 8}),
    ("llada2", "topk_group", {"topk_group": 5}),
    ("llada2", "num_experts_per_tok", {"num_experts_per_tok": 5}),
    ("llada2", "rotary_dim", {"rotary_dim": 16}),
    ("llada2", "partial_rotary_factor", {"rotary_dim": ..., "partial_rotary_factor": ...}),
    ("llada2", "rope_parameters", {"rope_parameters": {"rotary_dim": 16}}),
    ("llada2", "first_k_dense_replace", {"first_k_dense_replace": 4}),
    ("llada2", "use_sliding_window", {"use_sliding_window": True}),
    ("llada2", "num_nextn_predict_layers", {"num_nextn_predict_layers": 1}),
    ("llada2", "score_function", {"score_function": "softmax"}),
    ("llada2", "block_size", {"block_length": 8, "block_size": 16}),
    ("dream", "use_sliding_window", {"use_sliding_window": True}),
    ("dream", "partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("sdar", "partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ("sdar", "rotary_dim", {"rotary_dim": 8}),
    ("dream", "attention_bias", {"attention_bias": False}),
    ("sdar", "block_length", {"block_length": 0}),
    ("sdar", "attention_bias", {"attention_bias": True}),
    ("sdar", "head_dim", {"head_dim": 15}),
    ("sdar_moe", "mlp_only_layers", {"mlp_only_layers": [2]}),
]


@pytest.mark.parametrize(("family", "key", "changes"), CONTRADICTIONS)
def test_contradictions(tmp_path: Path, family: str, key: str, changes: dict[str, Any]) -> None:
    folder = edit_config(write_checkpoint(tmp_path, family), **changes)
    refused(ConfigError, folder, repr(key), "config.json", "expected")


IGNORED_BY_THE_AUTHORS: list[tuple[str, str, object]] = [
    ("llada_moe", "norm_topk_prob", True),
    ("llada_moe", "routed_scaling_factor", 2.5),
    ("llada2", "norm_topk_prob", False),
    ("llada2", "num_experts_per_tok", 1),
    ("llada2", "norm_head", True),
    ("llada2", "norm_softmax", True),
    ("llada2", "router_dtype", "bf16"),
]


@pytest.mark.parametrize(("family", "key", "value"), IGNORED_BY_THE_AUTHORS)
def test_what_the_authors_code_ignores_is_not_obeyed(
    tmp_path: Path, family: str, key: str, value: object
) -> None:
    folder = edit_config(write_checkpoint(tmp_path, family), **{key: value})
    refused(ConfigError, folder, repr(key), "config.json", "the authors' code")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": NaN', "\x00\xff", "[" * 100000])
def test_config_is_not_json(tmp_path: Path, text: str) -> None:
    folder = write_checkpoint(tmp_path, "sdar")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(CheckpointError, folder, "config.json", "JSON")


def test_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    folder = edit_config(write_checkpoint(tmp_path, "sdar"), architectures=["LlamaForCausalLM"])
    refused(UnknownArchitecture, folder, "LlamaForCausalLM", "LLaDAMoEModelLM", "DreamModel")


@pytest.mark.parametrize("value", [None, [], "SDARForCausalLM", [1], ["DreamModel", "X"], {}])
def test_architectures_of_another_kind(tmp_path: Path, value: object) -> None:
    folder = edit_config(write_checkpoint(tmp_path, "sdar"), architectures=value)
    refused(ConfigError, folder, "'architectures'")


# Tensors


def test_missing_tensor(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    folder = edit_tensors(write_checkpoint(tmp_path, "llada_moe"), lambda t: t.__delitem__(name))
    refused(TensorError, folder, name, "missing", "[24, 64]", "model.safetensors")


def test_surplus_tensor(tmp_path: Path) -> None:
    surplus = {"model.layers.2.mlp.odd.weight": torch.ones(3)}
    folder = edit_tensors(write_checkpoint(tmp_path, "sdar"), lambda t: t.update(surplus))
    refused(TensorError, folder, "model.layers.2.mlp.odd.weight", "does not describe")


def test_fewer_layers_in_the_config_than_in_the_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "sdar")
    refused(TensorError, edit_config(folder, num_hidden_layers=1), "model.layers.1.")


def test_misshapen_tensor(tmp_path: Path) -> None:
    changed = {"model.norm.weight": torch.ones(63)}
    folder = edit_tensors(write_checkpoint(tmp_path, "dream"), lambda t: t.update(changed))
    refused(TensorError, folder, "model.norm.weight", "[63]", "[64]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_tensor_of_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    changed = {"model.norm.weight": torch.ones(64).to(dtype)}
    folder = edit_tensors(write_checkpoint(tmp_path, "dream"), lambda t: t.update(changed))
    refused(TensorError, folder, "model.norm.weight", "dtype", "bfloat16")


def test_llada_ties_where_the_config_does_not_say(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llada", weight_tying=True)
    model = open_checkpoint(edit_config(folder, weight_tying=...)).reference()
    assert torch.equal(model.lm_head.weight, model.embed_tokens.weight)


def test_tied_model_needs_no_head_and_untied_does(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "dream", tie_word_embeddings=True)
    open_checkpoint(folder)
    refused(TensorError, edit_config(folder, tie_word_embeddings=False), "lm_head.weight")


# Files


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    folder = write_checkpoint(tmp_path, "sdar")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(CheckpointError, folder, "model.safetensors")


def test_safetensors_that_is_a_git_lfs_pointer(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "sdar")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid")
    refused(CheckpointError, folder, "model.safetensors", "download")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_corrupt_index(tmp_path: Path, text: str) -> None:
    folder = write_checkpoint(tmp_path, "sdar", sharded=True)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(CheckpointError, folder, "model.safetensors.index.json")


def edit_index(folder: Path, name: str, shard: object) -> Path:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][name] = shard
    file.write_text(json.dumps(index))
    return folder


def test_missing_shard(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "sdar", sharded=True)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(CheckpointError, folder, "model-00002-of-00002.safetensors", "download")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "a\\x.safetensors", 3])
def test_index_stays_in_its_folder(tmp_path: Path, shard: object) -> None:
    folder = write_checkpoint(tmp_path / "in", "sdar", sharded=True)
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "x.safetensors")
    refused(CheckpointError, edit_index(folder, "model.norm.weight", shard), "not a file name")


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "sdar", sharded=True)
    edit_index(folder, "model.odd.weight", "model-00001-of-00002.safetensors")
    refused(CheckpointError, folder, "model.odd.weight", "model-00001-of-00002")


def test_folder_without_files(tmp_path: Path) -> None:
    refused(CheckpointError, tmp_path, "config.json")
    folder = write_checkpoint(tmp_path / "half", "sdar")
    (folder / "model.safetensors").unlink()
    refused(CheckpointError, folder, "model.safetensors")
    (folder / "pytorch_model.bin").touch()
    refused(CheckpointError, folder, "pytorch_model.bin", "convert")


def test_path_that_is_not_a_checkpoint(tmp_path: Path) -> None:
    refused(CheckpointError, tmp_path / "nowhere", "no checkpoint")
    folder = write_checkpoint(tmp_path / "whole", "sdar")
    refused(CheckpointError, folder / "model.safetensors", "folder")
    (tmp_path / "odd.txt").write_text("hello")
    refused(CheckpointError, tmp_path / "odd.txt", "torch.save")


def test_corrupt_tokenizer_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llada_moe")
    (folder / "tokenizer.json").write_text("{")
    refused(ConfigError, folder, "tokenizer.json", "JSON")


# model.pt


class Runs:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize(
    "saved", [torch.nn.Linear(2, 2), Runs(), {"config": {}, "state_dict": {}, "x": Runs()}]
)
def test_pickled_module_is_refused_with_two_ways_out(tmp_path: Path, saved: object) -> None:
    torch.save(saved, tmp_path / "model.pt")
    refused(CheckpointError, tmp_path / "model.pt", "pickled", "state_dict", "dcompile.compile")


@pytest.mark.parametrize(
    "saved",
    [
        torch.ones(3),
        [1],
        {"weight": torch.ones(3)},
        {"config": {}, "state_dict": [1]},
        {"config": [1], "state_dict": {}},
        {"config": {1: 2}, "state_dict": {}},
        {"config": {}, "state_dict": {"a": 1}},
        {"config": {}, "state_dict": {"a": torch.ones(3).to_sparse()}},
        {"config": {}, "state_dict": {"a": torch.ones(3, device="meta")}},
    ],
)
def test_model_pt_of_another_structure(tmp_path: Path, saved: object) -> None:
    torch.save(saved, tmp_path / "model.pt")
    refused(CheckpointError, tmp_path / "model.pt", '"config"', "state_dict")


@pytest.mark.parametrize("keep", [0, 10, 3000, -1])
def test_truncated_model_pt(tmp_path: Path, keep: int) -> None:
    file = write_model_pt(tmp_path / "model.pt", "sdar")
    file.write_bytes(file.read_bytes()[:keep])
    refused(CheckpointError, file, "model.pt")


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_damaged_model_pt_never_escapes_as_a_traceback(tmp_path: Path) -> None:
    file = write_model_pt(tmp_path / "model.pt", "sdar")
    whole = file.read_bytes()
    for at in range(0, 6000, 23):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        with contextlib.suppress(DcompileError):
            open_checkpoint(file)


def test_damaged_header_never_escapes_as_a_traceback(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, "sdar") / "model.safetensors"
    whole = file.read_bytes()
    for at in range(0, 8 + int.from_bytes(whole[:8], "little"), 13):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        with contextlib.suppress(DcompileError):
            open_checkpoint(tmp_path)


def test_model_pt_of_the_old_format(tmp_path: Path) -> None:
    config = config_of("sdar", torch.float32)
    saved = {"config": config, "state_dict": make_tensors("sdar", config, 0, torch.float32)}
    torch.save(saved, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    refused(CheckpointError, tmp_path / "model.pt", "save anew")


def test_a_bomb_is_not_inflated(tmp_path: Path) -> None:
    file = write_model_pt(tmp_path / "model.pt", "sdar")
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data + bytes(1 << 24) * name.endswith(".pkl"))
    refused(CheckpointError, file, "model.pt", "compressed")


@pytest.mark.parametrize("claim", [1 << 25, 1 << 62])
def test_a_header_of_any_size_is_not_read(tmp_path: Path, claim: int) -> None:
    file = write_checkpoint(tmp_path, "sdar") / "model.safetensors"
    file.write_bytes(claim.to_bytes(8, "little") + file.read_bytes()[8:])
    refused(CheckpointError, tmp_path, "model.safetensors", "header claims")


def test_model_pt_config_errors_name_file_and_key(tmp_path: Path) -> None:
    file = write_model_pt(tmp_path / "model.pt", "sdar", rope_theta=...)
    refused(ConfigError, file, "model.pt", "'rope_theta'")


def test_nothing_is_read_until_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dcompile.frontends import files

    folder = write_checkpoint(tmp_path, "llada_moe", sharded=True)
    monkeypatch.setattr(files.Safetensors, "read", lambda *_: pytest.fail("read"))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.build([0]) is not None and checkpoint.digest()


def test_an_artifact_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.dcx").write_bytes(b"PK")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "plan.json").write_text("{}")
    for name in ("model.dcx", "folder"):
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(tmp_path / name)
        assert "compiled already" in str(error.value) and "dcompile run" in str(error.value)


def test_all_files_of_the_tokenizer_come_along(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", "llada")
    (folder / "additional_chat_templates").mkdir()
    told = {"special_tokens_map.json": "{}", "added_tokens.json": "{}"}
    told |= {"chat_template.jinja": "a", "additional_chat_templates/rag.jinja": "b"}
    for name, text in told.items():
        (folder / name).write_text(text)
    found = open_checkpoint(folder).tokenizer_files()
    assert {name: found[name].decode() for name in told} == told
