"""Every family against the published formulas, exported, and cut down to some layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, write_checkpoint
from formulas import logits as expected_logits
from torch._subclasses.fake_tensor import FakeTensorMode

from dcompile.frontends.checkpoint import open_checkpoint

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llada", {"weight_tying": True, "n_kv_heads": 4, "embedding_size": 131}),
    ("llada_moe", {"moe_layer_freq": [0, 1], "partial_rotary_factor": 0.5}),
    ("llada_moe", {"norm_topk_prob": False, "qk_layernorm": False, "num_key_value_heads": 4}),
    ("llada_moe", {"routed_scaling_factor": 1.0, "num_experts_per_tok": 8}),
    ("llada2", {"num_shared_experts": 0, "n_group": 1, "topk_group": 1}),
    ("llada2", {"block_length": 5, "num_shared_experts": 2, "head_dim": 24, "rotary_dim": 12}),
    ("dream", {"tie_word_embeddings": True}),
    ("sdar", {"head_dim": 24, "block_size": 7, "tie_word_embeddings": True}),
    ("sdar_moe", {"mlp_only_layers": [0], "norm_topk_prob": False}),
]


def departure(actual: torch.Tensor, expected: Any) -> float:
    """|actual - expected| / |expected|"""
    difference = actual.double().numpy() - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_reference_computes_the_formulas(
    tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    folder = write_checkpoint(tmp_path, family, seed=3, **overrides)
    model = open_checkpoint(folder).reference()
    for batch, length in ((1, 1), (1, 2), (2, 7), (1, 37)):
        ids = torch.randint(
            0, 131, (batch, length), generator=torch.Generator().manual_seed(length)
        )
        with torch.no_grad():
            actual = model(ids)
        assert departure(actual, expected_logits(folder, ids.numpy())) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_close(tmp_path: Path, family: str) -> None:
    folder = write_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.spec.dtype is torch.bfloat16
    ids = torch.randint(0, 131, (1, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actual = checkpoint.reference()(ids)
    assert actual.dtype is torch.bfloat16
    assert actual.isfinite().all()
    # Not tighter: a router may choose another expert once its logits are rounded.
    assert departure(actual, expected_logits(folder, ids.numpy())) < 0.3


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_with_a_symbolic_length(tmp_path: Path, family: str) -> None:
    model = open_checkpoint(write_checkpoint(tmp_path, family)).reference()
    length = torch.export.Dim("T", min=2, max=256)
    exported = torch.export.export(
        model, (torch.zeros(1, 8, dtype=torch.int64),), dynamic_shapes=({1: length},), strict=False
    ).module()
    for t in (2, 5, 41):
        ids = torch.randint(0, 131, (1, t), generator=torch.Generator().manual_seed(t))
        torch.testing.assert_close(exported(ids), model(ids), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_trace_has_no_buffers_and_no_empty_casts(tmp_path: Path, family: str) -> None:
    model = open_checkpoint(write_checkpoint(tmp_path, family)).reference()
    assert not list(model.buffers())
    exported = torch.export.export(model, (torch.zeros(1, 8, dtype=torch.int64),), strict=False)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert not targets & {"aten.to.dtype", "aten.alias.default", "aten.index_put.default"}


@pytest.mark.parametrize("family", FAMILIES)
def test_build_allocates_only_the_named_layers(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, family))
    full = checkpoint.reference()
    last = len(checkpoint.spec.layer_kinds) - 1
    part = checkpoint.build([last, 0])
    whole, held = dict(full.named_parameters()), dict(part.named_parameters())
    assert [type(layer.mlp) for layer in part.layers] == [
        type(full.layers[i].mlp) for i in (last, 0)
    ]
    kept = ("layers.0.", f"layers.{last}.")
    assert set(held) == {n for n in whole if not n.startswith("layers.") or n.startswith(kept)}
    assert all(parameter.shape == whole[name].shape for name, parameter in held.items())
    with FakeTensorMode():
        logits = checkpoint.build([last])(torch.zeros(1, 5, dtype=torch.int64))
    assert logits.shape == (1, 5, checkpoint.spec.vocab_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_name_the_full_module(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, family))
    for name, parameter in checkpoint.build().named_parameters():
        assert checkpoint.recipes[name].read(checkpoint.read).shape == parameter.shape
    assert set(checkpoint.recipes) == {n for n, _ in checkpoint.build().named_parameters()}


def test_a_layer_passes_on_only_the_hidden_state(tmp_path: Path) -> None:
    model = open_checkpoint(write_checkpoint(tmp_path, "llada2")).reference()
    seen: list[tuple[int, torch.Tensor]] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, inputs, out: seen.append((len(inputs), out)))
    model(torch.zeros(1, 6, dtype=torch.int64))
    assert [(count, out.shape) for count, out in seen] == [(4, (1, 6, 64))] * 3


def test_half_precision_keeps_the_selection_bias(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, "llada2", dtype=torch.bfloat16))
    assert checkpoint.build().layers[1].mlp.gate.expert_bias.dtype is torch.float32
