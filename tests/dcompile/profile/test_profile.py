"""Profiles of a real generation: what is counted, and that the parts add up to the whole."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import numpy as np
import pytest

from dcompile import cli
from dcompile.cost.call import Facts
from dcompile.cost.launches import costs
from dcompile.cost.machine import Machine
from dcompile.errors import OptionError
from dcompile.ir.work import Work
from dcompile.profile import Capture, compare, profile_artifact
from dcompile.profile.summary import Profile, summarize
from dcompile.profile.watch import Timer

PROMPTS, LENGTH = 2, 16
LAYERS, HIDDEN, HEADS, GROUPS, HEAD, EXPERTS, TOP_K, INNER, VOCAB = 2, 64, 4, 2, 16, 8, 3, 24, 131


def cost_of(captured: Capture, kernel: str, at: int = 0) -> list[Work]:
    plan = captured.runner.artifact.plan.text
    every = costs(plan, captured.facts(at))
    return [
        c for c, launch in zip(every, plan["launches"], strict=True) if launch["kernel"] == kernel
    ]


def test_a_product_reads_its_weights_once(captured: Capture) -> None:
    R = captured.seen[0].R
    qkv, *_ = cost_of(captured, "linear_f32")
    n = (HEADS + 2 * GROUPS) * HEAD
    assert qkv.flops == 2 * R * n * HIDDEN
    weights = captured.runner.artifact.tensors["layers_0_q_k_v.packed"].bytes
    assert qkv.bytes == weights + 4 * R * (n + HIDDEN)
    assert weights >= 4 * n * HIDDEN


def test_attention_counts_the_keys_of_each_row_and_reads_each_cache_once(captured: Capture) -> None:
    seen = captured.seen[0]
    whole, narrowed = cost_of(captured, "attend_f32")
    length = {slot: int(seen.row_limit[seen.row_seq == slot][0]) for slot in seen.prompts}
    assert sorted(length.values()) == [5 + LENGTH, 11 + LENGTH] and sum(length.values()) == seen.R
    assert whole.flops == 4 * HEADS * HEAD * sum(n * n for n in length.values())
    cache = 2 * 4 * GROUPS * HEAD * sum(length.values())
    assert whole.bytes == cache + 2 * 4 * seen.R * HEADS * HEAD
    # The last layer attends for the block's rows only.
    assert narrowed.flops == 4 * HEADS * HEAD * 8 * sum(length.values())
    assert narrowed.bytes == cache + 2 * 4 * seen.B * 8 * HEADS * HEAD


def test_experts_are_those_that_got_a_token(captured: Capture) -> None:
    for at, seen in enumerate(captured.seen):
        chosen = [set(map(int, v.reshape(-1))) for v in seen.probes.values() if v.dtype == np.int32]
        found = cost_of(captured, "moe_ffn_f32", at)
        assert [c.touched for c in found] == [len(c) for c in chosen] and len(chosen) == LAYERS
        for cost, experts in zip(found, chosen, strict=True):
            assert len(experts) <= EXPERTS and max(experts) < EXPERTS
            assert cost.bytes >= len(experts) * 4 * 3 * HIDDEN * INNER
        assert found[0].flops == 6 * seen.R * TOP_K * HIDDEN * INNER


def test_without_a_look_at_the_router_routing_is_uniform(captured: Capture) -> None:
    facts = captured.facts(0)
    blind = Facts(facts.R, facts.B, facts.limits, facts.sequences, facts.chosen, {}, {})
    plan = captured.runner.artifact.plan.text
    at = next(i for i, la in enumerate(plan["launches"]) if la["kernel"] == "moe_ffn_f32")
    guessed, looked = costs(plan, blind)[at], costs(plan, facts)[at]
    assert guessed.touched is None and looked.touched is not None
    tensors = captured.runner.artifact.tensors
    packed = [t.bytes for name, t in tensors.items() if name.startswith("layers_0_mlp_experts")]
    more = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** facts.R) - looked.touched
    assert guessed.bytes == pytest.approx(looked.bytes + more * sum(packed) / EXPERTS)


def test_the_vocabulary_is_asked_for_undecided_candidates_only(captured: Capture) -> None:
    for at, seen in enumerate(captured.seen):
        (cost,) = cost_of(captured, "vocab_choice_f32", at)
        mask = captured.runner.limits.mask_id
        places = [np.flatnonzero(np.isfinite(seen.confidence[slot])) for slot in seen.prompts]
        live = sum(
            int((seen.before[s, p] == mask).sum())
            for s, p in zip(seen.prompts, places, strict=True)
        )
        assert cost.flops == 2 * live * VOCAB * HIDDEN


def test_parts_add_up(profile: Profile) -> None:
    for rows in (profile.launches, profile.kernels, profile.layers, profile.roles):
        assert sum(r.total for r in rows) == pytest.approx(profile.launched)
        assert sum(r.calls for r in rows) == len(profile.iterations) * len(profile.places)
        assert sorted(at for r in rows for at in r.launches) == list(range(len(profile.places)))
        for r in rows:
            assert 0 < r.low <= r.median <= r.high and r.bytes > 0 and r.of_floor >= 0
    assert {r.name for r in profile.layers} == {"outside", "layer 0", "layer 1"}


def test_totals_are_the_time_from_end_to_end(captured: Capture, profile: Profile) -> None:
    spans = sum(each.end - each.start for each in profile.iterations)
    assert spans + profile.host == pytest.approx(profile.wall)
    # Between launches next to nothing happens, even in a model as small as this.
    shares = [each.launched / (each.end - each.start) for each in profile.iterations]
    assert 0.75 < statistics.median(shares) <= 1


def test_timing_costs_little(captured: Capture) -> None:
    """In the process's own time: whoever else uses these cores takes none of it."""
    runner, request = captured.runner, captured.request
    plain, timed = [], []
    for _ in range(9):
        for watch, kept in ((None, plain), (Timer(runner.executor), timed)):
            runner.watch = watch
            start = time.process_time()
            runner.generate(
                request.prompts, gen_length=request.gen_length, **dict(request.arguments)
            )
            kept.append(time.process_time() - start)
    runner.watch = None
    assert statistics.median(timed) < 1.3 * statistics.median(plain)


def test_the_course_of_a_generation(captured: Capture, profile: Profile) -> None:
    assert sum(each.tokens for each in profile.iterations) == PROMPTS * LENGTH
    assert profile.iterations[0].phase == "prefill" and profile.iterations[-1].masks == 0
    for course, result in zip(profile.courses, captured.results, strict=True):
        tokens = {d.position: d.token for d in course.decisions}
        assert [tokens[at] for at in range(course.begin, course.end)] == result.all_tokens
        assert all(course.first <= d.iteration <= course.last for d in course.decisions)
        assert all(0 < (d.confidence or 0) <= 1 for d in course.decisions)
    assert sum(r.forwards for r in captured.results) == sum(i.B for i in profile.iterations)


def test_memory_is_what_the_plan_asks_for(captured: Capture, profile: Profile) -> None:
    runner, held = captured.runner, profile.memory
    widest = max(captured.seen, key=lambda seen: seen.R)
    binding = runner.executor.bind(widest.R, widest.B)
    assert held.scratch <= binding.arena.nbytes and held.scratch < held.values
    assert held.state == sum(array.nbytes for array in runner.executor.state.values())
    assert max(held.live) == sum(b.bytes for b in held.buffers) <= held.scratch
    assert len(held.live) == len(profile.places) and len(held.resident) == len(captured.seen)


def test_a_launch_names_graph_nodes_of_the_last_stage(captured: Capture, profile: Profile) -> None:
    artifact = captured.runner.artifact
    last = artifact.text(sorted(n for n in artifact.names if n.startswith("stages/"))[-1])
    names = {line.partition(":")[0] for line in last.splitlines()}
    for place in profile.places:
        assert place.nodes and set(place.nodes) <= names
        assert place.layer is None or place.origin.startswith(f"layers.{place.layer}.")


def test_the_same_profile_compared(profile: Profile, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(profile.json())
    ours, theirs = compare.side(profile, "a"), compare.stored(tmp_path / "p.json")
    assert ours.totals == theirs.totals and ours.tables == theirs.tables
    (tmp_path / "bad.json").write_text('{"format": 99}')
    with pytest.raises(OptionError, match="format 99"):
        compare.stored(tmp_path / "bad.json")
    with pytest.raises(OptionError, match="no profile"):
        compare.stored(tmp_path / "absent.json")


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring it takes longer than the rest."""
    monkeypatch.setattr("dcompile.profile.collect.measure", lambda *_: Machine(1e10, 1e11))


@pytest.mark.usefixtures("known_machine")
def test_random_prompts_are_reproducible(artifact: Path) -> None:
    one, two = (profile_artifact(artifact, gen_length=8, rounds=1) for _ in range(2))
    assert one.request == two.request and one.results[0].tokens == two.results[0].tokens
    assert len(one.request.prompts[0]) + 8 == summarize(one).iterations[0].R


@pytest.mark.usefixtures("known_machine")
def test_the_command(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["profile", str(artifact), "--rounds", "1", "-q", *arguments])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    code, out, _ = call("--prompt-ids", "3,4,5", "--gen-length", "8", "--launches")
    assert code == 0 and "moe_ffn_f32" in out and "Timing costs" in out and "\x1b" not in out
    assert "layers.1.mlp.experts.route" in out.replace("\n", "")
    code, out, _ = call("--prompt-ids", "3,4,5", "--gen-length", "8", "--json")
    (tmp_path / "kept.json").write_text(out)
    assert code == 0 and json.loads(out)["gen_length"] == 8
    code, out, _ = call("--gen-length", "8", "--compare", str(tmp_path / "kept.json"))
    assert code == 0 and "different requests" in out
    code, out, _ = call("--gen-length", "8", "--compare", str(artifact))
    assert code == 0 and "A/B" in out and "different requests" not in out
    assert call("--prompt", "a", "--prompt-ids", "1")[0] == 2
    code, _, err = call("--set", "nonsense=1")
    assert code == 1 and "nonsense" in err
