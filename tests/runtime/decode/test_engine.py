"""The engine: whatever enters and leaves between turns, each request gets what it gets alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import EOS, MASK, VOCAB, Toy, prompts_of

from dcompile.errors import ContractError, Full, RequestError
from dcompile.profile.watch import Observer
from dcompile.runtime.decode.engine import (
    Admitted,
    Cancelled,
    Engine,
    Event,
    Failed,
    Finished,
    Ticket,
)
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.decode.requests import Request
from dcompile.runtime.decode.sequence import Committed, Result
from dcompile.runtime.state import Binding

CASES = [
    Toy(),
    Toy(cache="prefix", shift=True),
    Toy(cache="dual"),
    Toy(cache="vicinity", look_back=3, look_ahead=2, warmup=5),
    Toy(cache="periodic", refresh_every=2),
    Toy(cache="active"),
    Toy(span=8, cache="block", shift=True),
    Toy(span=4, cache="block", cross_block=False),
    Toy(span=4, cache="block", blocks=3),
    Toy(span=2, cache="none", blocks=2, shift=True),
]
TOKENS = [token for token in range(VOCAB) if token != MASK]
Load = Callable[[Toy], Runner]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, code: bytes) -> Load:
    """A runner for each case, loaded once."""
    held: dict[Toy, Runner] = {}

    def loaded(case: Toy) -> Runner:
        if case not in held:
            held[case] = toy.load(tmp_path_factory.mktemp("engine"), case, code)
        return held[case]

    return loaded


def alone(load: Load, case: Toy, asked: Request) -> Result:
    """What `generate` gives the request, with nothing beside it."""
    (result,) = load(replace(case, batch=1)).generate(
        [list(asked.prompt)],
        gen_length=asked.gen_length,
        temperature=asked.temperature,
        seed=asked.seed,
        early_stop=asked.early_stop,
        **asked.parameters,
    )
    return result


@dataclass
class Client:
    """Submits requests and keeps what each was told, turn by turn."""

    engine: Engine
    tickets: list[Ticket] = field(default_factory=list)
    told: dict[int, list[Event]] = field(default_factory=dict)
    now: dict[int, list[Event]] = field(default_factory=dict)
    """Of the last turn."""

    def __post_init__(self) -> None:
        turn = self.engine.turn

        def turned() -> bool:
            self.now = {}
            return turn()

        self.engine.turn = turned  # type: ignore[method-assign]

    def submit(self, asked: Request) -> Ticket:
        index = len(self.tickets)
        self.told[index] = []

        def emit(events: Sequence[Event]) -> None:
            assert index not in self.now, "told twice in a turn"
            self.now[index] = list(events)
            self.told[index] += events

        self.tickets.append(self.engine.submit(asked, emit))
        return self.tickets[-1]

    def turn(self) -> bool:
        return self.engine.turn()

    def finish(self) -> None:
        while self.turn():
            pass

    def result(self, index: int) -> Result:
        (found,) = [e.result for e in self.told[index] if isinstance(e, Finished)]
        return found

    def running(self) -> set[int]:
        return {i for i, e in self.told.items() if e and not isinstance(e[-1], ENDS)}

    def waiting(self) -> set[int]:
        return {i for i, events in self.told.items() if not events}


ENDS = (Finished, Cancelled, Failed)
REQUESTS = st.builds(
    Request,
    prompt=st.lists(st.sampled_from(TOKENS), max_size=9),
    gen_length=st.integers(1, 14),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    seed=st.integers(0, 9),
    early_stop=st.booleans(),
    parameters=st.fixed_dictionaries({"threshold": st.sampled_from([0.3, 0.7, 1.0])}),
    confidences=st.sampled_from([False, False, False, True]),
)
STEPS = st.one_of(REQUESTS, st.just("turn"), st.integers(0, 12))  # a number cancels


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(slots=st.integers(1, 3), steps=st.lists(STEPS, max_size=24))
def test_each_gets_what_it_gets_alone(case: Toy, slots: int, steps: list[Any], load: Load) -> None:
    with Engine(load(replace(case, batch=slots))) as engine:
        client = Client(engine)
        cancelled: set[int] = set()
        for step in steps:
            if isinstance(step, Request):
                client.submit(step)
            elif step == "turn":
                _turn(client, cancelled, slots)
            elif step < len(client.tickets):
                engine.cancel(client.tickets[step])
                cancelled.add(step)
        while _turn(client, cancelled, slots):
            pass
    for index, ticket in enumerate(client.tickets):
        asked, (*events, last) = ticket.request, client.told[index]
        assert isinstance(last, (Finished, Cancelled))
        assert events[:1] in ([], [Admitted()]) and isinstance(last, Cancelled) >= (not events)
        blocks = [event for event in events[1:] if isinstance(event, Committed)]
        assert len(blocks) == len(events[1:])
        ids = [token for block in blocks for token in block.ids]
        starts = np.cumsum([0, *(len(block.ids) for block in blocks)])
        assert [block.start for block in blocks] == starts[:-1].tolist()
        assert all((block.confidences is not None) == asked.confidences for block in blocks)
        wanted = alone(load, case, asked)
        assert ids == wanted.all_tokens[: len(ids)]
        if isinstance(last, Finished):
            found = last.result
            assert (found.all_tokens, found.tokens, found.forwards) == (
                wanted.all_tokens,
                wanted.tokens,
                wanted.forwards,
            )
            # Behind the last block told, everything is the end of sequence.
            assert set(found.all_tokens[len(ids) :]) <= {EOS}
        else:
            assert index in cancelled


def _turn(client: Client, cancelled: set[int], slots: int) -> bool:
    """A turn, with what is true of each."""
    before = client.running()
    gone = {i for i in cancelled if i in before | client.waiting()}
    worked = client.turn()
    for index in gone:
        assert client.told[index][-1] == Cancelled() and len(client.now[index]) == 1
    admitted = {i for i, events in client.now.items() if events[0] == Admitted()}
    working = (before - gone) | admitted
    assert len(working) == slots or (len(working) < slots and not client.waiting())
    assert worked == bool(working or gone)
    return worked


def test_settings_of_requests_in_one_step_are_their_own(load: Load) -> None:
    """Temperature, seed, threshold, length and early stop differ; none leaks to the one beside it."""
    case = Toy(cache="dual", block=8)
    plain = Request(prompts_of(3, [5])[0], 8, early_stop=False, parameters={"threshold": 1.0})
    asked = [
        plain,
        replace(plain, parameters={"threshold": 0.3}),
        replace(plain, temperature=1.0, seed=4),
        replace(plain, temperature=1.0, seed=5, gen_length=13),
    ]
    wanted = [alone(load, case, each) for each in asked]
    assert len({tuple(each.all_tokens) for each in wanted}) == len(asked)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        with Engine(load(replace(case, batch=4))) as engine:
            client = Client(engine)
            for index in order:
                client.submit(asked[index])
            client.finish()
            found = [client.result(at) for at in range(len(order))]
        assert [(f.all_tokens, f.forwards) for f in found] == [
            (wanted[index].all_tokens, wanted[index].forwards) for index in order
        ]


def hooked(runner: Runner, hook: Callable[[Binding], None], patch: pytest.MonkeyPatch) -> None:
    """Call `hook` after each launch."""
    launch = runner.executor.launch

    def launched(binding: Binding, *more: Any) -> None:
        launch(binding, *more)
        hook(binding)

    patch.setattr(runner.executor, "launch", launched)


@pytest.mark.parametrize("case", [Toy(batch=2), Toy(batch=2, span=4, cache="block", blocks=2)])
def test_a_block_that_never_ends_fails_alone(
    case: Toy, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = load(case)
    asked = [Request(p, 12, seed=i) for i, p in enumerate(prompts_of(4, [3, 5, 2, 6]))]
    wanted = [alone(load, case, each).all_tokens for each in asked]

    def stuck(binding: Binding) -> None:
        # Whatever was decided for the request of seed 1 is taken back.
        for place in np.flatnonzero(binding.arrays["seed"] == 1):
            slot, positions = binding.arrays["block_seq"][place], binding.arrays["block_pos"][place]
            runner.slots[slot].canvas[positions[positions >= 5]] = MASK
            binding.values(binding.plan.outputs["done"])[place] = False

    hooked(runner, stuck, monkeypatch)
    with Engine(runner) as engine:
        client = Client(engine)
        for each in asked:
            client.submit(each)
        client.finish()
    last = client.told[1][-1]
    assert isinstance(last, Failed) and isinstance(last.error, ContractError)
    assert "prompt 1, position" in str(last.error)
    assert [client.result(i).all_tokens for i in (0, 2, 3)] == [wanted[i] for i in (0, 2, 3)]


def test_a_step_that_fails_ends_those_in_it_and_no_others(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = load(Toy(batch=2))
    asked = [Request(p, 8) for p in prompts_of(4, [3, 5, 2])]
    broken = [OSError("gone")]

    def fail(binding: Binding) -> None:
        if broken:
            raise broken.pop()

    hooked(runner, fail, monkeypatch)
    with Engine(runner) as engine:
        client = Client(engine)
        for each in asked:
            client.submit(each)
        client.finish()
    assert all(isinstance(client.told[i][-1], Failed) for i in (0, 1))
    assert client.result(2).all_tokens == alone(load, Toy(), asked[2]).all_tokens


def test_who_comes_while_a_slot_is_free_is_in_the_next_iteration(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And who is cancelled is in none after that; neither waits for the other's block."""
    case = Toy(batch=3, block=16, length=64)
    runner = load(case)
    asked = Request([1, 3, 4], 16, early_stop=False, parameters={"threshold": 1.0})
    seen: list[int] = []
    with Engine(runner) as engine:
        client = Client(engine)

        def come_and_go(binding: Binding) -> None:
            seen.append(binding.B)
            if len(seen) in (3, 5):
                client.submit(replace(asked, seed=len(seen)))
            if len(seen) == 8:
                engine.cancel(client.tickets[1])

        hooked(runner, come_and_go, monkeypatch)
        client.submit(asked)
        client.finish()
    assert seen[:9] == [1, 1, 1, 2, 2, 3, 3, 3, 2]
    assert client.told[1] == [Admitted(), Cancelled()]
    wanted = alone(load, case, asked)
    assert client.result(0).all_tokens == client.result(2).all_tokens == wanted.all_tokens
    assert client.result(0).forwards == wanted.forwards == 16


def test_what_is_wrong_is_said_at_once(load: Load) -> None:
    with Engine(load(Toy())) as engine:
        client = Client(engine)
        for wrong in (
            Request([VOCAB], 4),
            Request([1], 0),
            Request([1], 40),
            Request([1], 4, parameters={"steps": 3}),
            Request([1], 4, temperature=-1),
        ):
            with pytest.raises(RequestError):
                client.submit(wrong)
        assert not client.turn()


def test_too_many_may_not_wait(load: Load) -> None:
    with Engine(load(Toy()), waiting=2, waiting_positions=20) as engine:
        client = Client(engine)
        for _ in range(2):
            client.submit(Request([1], 6))  # nine positions each: whole blocks count
        with pytest.raises(Full, match="2 requests wait already"):
            client.submit(Request([1], 1))
        client.turn()
        with pytest.raises(Full, match="requests of 9 positions wait already"):
            client.submit(Request([1], 12))
        client.submit(Request([1], 7))
        client.finish()
        assert [type(client.told[i][-1]) for i in range(3)] == [Finished] * 3


def test_an_engine_that_drains_takes_and_admits_no_more(load: Load) -> None:
    engine = Engine(load(Toy(batch=2)))
    client = Client(engine)
    for prompt in prompts_of(4, [3, 5, 2]):
        client.submit(Request(prompt, 12))
    client.turn()
    assert engine.drain(0.0) == client.tickets
    assert engine.drain(60.0) == client.tickets[2:]
    with pytest.raises(Full, match="takes no more"):
        engine.submit(Request([1], 4), lambda events: None)
    engine.close()
    assert client.turn() and not client.turn()
    assert client.told[2] == [Cancelled()]
    assert [len(client.result(i).all_tokens) for i in (0, 1)] == [12, 12]
    Engine(load(Toy(batch=2))).__exit__(None, None, None)  # the slots are free again


def test_slots_have_one_engine(load: Load) -> None:
    runner = load(Toy())
    with Engine(runner):
        with pytest.raises(RequestError, match="another engine"):
            Engine(runner)
        with pytest.raises(RequestError, match="another engine"):
            runner.generate([[1]], gen_length=4)
    assert len(runner.generate([[1]], gen_length=4)) == 1


def test_an_emit_that_raises_takes_nothing_from_the_others(load: Load) -> None:
    asked = Request([1, 3], 8)
    with Engine(load(Toy(batch=2))) as engine:

        def broken(events: Sequence[Event]) -> None:
            raise BrokenPipeError

        engine.submit(asked, broken)
        client = Client(engine)
        client.submit(replace(asked, seed=1))
        raised = 0
        while True:
            try:
                if not client.turn():
                    break
            except BrokenPipeError:
                raised += 1
    assert raised > 0
    assert client.result(0).all_tokens == alone(load, Toy(), asked).all_tokens
    assert [type(event) for event in client.told[0]] == [Admitted, Committed, Committed, Finished]


@pytest.mark.parametrize(
    "case", [Toy(batch=2), Toy(batch=2, span=4, cache="block", blocks=2)], ids=str
)
def test_confidences_are_those_of_the_iteration_that_chose(case: Toy, load: Load) -> None:
    runner = load(case)
    asked = Request([1, 3, 4], 9, early_stop=False, confidences=True)
    runner.watch = observer = Observer(runner.executor, {})
    try:
        with Engine(runner) as engine:
            client = Client(engine)
            client.submit(asked)
            client.submit(replace(asked, prompt=[5, 6], confidences=False))
            client.finish()
    finally:
        runner.watch = None
    wanted = np.full(12, np.nan)
    for seen in observer.iterations:
        slot = next((s for s, prompt in seen.prompts.items() if prompt == 0), None)
        if slot is not None:
            changed = np.flatnonzero(seen.before[slot, :12] != seen.after[slot, :12])
            wanted[changed] = seen.confidence[slot, changed]
    blocks = [event for event in client.told[0] if isinstance(event, Committed)]
    found = [x for block in blocks for x in block.confidences or []]
    assert found == wanted[3:].tolist()
    assert client.result(0).all_tokens == alone(load, case, asked).all_tokens
    others = [event for event in client.told[1] if isinstance(event, Committed)]
    assert others and all(block.confidences is None for block in others)
