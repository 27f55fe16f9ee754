"""The loop: blocks left to right, every sequence on its own clock, all of them in one step."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Protocol, Self

import numpy as np

from dcompile.errors import ArtifactError, ContractError
from dcompile.runtime.artifact import Artifact, open_artifact
from dcompile.runtime.backend import Backend
from dcompile.runtime.decode.caches import (
    CachePolicy,
    Moment,
    Rows,
    cache_policy,
    none,
    reads_tokens,
    stores_blocks,
)
from dcompile.runtime.decode.inputs import (
    canvas_of,
    check_inputs,
    fill_block,
    fill_rows,
    policy_state,
)
from dcompile.runtime.decode.pipelined import Block, Pipeline
from dcompile.runtime.decode.requests import Limits, check_seed, check_temperature, stream
from dcompile.runtime.decode.sequence import Call, Ints, OnBlock, OnResult, Result, Served
from dcompile.runtime.decode.smoothing import soft_threshold
from dcompile.runtime.opening import open_backend
from dcompile.runtime.state import Binding
from dcompile.runtime.tokens import Tokenizer
from dcompile.runtime.turns import Bools, Turns, repeat


class Watch(Protocol):
    """Launches a generation's steps in the runner's place, to see what happens in them."""

    def launch(self, binding: Binding, prompts: Mapping[int, int]) -> None:
        """Run one step; `prompts` says which prompt each active slot serves."""


class Runner:
    """A loaded artifact: prompts in, tokens out; `watch` sees each step of it."""

    def __init__(self, artifact: Artifact, executor: Backend) -> None:
        self.artifact, self.executor = artifact, executor
        where = str(artifact.path)
        self.limits = Limits.read(artifact.manifest, artifact.plan.sizes, where)
        options = artifact.manifest["options"]
        self.cache: CachePolicy = cache_policy(options, self.limits.span)
        self._stores = stores_blocks(options)
        self._smooth = "row_weight" in artifact.plan.inputs
        self.tokenizer = Tokenizer(artifact)
        self.watch: Watch | None = None
        self._lock = Lock()
        self._positions = np.arange(self.limits.max_length + 1, dtype=np.int64)
        self._canvas: Ints = canvas_of(executor, self.limits, where)
        self._scrubbed = policy_state(artifact, executor)
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

        `parameters` are those of the compiled policy (`threshold`, `steps`, ...). A prompt's result
        depends neither on the prompts beside it nor on the slots: equal prompts are samples of
        one stream each. An empty prompt is served: everything is generated. `on_result` is told
        each result when it is there, first done first; the next prompt takes its slot at once.
        """
        self.limits.check_length(gen_length)
        check_temperature(temperature)
        check_seed(seed)
        given = self.limits.parameters_of(parameters)
        if isinstance(prompts, str):
            raise TypeError("prompts is a sequence of prompts, not one text")
        ids = [self.encode(prompt, chat) for prompt in prompts]
        for index, prompt in enumerate(ids):
            self.limits.check_prompt(prompt, gen_length, index)
        seen: Counter[tuple[int, ...]] = Counter()
        seeds = []
        for prompt in ids:
            seeds.append(stream(seed, seen[tuple(prompt)]))
            seen[tuple(prompt)] += 1
        call = Call(ids, gen_length, temperature, seeds, early_stop, given, on_block, on_result)
        with self._lock:
            return self._serve(call)

    def encode(self, prompt: str | Sequence[int], chat: bool = False) -> list[int]:
        """The token ids of a prompt, which may be ids already."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, chat)
        if hasattr(prompt, "reshape"):  # an array or a tensor, whose numbers are not Python's
            return [int(token) for token in prompt.reshape(-1)]
        return list(prompt)

    def decode(self, tokens: Sequence[int]) -> str | None:
        """Tokens as text; None where the artifact has no tokenizer."""
        return self.tokenizer.decode(tokens) if self.tokenizer.present else None

    @property
    def _reads_tokens(self) -> bool:
        """Whether the host looks at the tokens before every iteration; `cache` may be set anew."""
        return reads_tokens(self.cache) or self.limits.pipelined

    def _serve(self, call: Call) -> list[Result]:
        results: dict[int, Result] = {}
        waiting = deque(range(len(call.prompts)))
        free = list(range(self.limits.batch))[::-1]
        active: list[Served] = []
        while waiting or active:
            while waiting and free:
                active.append(self._admit(call, waiting.popleft(), free.pop()))
            turns = self._step(call, active)
            ends = iter(zip(turns.performed, turns.done, strict=True))
            staying = []
            for sequence in active:
                mine = [next(ends) for _ in sequence.deciding]
                if self._after(call, sequence, mine):
                    result = results[sequence.index] = self._result(sequence)
                    free.append(sequence.slot)
                    if call.on_result is not None:
                        call.on_result(sequence.index, result)
                else:
                    staying.append(sequence)
            active = staying
        return [results[index] for index in range(len(call.prompts))]

    def _admit(self, call: Call, index: int, slot: int) -> Served:
        prompt = call.prompts[index]
        total = self.limits.total(len(prompt), call.gen_length)
        canvas = self._canvas[slot]
        canvas[: len(prompt)] = prompt
        canvas[len(prompt) :] = self.limits.mask_id
        positions = self._positions[:total]
        span = self.limits.span or total
        for name, _ in self._scrubbed:
            self.executor.clear(name, slot)
        self.executor.push(slot)
        begin = self.limits.begin(len(prompt))
        sequence = Served(
            index=index,
            prompt=len(prompt),
            end=len(prompt) + call.gen_length,
            total=total,
            slot=slot,
            canvas=canvas,
            limits=np.minimum((positions // span + 1) * span, total),
            seed=call.seeds[index],
            block=self._block(canvas, begin),
            pipeline=self._pipeline(call, canvas, len(prompt), total),
        )
        self._enter(sequence, begin)
        return sequence

    def _pipeline(self, call: Call, canvas: Ints, prompt: int, total: int) -> Pipeline | None:
        if not self.limits.pipelined:
            return None
        return Pipeline(
            canvas=canvas,
            prompt=prompt,
            begin=self.limits.begin(prompt),
            total=total,
            length=self.limits.block_length,
            mask_id=self.limits.mask_id,
            tau_add=call.parameters["tau_add"],
            tau_activate=call.parameters["tau_activate"],
            most=self.limits.blocks,
            stop_ids=self.limits.eos_ids if call.early_stop else frozenset(),
            cached=self.cache is not none,
        )

    def _block(self, canvas: Ints, begin: int) -> Block:
        end = begin + self.limits.block_length
        return Block.of(canvas, begin, end, self.limits.mask_id)

    def _enter(self, sequence: Served, begin: int) -> None:
        sequence.block = self._block(sequence.canvas, begin)
        for name, each_block in self._scrubbed:
            if each_block:
                self.executor.clear(name, sequence.slot)

    def _rows(self, sequence: Served, ahead: int = 0) -> Rows:
        """The rows that the sequence runs now, or so many iterations ahead in its block."""
        if sequence.pipeline is not None:
            first, last = sequence.pipeline.rows()
            return max(first - self.limits.shift, 0), last
        block = sequence.block
        begin, end = block.begin, block.end
        moment = Moment(
            begin=begin,
            end=end,
            total=sequence.total,
            iteration=block.iteration + ahead,
            tick=sequence.tick + ahead,
            previous=sequence.previous,
            span=self.limits.span,
            ids=sequence.canvas[begin:end],
            before=block.before,
            mask_id=self.limits.mask_id,
            shift=int(self.limits.shift),
        )
        rows = self.cache(moment)
        if not isinstance(rows, tuple):
            return rows
        # A shifted model chooses a block's first token by the row before it.
        return min(rows[0], max(begin - self.limits.shift, 0)), rows[1]

    def _positions_now(self, sequence: Served, rows: Rows) -> Ints:
        if self._reads_tokens:
            block = sequence.block
            block.before = sequence.canvas[block.begin : block.end].copy()
        return self._positions[rows[0] : rows[1]] if isinstance(rows, tuple) else rows

    def _turns(self, call: Call, active: Sequence[Served], rows: Sequence[Rows]) -> int:
        """How many iterations may run over the same rows before the cache policy wants others."""
        # Nor does smoothing take more turns than are needed: each changes what masks are embedded as.
        if self._reads_tokens or self._smooth or any(each.storing for each in active):
            return 1
        most = min(self._bound(call, each.block) - each.block.iteration for each in active)
        turns = 1
        while turns < most and all(
            self._rows(sequence, turns) == now for sequence, now in zip(active, rows, strict=True)
        ):
            turns += 1
        return turns

    def _step(self, call: Call, active: Sequence[Served]) -> Turns:
        """Run iterations until the host has something to decide; results of those that decide."""
        for sequence in active:
            if self._reads_tokens:
                self.executor.pull(sequence.slot)
            if sequence.pipeline is not None:
                sequence.deciding = sequence.pipeline.advance()
            else:
                sequence.deciding = [] if sequence.storing else [sequence.block]
        rows = [self._rows(sequence) for sequence in active]
        turns = self._turns(call, active, rows)
        places = [self._positions_now(*pair) for pair in zip(active, rows, strict=True)]
        blocks = sum(len(sequence.deciding) for sequence in active)
        binding = self.executor.bind(sum(map(len, places)), blocks)
        at = place = 0
        for sequence, positions in zip(active, places, strict=True):
            weight = call.parameters["smoothing"] if self._smooth else None
            fill_rows(binding, at, sequence, positions, weight)
            for block in sequence.deciding:
                fill_block(binding, place, at, sequence, block, positions, self.limits.shift)
                if self._smooth and "threshold" in binding.arrays:
                    lowest = call.parameters["threshold"]
                    binding.arrays["threshold"][place] = soft_threshold(sequence.tick, lowest)
                place += 1
            at += len(positions)
        for name, value in call.parameters.items():
            if name in binding.arrays and not (self._smooth and name == "threshold"):
                binding.arrays[name].fill(value)
        if "temperature" in binding.arrays:
            binding.arrays["temperature"].fill(call.temperature)
        if self.watch is None:
            return self.executor.repeat(binding, turns)
        return self._watched(self.watch, binding, turns, active)

    def _watched(
        self, watch: Watch, binding: Binding, turns: int, active: Sequence[Served]
    ) -> Turns:
        served = {each.slot: each.index for each in active}
        done = self.executor.plan.outputs["done"]

        def step() -> Bools:
            watch.launch(binding, served)
            return binding.values(done).copy()

        return repeat(step, binding.arrays, turns)

    def _bound(self, call: Call, block: Block) -> int:
        """The iterations that a block may take: each commits a token."""
        return block.entered + int(call.parameters.get("post_steps", 0)) + 1

    def _after(self, call: Call, sequence: Served, ends: Sequence[tuple[int, bool]]) -> bool:
        """Count what the blocks that decided came to; True when the sequence is finished."""
        if sequence.pipeline is not None:
            return self._flow(call, sequence, sequence.pipeline)
        if sequence.storing:
            sequence.tick += 1
            sequence.storing = False
            self._go_on(sequence)
            return False
        ((performed, done),) = ends
        return self._advance(call, sequence, performed, done)

    def _advance(self, call: Call, sequence: Served, performed: int, complete: bool) -> bool:
        """Count iterations, go on to the next block where one is complete; True at the end."""
        block = sequence.block
        sequence.tick += performed
        block.iteration += performed
        if not complete:
            bound = self._bound(call, block)
            if block.iteration >= bound:
                raise _endless(sequence, block.entered, bound)
            return False
        self.executor.pull(sequence.slot)
        if self._complete(call, sequence, block.begin, block.end):
            return True
        # Inside a block of the attention mask, the next iterations compute it from its start anyway.
        sequence.storing = self._stores and block.end % (self.limits.span or 1) == 0
        if not sequence.storing:
            self._go_on(sequence)
        return False

    def _flow(self, call: Call, sequence: Served, pipeline: Pipeline) -> bool:
        """The same of pipelined blocks, whose number and rows depend on what was decided."""
        self.executor.pull(sequence.slot)
        sequence.tick += 1
        before = pipeline.complete
        pipeline.settle(sequence.deciding)
        for block in pipeline.blocks:
            done = before <= block.begin and block.end <= pipeline.complete
            if done and self._complete(call, sequence, block.begin, block.end):
                return True
        # The first block that is not done is fully activated, and so commits a token.
        masks = sequence.total - sequence.prompt
        if sequence.tick > masks:
            raise _endless(sequence, masks, masks)
        return False

    def _complete(self, call: Call, sequence: Served, begin: int, end: int) -> bool:
        """A block is decided, and all before it; True where it is the last."""
        begin, end = max(begin, sequence.prompt), min(end, sequence.end)
        sequence.decoded += end - begin
        stopped = call.early_stop and self._stop(sequence, end)
        if call.on_block is not None:
            call.on_block(sequence.index, sequence.canvas[begin:end].tolist())
        return stopped or end == sequence.end

    def _go_on(self, sequence: Served) -> None:
        sequence.previous = sequence.block.begin
        self._enter(sequence, sequence.block.end)

    def _stop(self, sequence: Served, end: int) -> bool:
        """Fill everything after a first end of sequence with it, and say whether there is one."""
        at = self._first_eos(sequence.canvas[sequence.prompt : end].tolist())
        if at is None:
            return False
        at += sequence.prompt
        sequence.canvas[at : sequence.end] = sequence.canvas[at]
        self.executor.push(sequence.slot)
        return True

    def _first_eos(self, tokens: Sequence[int]) -> int | None:
        eos = self.limits.eos_ids
        return next((at for at, token in enumerate(tokens) if token in eos), None)

    def _result(self, sequence: Served) -> Result:
        seconds = perf_counter() - sequence.began
        generated: list[int] = sequence.canvas[sequence.prompt : sequence.end].tolist()
        tokens = generated[: self._first_eos(generated)]
        return Result(
            tokens=tokens,
            all_tokens=generated,
            text=self.decode(tokens),
            forwards=sequence.tick,
            tokens_per_forward=sequence.decoded / sequence.tick,
            seconds=seconds,
            tokens_per_second=len(tokens) / seconds if seconds > 0 else 0.0,
        )


def _endless(sequence: Served, masks: int, bound: int) -> ContractError:
    what = f"{masks} masks are not done after {bound} iterations"
    where = f"prompt {sequence.index}, position {sequence.block.begin}"
    return ContractError(what, where=where, remedy="report this as a bug of dcompile")
