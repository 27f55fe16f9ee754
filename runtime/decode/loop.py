"""`generate`: prompts in, tokens out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock

from dcompile.runtime.artifact import Artifact
from dcompile.runtime.backend import Backend
from dcompile.runtime.decode.engine import Emit, Engine, Event, Failed, Finished
from dcompile.runtime.decode.loaded import Loaded
from dcompile.runtime.decode.requests import Request, sequence, stream
from dcompile.runtime.decode.sequence import Committed, Result

OnBlock = Callable[[int, list[int]], None]
"""Takes the index of a prompt and the tokens that its latest block generated."""
OnResult = Callable[[int, Result], None]
"""Takes the index of a prompt and its result, at once when it is there."""


class Runner(Loaded):
    """A loaded artifact: prompts in, tokens out."""

    def __init__(self, artifact: Artifact, executor: Backend) -> None:
        super().__init__(artifact, executor)
        self._turn = Lock()

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        gen_length: int,
        temperature: float = 0.0,
        seed: int = 0,
        early_stop: bool = True,
        chat: bool = False,
        on_block: OnBlock | None = None,
        on_result: OnResult | None = None,
        **parameters: float,
    ) -> list[Result]:
        """Decode every prompt, in as many slots as were compiled; results in the prompts' order.

        `gen_length` is any number of tokens: whole blocks are computed, and the answer is cut at what
        was asked (a compiled canvas takes its own length only). `parameters` are those of the
        compiled policy (`threshold`, `steps`, ...). A prompt's result depends neither on the prompts
        beside it nor on the slots: equal prompts are samples of one stream each. An empty prompt is
        served: everything is generated. `on_result` is told each result when it is there, first done
        first; the next prompt takes its slot at once. Threads that call it take turns. Raises
        RequestError before anything is decoded, also while an engine has the slots.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is a sequence of prompts, not one text")
        asked = Request((), gen_length, temperature, seed, early_stop, parameters)
        asked = self.limits.settings(asked)
        several = sequence(prompts, "prompts", "a list of texts or of lists of ids")
        ids = [self.encode(prompt, chat) for prompt in several]
        seen: Counter[str] = Counter()
        told = _Told(on_block, on_result)
        with self._turn, Engine(self, waiting=None, waiting_positions=None) as engine:
            for index, prompt in enumerate(ids):
                # As text: what is no id yet is refused by the engine, and need not have a hash.
                own = stream(asked.seed, seen[str(prompt)])
                seen[str(prompt)] += 1
                engine.submit(replace(asked, prompt=prompt, seed=own), told.of(index))
            while engine.turn():
                pass
        return [told.results[index] for index in range(len(ids))]


class _Told:
    """What the engine tells of a call's prompts; the first failure ends the call."""

    def __init__(self, on_block: OnBlock | None, on_result: OnResult | None) -> None:
        self._on_block, self._on_result = on_block, on_result
        self.results: dict[int, Result] = {}

    def of(self, index: int) -> Emit:
        def emit(events: Sequence[Event]) -> None:
            for event in events:
                self._hear(index, event)

        return emit

    def _hear(self, index: int, event: Event) -> None:
        match event:
            case Committed(ids=ids) if self._on_block is not None:
                self._on_block(index, ids)
            case Finished(result):
                self.results[index] = result
                if self._on_result is not None:
                    self._on_result(index, result)
            case Failed(error):
                raise error
