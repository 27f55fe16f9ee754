"""How likely a masked diffusion model finds a text: a Monte Carlo bound, and whether it would write it.

The bound is LLaDA's (arXiv 2502.09992, equation 6): masks of l of the text's L tokens, l spread evenly
over 1..L, the log-probabilities of the masked tokens times L / l, averaged.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dcompile.errors import RequestError
from dcompile.runtime.decode.loop import Runner

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Scorer:
    """Scores continuations with an artifact compiled with `--policy likelihood`.

    It uses the runner's slots: no generation may run at the same time.
    """

    def __init__(self, runner: Runner) -> None:
        if "told" not in runner.executor.state:
            what = "the artifact tells the probability of no token but the one that it chooses"
            remedy = "compile with --policy likelihood, which generates as threshold does"
            raise RequestError(what, where=str(runner.artifact.path), remedy=remedy)
        self.runner, self.limits = runner, runner.limits
        self._canvas: Ints = runner.executor.state["canvas"]
        self._wanted: Ints = runner.executor.state["wanted"]
        self._told = runner.executor.state["told"]

    def log_likelihood(
        self, context: Sequence[int], continuation: Sequence[int], samples: int = 128
    ) -> float:
        """An estimate of a lower bound of ln p(continuation | context), in nats.

        The same ids give the same masks, whatever was scored before. Raises RequestError where the
        two do not fit into the compiled length.
        """
        ids = self._ids(context, continuation)
        first, length = len(context), len(continuation)
        if length == 0:
            return 0.0
        masks = spread_masks(length, 1 if length == 1 else samples, _seed(ids))
        weights = length / masks.sum(1)
        sums = np.zeros(len(masks))
        for begin in range(0, length, self.limits.block_length):
            chunk = slice(begin, begin + self.limits.block_length)
            # What has no mask in the chunk adds nothing to it.
            some = np.flatnonzero(masks[:, chunk].any(1))
            for part in np.split(some, range(self.limits.batch, len(some), self.limits.batch)):
                if len(part):
                    told = self._tell(ids, first, masks[part], begin)
                    sums[part] += told.sum(1)
        return float((sums * weights).mean())

    def is_greedy(self, context: Sequence[int], continuation: Sequence[int]) -> bool:
        """Whether decoding one token a forward, the surest first, block by block, writes it."""
        ids = self._ids(context, continuation)
        first, length = len(context), len(continuation)
        mask = np.ones((1, length), dtype=bool)
        for begin in range(0, length, self.limits.block_length):
            chunk = slice(begin, begin + self.limits.block_length)
            while mask[0, chunk].any():
                self._tell(ids, first, mask, begin)
                now = self._canvas[0, first : first + length]
                decided = mask[0] & (now != self.limits.mask_id)
                if (now[decided] != ids[first : first + length][decided]).any():
                    return False
                mask[0] &= ~decided
        return True

    def _ids(self, context: Sequence[int], continuation: Sequence[int]) -> Ints:
        """All positions of the sequence; behind the text, masks up to a whole block of attention."""
        text = [*context, *continuation]
        total = self.limits.total(len(context), len(continuation))
        if total > self.limits.max_length:
            what = f"{len(text)} tokens to score need {total} positions"
            remedy = f"shorten them, or compile with --max-length {total}"
            raise RequestError(what, remedy=remedy)
        odd = [t for t in text if not 0 <= t < self.limits.vocab_size or t == self.limits.mask_id]
        if odd:
            raise RequestError(f"token id {odd[0]} cannot be scored")
        return np.array([*text, *[self.limits.mask_id] * (total - len(text))], dtype=np.int64)

    def _tell(self, ids: Ints, first: int, masks: npt.NDArray[np.bool_], begin: int) -> Floats:
        """ln p of the masked tokens of a chunk, [S, n]; 0 where none is. One step, a mask a slot."""
        count, total, n = len(masks), len(ids), self.limits.block_length
        end = first + masks.shape[1]
        # A chunk may end behind the text: its last position stands in for what is not there.
        positions = np.minimum(first + begin + np.arange(n), end - 1)
        slots = np.arange(count)
        for slot, mask in enumerate(masks):
            self._canvas[slot, :total] = ids
            self._canvas[slot, first:end][mask] = self.limits.mask_id
            self._wanted[slot] = ids[positions]
            self.runner.executor.push(slot)
        span = self.limits.span or total
        limits = np.minimum((np.arange(total) // span + 1) * span, total)
        chosen = np.maximum(positions - int(self.limits.shift), 0)
        binding = self.runner.executor.bind(count * total, count)
        values = {
            "row_seq": np.repeat(slots, total),
            "row_pos": np.tile(np.arange(total), count),
            "row_limit": np.tile(limits, count),
            "block_seq": slots,
            "block_pos": positions,
            "choice_row": chosen + slots[:, None] * total,
            "iteration": 0,
            "entered": n,
            "temperature": 0,
            "seed": 0,
            "tick": 0,
            "threshold": 1,
        }
        for name, array in binding.arrays.items():
            array[...] = values[name]
        self.runner.executor.launch(binding)
        there = first + begin + np.arange(n) < end
        return np.where(there, self._told[:count], 0.0).astype(np.float64)


def spread_masks(length: int, samples: int, seed: int) -> npt.NDArray[np.bool_]:
    """Masks of 1..length tokens, the numbers spread evenly from a random one on, [samples, length]."""
    rng = np.random.default_rng(seed)
    start = int(rng.integers(length))
    counts = (start + np.arange(samples) * length // samples) % length + 1
    order = rng.permuted(np.tile(np.arange(length), (samples, 1)), axis=1)
    return np.asarray(order < counts[:, None])


def _seed(ids: Ints) -> int:
    return zlib.crc32(ids.tobytes())
