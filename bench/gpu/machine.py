"""The machine that the suite runs on: a GPU, or with --dry-run the tests' fake one and tiny shapes."""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dcompile.codegen.triton.aot import Compiled
from dcompile.runtime.artifact import Artifact
from dcompile.runtime.cuda.device import Device
from dcompile.runtime.cuda.driver import Driver

SUPPORT = Path(__file__).resolve().parents[2] / "tests" / "support"


@dataclass
class Machine:
    """A device with what it can do at best; `fake` is the interpreted GPU of a dry run."""

    device: Device
    where: str
    bandwidth: float = 1.0
    rate: float = 1.0
    fake: Any = None
    rounds: int = 20
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def dry(self) -> bool:
        return self.fake is not None

    def interpret(self, compiled: Sequence[Compiled]) -> None:
        """In a dry run, give these kernels their effect."""
        if self.dry:
            self.fake.add(compiled)

    def interpret_artifact(self, artifact: Artifact, only: Sequence[str] = ()) -> None:
        if self.dry:
            self.fake.add_artifact(artifact, only)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """What an interpreted kernel raised is raised at the end."""
        if not self.dry:
            yield
            return
        with self.fake.fake.raising():
            yield

    def milliseconds(
        self, work: Callable[[], None], before: Callable[[], None] | None = None
    ) -> dict[str, float]:
        """Median and quartiles of the device's time for `work`, which puts it into our stream."""
        begin, end = self.device.event(), self.device.event()
        times = []
        for turn in range(self.rounds + 3):
            if before is not None:
                before()
            self.device.record(begin)
            work()
            self.device.record(end)
            self.device.wait()
            if turn >= 3:
                times.append(self.device.seconds(begin, end) * 1e3)
        for event in (begin, end):
            self.device.driver.call("cuEventDestroy_v2", event)
        return spread(times)


def spread(times: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": middle, "low": low, "high": high}


def open_machine() -> Machine:
    """The GPU of this machine, its rates measured; raises DeviceError where there is none."""
    device = Device(Driver())
    if not torch.cuda.is_available():
        raise SystemExit(
            "the suite draws its weights with torch on the GPU: install torch for CUDA"
        )
    machine = Machine(device, "cuda")
    machine.bandwidth, machine.rate = _bandwidth(), _rate()
    machine.facts = {
        "device": device.name,
        "arch": device.arch,
        "driver": device.driver.version,
        "loops": device.driver.has_while,
        "bandwidth_gb_s": machine.bandwidth / 1e9,
        "rate_tflop_s": machine.rate / 1e12,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    return machine


def fake_machine(folder: Path) -> Machine:
    """A GPU that is not there: every path is walked, kernels are interpreted, times mean nothing."""
    sys.path.insert(0, str(SUPPORT))
    import fake_cuda
    from interpreted_gpu import InterpretedGpu

    fake = fake_cuda.load(fake_cuda.build(folder), Path(tempfile.mkdtemp(dir=folder)))
    gpu = InterpretedGpu(fake, folder)
    device = fake.device()
    facts = {
        "device": "none: a dry run, its times mean nothing",
        "arch": device.arch,
        "dry_run": True,
    }
    return Machine(device, "cpu", bandwidth=1e12, rate=1e14, fake=gpu, rounds=2, facts=facts)


def _timed(work: Callable[[], Any], rounds: int = 12) -> float:
    """The best of some runs, in seconds; rates are bounds."""
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times[2:])


def _bandwidth() -> float:
    """Bytes a second read by a sum over 4 GiB, or moved by a copy, whichever is more."""
    x = torch.randn(1 << 30, device="cuda", dtype=torch.float32)
    read = x.numel() * 4 / _timed(x.sum)
    y = torch.empty_like(x)
    moved = 2 * x.numel() * 4 / _timed(lambda: y.copy_(x))
    return max(read, moved)


def _rate() -> float:
    """FLOP a second of a large bfloat16 product."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / _timed(lambda: x @ x)
