"""A loaded artifact: prompts in, tokens out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Self

from dcompile.errors import ArtifactError
from dcompile.runtime.artifact import Artifact, open_artifact
from dcompile.runtime.backend import Backend
from dcompile.runtime.decode.caches import CachePolicy, cache_policy
from dcompile.runtime.decode.engine import Emit, Engine, Event, Failed, Finished
from dcompile.runtime.decode.inputs import check_inputs
from dcompile.runtime.decode.requests import Limits, Request, stream, token_ids
from dcompile.runtime.decode.sequence import Committed, Result
from dcompile.runtime.decode.slots import slots_of
from dcompile.runtime.decode.step import Watch
from dcompile.runtime.opening import open_backend
from dcompile.runtime.tokens import Tokenizer

OnBlock = Callable[[int, list[int]], None]
"""Takes the index of a prompt and the tokens that its latest block generated."""
OnResult = Callable[[int, Result], None]
"""Takes the index of a prompt and its result, at once when it is there."""


class Runner:
    """A loaded artifact and its slots; `watch` sees each step, `cache` may be set anew."""

    def __init__(self, artifact: Artifact, executor: Backend) -> None:
        self.artifact, self.executor = artifact, executor
        where = str(artifact.path)
        self.limits = Limits.read(artifact.manifest, artifact.plan.sizes, where)
        self.cache: CachePolicy = cache_policy(artifact.manifest["options"], self.limits.span)
        self.tokenizer = Tokenizer(artifact)
        self.watch: Watch | None = None
        self.slots = slots_of(artifact, executor, self.limits)
        self.slots_taken = Lock()
        """Held by the engine that serves requests in them."""
        self._turn = Lock()
        check_inputs(artifact.plan, set(self.limits.parameters), where)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        verify: bool = True,
        threads: int | None = None,
        weights_at: str | Path | None = None,
    ) -> Self:
        """Open an artifact; `verify=False` does not hash its files.

        `weights_at` is the folder of weights outside the artifact, where they are not beside it.
        """
        artifact = open_artifact(path, verify, weights_at)
        try:
            return cls(artifact, open_backend(artifact, threads))
        except MemoryError as error:
            what = "this machine has too little memory for what the plan asks"
            raise ArtifactError(what, where=str(path), remedy="compile it smaller") from error

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
        self.limits.settings(asked)
        ids = [self.encode(prompt, chat) for prompt in prompts]
        seen: Counter[str] = Counter()
        told = _Told(on_block, on_result)
        with self._turn, Engine(self, waiting=None, waiting_positions=None) as engine:
            for index, prompt in enumerate(ids):
                # As text: what is no id yet is refused by the engine, and need not have a hash.
                own = stream(seed, seen[str(prompt)])
                seen[str(prompt)] += 1
                engine.submit(replace(asked, prompt=prompt, seed=own), told.of(index))
            while engine.turn():
                pass
        return [told.results[index] for index in range(len(prompts))]

    def encode(self, prompt: str | Sequence[int], chat: bool = False) -> list[int]:
        """The token ids of a prompt, which may be ids already: a list, or an array of any library."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, chat)
        return token_ids(prompt)

    def decode(self, tokens: Sequence[int]) -> str | None:
        """Tokens as text; None where the artifact has no tokenizer."""
        return self.tokenizer.decode(tokens) if self.tokenizer.present else None


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
