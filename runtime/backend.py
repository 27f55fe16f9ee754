"""What runs an artifact's plan: the processor (`cpu/executor.py`) or a GPU (`cuda/executor.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from dcompile.runtime.plan import Plan
from dcompile.runtime.state import Binding
from dcompile.runtime.turns import Flag, Turns
from dcompile.runtime.weights import Array

Floats = npt.NDArray[np.float64]


class Backend(ABC):
    """An artifact ready to run; `step` is one iteration, and changes the state in place.

    `check_every` is how many iterations run before anyone looks whether a block is done.
    """

    plan: Plan
    threads: int
    check_every: int
    wanted: Flag
    """Not 0 while the host has something to do between turns: `repeat` then ends after one."""
    arch: int | None = None
    """Of a GPU: 90 for sm_90."""

    @property
    @abstractmethod
    def state(self) -> Mapping[str, Array]:
        """What the host sees of the state; see `push` and `pull`."""

    @abstractmethod
    def bind(self, R: int, B: int) -> Binding:
        """The buffers for R rows of B sequences, with every call over them prepared."""

    @abstractmethod
    def launch(
        self, binding: Binding, seconds: Floats | None = None, part: tuple[int, int] | None = None
    ) -> None:
        """Run the plan over bound buffers; `seconds` takes the time of each launch.

        `part` names the launches to run, for one who looks at values between them.
        """

    @abstractmethod
    def repeat(self, binding: Binding, turns: int) -> Turns:
        """Iterate over bound and filled buffers until a sequence is done, `turns` times at most.

        It ends early, after a turn at least, where `wanted` is set: any thread may set it.
        """

    @abstractmethod
    def push(self, slot: int) -> None:
        """The host wrote a slot's state."""

    @abstractmethod
    def pull(self, slot: int) -> None:
        """The host is about to read a slot's state."""

    @abstractmethod
    def clear(self, name: str, slot: int) -> None:
        """Zero what a state holds for a slot."""

    @abstractmethod
    def put(self, name: str, value: Array) -> None:
        """Give a whole state another value, wherever it lies."""

    def fill(self, inputs: Mapping[str, Array]) -> Binding:
        """The buffers for these inputs, with their values in them; raises ValueError for other shapes."""
        binding = self.bind(len(inputs["row_seq"]), len(inputs["block_seq"]))
        for name, target in binding.arrays.items():
            if inputs[name].shape != target.shape:
                raise ValueError(f"input {name} has shape {tuple(inputs[name].shape)}")
            target[...] = inputs[name]
        return binding

    def step(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run one iteration; what it returns may be overwritten by the next one."""
        binding = self.fill(inputs)
        self.launch(binding)
        return binding.outputs

    def time_step(self, inputs: Mapping[str, Array]) -> list[tuple[str, float]]:
        """Run one iteration and return each launch's name and seconds on the device."""
        binding = self.fill(inputs)
        seconds = np.zeros(len(self.plan.launches))
        self.launch(binding, seconds)
        names = [launch.name for launch in self.plan.launches]
        return list(zip(names, seconds.tolist(), strict=True))
