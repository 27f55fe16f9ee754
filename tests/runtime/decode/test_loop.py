"""The loop against a slow decoder that is written another way (toy.py)."""

from __future__ import annotations

import math
import threading
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import CACHES, EOS, MASK, VOCAB, Toy, prompts_of

from dcompile.errors import ContractError, OptionError, RequestError
from dcompile.runtime.artifact import write_artifact
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.decode.requests import temperature_of
from dcompile.runtime.state import Binding

SHIFTED = [Toy(**{**vars(t), "shift": True}) for t in CACHES]


def spy(runner: Runner) -> list[tuple[int, int]]:
    """The (R, B) of every step that follows."""
    seen: list[tuple[int, int]] = []
    launch = runner.executor.launch

    def watched(binding: Binding) -> None:
        seen.append((binding.R, binding.B))
        launch(binding)

    runner.executor.launch = watched
    return seen


@pytest.mark.parametrize("case", CACHES + SHIFTED, ids=str)
@pytest.mark.parametrize("early_stop", [True, False])
def test_every_cache_computes_the_rows_of_its_table(
    case: Toy, early_stop: bool, tmp_path: Path, code: bytes
) -> None:
    runner = toy.load(tmp_path, case, code)
    launched = spy(runner)
    for prompt in prompts_of(1, [0, 1, 3, 4, 5, 9, 16]):
        launched.clear()
        wanted_rows: list[int] = []

        def rows(*at: Any, seen: list[int] = wanted_rows) -> list[int]:
            found = toy.rows_of(*at)
            # `active` runs whole units of rows.
            unit = 8 if case.cache == "active" and at[3] else 1
            seen.append(-(-len(found) // unit) * unit)
            return found

        length = 3 * case.block
        (result,) = runner.generate(
            [prompt], gen_length=length, threshold=0.7, early_stop=early_stop
        )
        wanted, forwards = toy.decode(case, prompt, length, 0.7, early_stop=early_stop, rows=rows)
        assert [R for R, B in launched if B] == wanted_rows
        assert (result.all_tokens, result.forwards) == (wanted, forwards)
        assert result.tokens == (wanted[: wanted.index(EOS)] if EOS in wanted else wanted)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("cross_block", [True, False])
@pytest.mark.parametrize(("block", "span"), [(4, 4), (4, 8), (4, 2)])
def test_block_reuse_is_exact(
    block: int, span: int, cross_block: bool, shift: bool, tmp_path: Path, code: bytes
) -> None:
    """The same tokens as with every row computed every time."""
    case = Toy(block=block, span=span, shift=shift, cache="block", cross_block=cross_block)
    runner = toy.load(tmp_path, case, code)
    for prompt in prompts_of(2, [0, 3, 8, 13]):
        (result,) = runner.generate([prompt], gen_length=13, early_stop=False)

        def everything(toy_: Toy, b: int, total: int, *_: Any) -> list[int]:
            return list(range(total))

        assert (
            result.all_tokens == toy.decode(case, prompt, 13, early_stop=False, rows=everything)[0]
        )


def test_the_cross_block_update_saves_one_forward_a_block(tmp_path: Path, code: bytes) -> None:
    case = Toy(span=4, cache="block")
    stored = Toy(span=4, cache="block", cross_block=False)
    (tmp_path / "stored").mkdir()
    runners = toy.load(tmp_path, case, code), toy.load(tmp_path / "stored", stored, code)
    for prompt in prompts_of(8, [0, 3, 8, 13]):
        crossed, extra = (r.generate([prompt], gen_length=12, early_stop=False)[0] for r in runners)
        blocks = -(-(len(prompt) % 4 + 12) // 4)
        assert crossed.all_tokens == extra.all_tokens
        assert extra.forwards - crossed.forwards == blocks - 1


@pytest.mark.parametrize(
    "case",
    [
        Toy(cache="dual"),
        Toy(cache="active"),
        Toy(span=4, cache="block", shift=True),
        Toy(span=4, cache="block", cross_block=False),
    ],
    ids=str,
)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_result_does_not_depend_on_neighbours(
    case: Toy, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, code: bytes
) -> None:
    batch = data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.integers(0, 15), min_size=1, max_size=7))
    temperature = data.draw(st.sampled_from([0.0, 1.0]))
    prompts = prompts_of(sum(lengths), data.draw(st.permutations(lengths)))
    many = toy.load(tmp_path_factory.mktemp("many"), Toy(**{**vars(case), "batch": batch}), code)
    together = many.generate(prompts, gen_length=8, temperature=temperature, seed=5)
    for prompt, result in zip(prompts, together, strict=True):
        if prompts.count(prompt) > 1:
            continue
        seed = 5 if temperature else None
        assert (result.all_tokens, result.forwards) == toy.decode(case, prompt, 8, seed=seed)


def test_freed_slots_take_the_next_prompts(tmp_path: Path, code: bytes) -> None:
    runner = toy.load(tmp_path, Toy(batch=2), code)
    launched = spy(runner)
    results = runner.generate(prompts_of(3, [2] * 9), gen_length=8)
    active = [B for _, B in launched]
    assert max(active) == 2
    # Nobody waits while a slot is free: the second slot idles only behind the last prompt.
    assert 1 not in active[: active.index(1)] and set(active[active.index(1) :]) == {1}
    assert sum(active) == sum(result.forwards for result in results)


def test_results_are_told_first_done_first(tmp_path: Path, code: bytes) -> None:
    runner = toy.load(tmp_path, Toy(batch=2), code)
    told: list[tuple[int, list[int]]] = []
    prompts = prompts_of(7, [3, 1, 4, 1, 5])
    results = runner.generate(
        prompts, gen_length=16, on_result=lambda index, result: told.append((index, result.tokens))
    )
    assert sorted(told) == [(i, result.tokens) for i, result in enumerate(results)]
    # With two slots, whoever needs the fewest forwards of the two in flight is told first.
    free, expected = [(results[0].forwards, 0), (results[1].forwards, 1)], []
    for index in range(2, 7):
        at, done = free.pop(free.index(min(free)))
        expected.append(done)
        if index < 5:
            free.append((at + results[index].forwards, index))
    assert [index for index, _ in told] == expected


def test_temperature_draws_a_stream_a_seed(tmp_path: Path, code: bytes) -> None:
    runner = toy.load(tmp_path, Toy(batch=3), code)

    def tokens(seed: int, count: int = 1) -> list[list[int]]:
        asked = [[1, 2, 3]] * count
        done = runner.generate(asked, gen_length=8, temperature=1.0, seed=seed, early_stop=False)
        return [result.all_tokens for result in done]

    assert tokens(1) == tokens(1) != tokens(2)
    samples = tokens(1, 4)
    assert samples == tokens(1, 4) and samples[0] == tokens(1)[0]
    assert len({tuple(sample) for sample in samples}) == 4
    assert tokens(-(1 << 63), 3) != tokens((1 << 63) - 1, 3)


def test_early_stop_ignores_the_prompt_and_fills_the_rest(tmp_path: Path, code: bytes) -> None:
    runner = toy.load(tmp_path, Toy(), code)
    stopped = 0
    for prompt in prompts_of(4, [6] * 25):
        (result,) = runner.generate([[EOS, *prompt]], gen_length=16)
        if EOS in result.all_tokens:
            at = result.all_tokens.index(EOS)
            stopped += at < 12
            assert result.tokens == result.all_tokens[:at]
            assert set(result.all_tokens[at:]) == {EOS} and len(result.all_tokens) == 16
            assert result.tokens_per_forward == (at // 4 + 1) * 4 / result.forwards
        else:
            assert result.tokens == result.all_tokens
    assert stopped > 3


def test_each_block_is_told_once(tmp_path: Path, code: bytes) -> None:
    runner = toy.load(tmp_path, Toy(span=4, cache="block", batch=2), code)
    told: dict[int, list[list[int]]] = {}
    prompts = prompts_of(5, [5, 2, 8])
    results = runner.generate(
        prompts,
        gen_length=9,
        early_stop=False,
        on_block=lambda index, tokens: told.setdefault(index, []).append(tokens),
    )
    assert [[len(block) for block in told[i]] for i in range(3)] == [
        [3, 4, 2],
        [2, 4, 3],
        [4, 4, 1],
    ]
    assert [[t for block in told[i] for t in block] for i in range(3)] == [
        result.all_tokens for result in results
    ]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"gen_length": 0}, "0 tokens cannot"),
        ({"gen_length": -4}, "-4 tokens cannot"),
        ({"gen_length": 29}, "--max-length 35"),
        ({"gen_length": 32}, "--max-length 35"),
        ({"gen_length": 4.0}, "4.0 tokens cannot"),
        ({"prompts": [[VOCAB]]}, "outside the vocabulary"),
        ({"prompts": [[1], [2, -1]]}, r"prompt 1\[1\]"),
        ({"prompts": [[MASK]]}, "mask id"),
        ({"prompts": [[1.5]]}, "no token id"),
        ({"prompts": [np.array([1.5])]}, "no token id"),
        ({"prompts": [[[1]]]}, "no token id"),
        ({"prompts": [[True]]}, "no token id"),
        ({"prompts": [b"12"]}, "a bytes is no sequence"),
        ({"prompts": [bytearray(b"12")]}, "a bytearray is no sequence"),
        ({"prompts": [memoryview(b"12")]}, "a memoryview is no sequence"),
        ({"prompts": b"12"}, "a bytes is no sequence of prompts"),
        ({"prompts": [{1: 2}]}, "a dict is no sequence"),
        ({"prompts": [{1, 2}]}, "a set is no sequence"),
        ({"prompts": {"a": 1}}, "a dict is no sequence of prompts"),
        ({"prompts": [1, 3, 4]}, "an int is no sequence of token ids"),
        ({"prompts": np.array([1, 3, 4])}, "an int is no sequence of token ids"),
        ({"prompts": 5}, "an int is no sequence of prompts"),
        ({"prompts": [None]}, "a NoneType is no sequence"),
        ({"prompts": [np.array([1.0, 2.0])]}, r"1.0 is no token id\n.*prompt 0\[0\]"),
        ({"prompts": [[1, np.float32(2)]]}, r"2.0 is no token id\n.*prompt 0\[1\]"),
        ({"prompts": [np.array([1, 2.5], object)]}, r"2.5 is no token id\n.*prompt 0\[1\]"),
        ({"prompts": [np.array([True, 3], object)]}, "True is no token id"),
        ({"prompts": [[np.True_]]}, "True is no token id"),
        ({"prompts": [[torch.tensor(True)]]}, "True is no token id"),
        ({"prompts": [np.array([[1, 3], [4, 5]])]}, r"\[1, 3\] is no token id"),
        ({"prompts": [["1"]]}, "'1' is no token id"),
        ({"prompts": ["text"]}, "no tokenizer"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 3.5e38}, "at most 3.403e"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"seed": 1 << 63}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"threshold": 0.0}, "more than 0 and at most 1"),
        ({"threshold": 1.01}, "more than 0 and at most 1"),
        ({"threshold": math.nan}, "a number"),
        ({"threshold": "0.5"}, "a number"),
        ({"threshold": 10**400}, "a number"),
        ({"steps": 4}, "it has: threshold"),
    ],
)
def test_refuses(asked: dict[str, Any], words: str, tmp_path: Path, code: bytes) -> None:
    runner = toy.load(tmp_path, Toy(), code)
    with pytest.raises(RequestError, match=words):
        runner.generate(**{"prompts": [[1, 3, 4]], "gen_length": 4, **asked})
    # A refused request leaves nothing behind.
    (result,) = runner.generate([[1, 3, 4]], gen_length=4)
    assert result.all_tokens == toy.decode(Toy(), [1, 3, 4], 4)[0]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("cache", ["none", "dual", "active"])
@pytest.mark.parametrize("early_stop", [True, False])
def test_any_length_is_a_prefix_of_whole_blocks(
    shift: bool, cache: str, early_stop: bool, tmp_path: Path, code: bytes
) -> None:
    case = Toy(cache=cache, shift=shift)
    runner = toy.load(tmp_path, case, code)
    for prompt in prompts_of(9, [0, 3, 6]):
        for length in range(1, 14):
            whole = length + -length % case.block
            (result,) = runner.generate([prompt], gen_length=length, early_stop=early_stop)
            (longer,) = runner.generate([prompt], gen_length=whole, early_stop=early_stop)
            assert (result.all_tokens, result.forwards) == (
                longer.all_tokens[:length],
                longer.forwards,
            )
            wanted, _ = toy.decode(case, prompt, whole, early_stop=early_stop)
            assert result.all_tokens == wanted[:length]


@pytest.mark.parametrize(
    "ids",
    [
        (1, 3, 4),
        range(1, 4),
        array("q", [1, 3, 4]),
        np.array([1, 3, 4], np.int32),
        np.array([1, 3, 4], np.uint64),
        np.array([1, 3, 4], object),
        torch.tensor([[1, 3, 4]]),
        list(torch.tensor([1, 3, 4])),
        np.arange(0),
    ],
    ids=lambda ids: f"{type(ids).__module__}.{type(ids).__name__}",
)
def test_ids_may_be_of_any_library(ids: Any, tmp_path: Path, code: bytes) -> None:
    runner = toy.load(tmp_path, Toy(), code)
    wanted = [int(token) for token in np.asarray(ids).reshape(-1)]
    found = runner.generate([ids, list(np.asarray(ids).reshape(-1))], gen_length=4)
    assert [r.all_tokens for r in found] == [toy.decode(Toy(), wanted, 4)[0]] * 2


def test_numbers_may_be_of_any_library(tmp_path: Path, code: bytes) -> None:
    runner = toy.load(tmp_path, Toy(), code)
    wanted = runner.generate([[1, 3, 4]], gen_length=5, temperature=0.5, seed=7, threshold=0.75)
    found = runner.generate(
        iter([[1, 3, 4]]),
        gen_length=np.int32(5),
        temperature=np.float32(0.5),
        seed=np.int64(7),
        threshold=np.float32(0.75),
    )
    assert [r.all_tokens for r in found] == [r.all_tokens for r in wanted]


@pytest.mark.parametrize("temperature", [0, 1e-46, 1e-45, 1e-40, 1.1e-38, 1.2e-38, 1e-35])
def test_the_smallest_temperatures_are_greedy(
    temperature: float, tmp_path: Path, code: bytes
) -> None:
    assert temperature_of(temperature) == 0
    runner = toy.load(tmp_path, Toy(), code)
    (found,) = runner.generate([[1, 3, 4]], gen_length=8, temperature=temperature)
    assert found.all_tokens == toy.decode(Toy(), [1, 3, 4], 8)[0]


@pytest.mark.parametrize("temperature", [1e-29, 0.2, 1, 3.4e38])
def test_other_temperatures_are_told_as_they_are(temperature: float) -> None:
    assert temperature_of(temperature) == temperature


def test_whole_blocks_count_against_the_compiled_length(tmp_path: Path, code: bytes) -> None:
    runner = toy.load(tmp_path, Toy(span=4, length=30), code)
    assert len(runner.generate([[1] * 20], gen_length=8)[0].all_tokens) == 8
    with pytest.raises(RequestError, match="need 32 positions; the artifact has 30"):
        runner.generate([[1] * 20], gen_length=9)


@pytest.mark.parametrize("span", [None, 4])
@pytest.mark.parametrize("prompt", [0, 3, 20, 27, 28])
def test_the_default_length_fits(
    span: int | None, prompt: int, tmp_path: Path, code: bytes
) -> None:
    runner = toy.load(tmp_path, Toy(span=span), code)
    length = runner.limits.default_length(prompt, 128)
    assert len(runner.generate([[1] * prompt], gen_length=length)[0].all_tokens) == length
    with pytest.raises(RequestError):
        runner.generate([[1] * prompt], gen_length=length + 4)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Toy(cache="block"), "bidirectional"),
        (Toy(cache="dual", span=4), "use block"),
        (Toy(cache="lru"), "unknown cache"),
        (Toy(cache="periodic", refresh_every=0), "refresh_every"),
        (Toy(cache="vicinity", warmup=-1), "warmup"),
        (Toy(span=3, cache="block"), "do not fit"),
    ],
    ids=str,
)
def test_refuses_caches_that_make_no_sense(
    case: Toy, words: str, tmp_path: Path, code: bytes
) -> None:
    with pytest.raises(OptionError, match=words):
        toy.load(tmp_path, case, code)


def test_a_block_that_never_ends_is_an_error(tmp_path: Path, code: bytes) -> None:
    runner = toy.load(tmp_path, Toy(), code)
    runner.executor.launch = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(ContractError, match="not done after 5 iterations"):
        runner.generate([[1]], gen_length=4)


def test_an_interrupted_call_leaves_the_slots_free(tmp_path: Path, code: bytes) -> None:
    runner = toy.load(tmp_path, Toy(batch=2), code)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.generate([[1], [3], [4]], gen_length=8, on_block=interrupt)
    results = runner.generate([[1], [3], [4]], gen_length=8)
    assert [r.all_tokens for r in results] == [toy.decode(Toy(), [p], 8)[0] for p in (1, 3, 4)]


def test_threads_take_turns(tmp_path: Path, code: bytes) -> None:
    runner = toy.load(tmp_path, Toy(cache="dual", batch=2), code)
    prompts = prompts_of(6, [3, 5, 7, 9])
    found: dict[int, list[int]] = {}

    def serve(index: int) -> None:
        for _ in range(10):
            found[index] = runner.generate([prompts[index]], gen_length=8)[0].all_tokens

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = {i: toy.decode(Toy(cache="dual"), p, 8)[0] for i, p in enumerate(prompts)}
    assert found == wanted


def test_policy_state_is_zero_on_entering_a_block(tmp_path: Path, code: bytes) -> None:
    plan, manifest = toy.plan(Toy()), toy.manifest(Toy())
    for name in ("credit", "soft"):
        plan["state"][name] = len(plan["buffers"])
        plan["buffers"].append(
            {"name": name, "dtype": "f32", "shape": [1, 2], "place": {"kind": "state"}}
        )
    manifest["policy"]["state"] = [
        {"name": "credit", "dtype": "f32", "shape": [1, 2]},
        {"name": "soft", "dtype": "f32", "shape": [1, 2], "reset": "request"},
    ]
    files = {"kernels/any.so": code}
    write_artifact(tmp_path / "a", manifest, plan, [("weight", np.zeros(3, np.float32))], files)
    runner = Runner.load(tmp_path / "a")
    credit, soft = runner.executor.state["credit"], runner.executor.state["soft"]
    seen = []

    def look(index: int, tokens: list[int]) -> None:
        seen.append((float(credit.sum()), float(soft.sum())))
        credit.fill(1.0)
        soft.fill(1.0)

    runner.generate([[1], [3]], gen_length=8, on_block=look, early_stop=False)
    assert seen == [(0, 0), (0, 2), (0, 0), (0, 2)]


def test_nothing_to_do(tmp_path: Path, code: bytes) -> None:
    runner = toy.load(tmp_path, Toy(), code)
    assert runner.generate([], gen_length=4) == []
    with pytest.raises(TypeError):
        runner.generate("text", gen_length=4)
