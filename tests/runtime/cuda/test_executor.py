"""Generation on the fake GPU: the tokens of the CPU loop, however the iterations are launched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_toy
import numpy as np
import numpy.typing as npt
import pytest
import toy
from fake_cuda import FakeCuda, Launched
from toy import CACHES, MASK, Toy, prompts_of

from dcompile.runtime.cuda.executor import CudaExecutor
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.decode.sequence import Result
from dcompile.runtime.state import KEPT_BINDINGS

OnGpu = Callable[[Toy], FakeCuda]


def facts(results: list[Result]) -> list[tuple[list[int], int]]:
    return [(result.all_tokens, result.forwards) for result in results]


def generate(runner: Runner, lengths: list[int], **arguments: Any) -> list[tuple[list[int], int]]:
    asked = {"threshold": 0.7, "temperature": 0.5, "seed": 3, **arguments}
    length = max(12, runner.limits.block_length)
    return facts(runner.generate(prompts_of(5, lengths), gen_length=length, **asked))


@pytest.mark.parametrize(
    "settings",
    [{}, {"loops": False, "check_every": 1}, {"loops": False, "check_every": 3}],
    ids=["while", "every", "third"],
)
@pytest.mark.parametrize("case", CACHES, ids=str)
def test_tokens_are_those_of_the_cpu(
    case: Toy, settings: dict[str, Any], tmp_path: Path, code: bytes, on_gpu: OnGpu
) -> None:
    case = Toy(**{**vars(case), "batch": 2})
    wanted = generate(toy.load(tmp_path, case, code), [3, 9, 0, 4])
    runner = gpu_toy.runner(gpu_toy.write(tmp_path / "gpu.dcx", case), on_gpu(case), **settings)
    assert generate(runner, [3, 9, 0, 4]) == wanted
    assert generate(runner, [3, 9, 0, 4]) == wanted  # over graphs that are there now


def test_a_block_is_one_launch(tmp_path: Path, on_gpu: OnGpu) -> None:
    """Inputs over, the loop, counters back: nothing else is put into the stream."""
    case = Toy(cache="dual", block=8)
    fake = on_gpu(case)
    runner = gpu_toy.runner(gpu_toy.write(tmp_path / "gpu.dcx", case), fake)
    fake.forget()
    (result,) = runner.generate(prompts_of(2, [4]), gen_length=8, threshold=1.0)
    log = fake.log
    assert result.forwards == 8  # one token an iteration
    # On entering, all rows run once: not worth a graph. The other seven are one launch.
    nodes = [line for line in log if line.startswith("node ")]
    kernels = ["toy_embed", "toy_layer", "toy_layer", "toy_choose", "toy_done", "advance"]
    assert nodes[0].startswith("node copy") and nodes[0].endswith("over")
    assert nodes[1] == "node while"
    assert nodes[2:-1] == [f"node kernel {name}" for name in [*kernels, "set_condition"]]
    assert nodes[-1].startswith("node copy") and nodes[-1].endswith("back")
    assert log.count("launch graph") == log.count("instantiate") == 1
    assert [line for line in log if line.startswith("turn ")] == [f"turn {i}" for i in range(7)]
    ran = [line.split()[1] for line in log[log.index("graph") :] if line.startswith("run ")]
    assert ran == [*kernels, "set_condition"] * 7


def test_graphs_are_kept_by_rows_and_sequences(tmp_path: Path, on_gpu: OnGpu) -> None:
    case = Toy(cache="dual", batch=2)
    fake = on_gpu(case)
    runner = gpu_toy.runner(gpu_toy.write(tmp_path / "gpu.dcx", case), fake)
    for _ in range(2):
        runner.generate(prompts_of(2, [4, 4]), gen_length=12, threshold=1.0)
    keys = [key for key, binding in runner.executor.memory._bindings.items() if binding.graphs]
    assert fake.log.count("instantiate") == sum(
        "loop" in runner.executor.memory._bindings[key].graphs for key in keys
    )
    assert fake.log.count("launch graph") > fake.log.count("instantiate")


def test_without_loops_iterations_share_a_launch(tmp_path: Path, on_gpu: OnGpu) -> None:
    """An older driver: k iterations a launch, those after the end harmless, the rest one by one."""
    case = Toy(cache="dual", block=8)
    fake = on_gpu(case)
    fake.set("version", 12030)
    runner = gpu_toy.runner(gpu_toy.write(tmp_path / "gpu.dcx", case), fake, check_every=3)
    executor = runner.executor
    assert isinstance(executor, CudaExecutor) and not executor.loops
    fake.forget()
    (result,) = runner.generate(prompts_of(2, [4]), gen_length=8, threshold=1.0)
    assert result.forwards == 8
    # Seven iterations after the first: three, three, and one more.
    assert fake.log.count("launch graph") == 3
    assert fake.log.count("instantiate") == 2
    assert not any("while" in line for line in fake.log)
    assert sum(line.startswith("run advance") for line in fake.log) == 8


def test_a_driver_that_cannot_assemble_has_no_loops(tmp_path: Path, on_gpu: OnGpu) -> None:
    case = Toy()
    fake = on_gpu(case)
    path = gpu_toy.write(tmp_path / "gpu.dcx", case)
    assert gpu_toy.runner(path, fake).executor.loops
    fake.set("version", 12030)
    assert not gpu_toy.runner(path, fake).executor.loops


def test_the_cap_ends_a_loop(tmp_path: Path, on_gpu: OnGpu) -> None:
    case = Toy(block=8)
    executor = gpu_toy.runner(gpu_toy.write(tmp_path / "a.dcx", case), on_gpu(case)).executor
    executor.state["canvas"].fill(MASK)
    binding = executor.fill(inputs(8, block=8, threshold=1.0))
    turns = executor.repeat(binding, 5)
    assert turns.performed == [5] and turns.done == [False]
    executor.pull(0)
    assert (executor.state["canvas"][0, :8] == MASK).sum() == 3


@pytest.mark.parametrize(
    ("settings", "ended"), [({}, 3), ({"loops": False, "check_every": 2}, 4)], ids=["while", "twos"]
)
def test_a_host_that_is_wanted_ends_a_loop(
    settings: dict[str, Any], ended: int, tmp_path: Path, on_gpu: OnGpu
) -> None:
    """Set while iterations run: the loop ends with its turn, and nothing but where it stopped changes."""
    case = Toy(block=8)
    fake = on_gpu(case)
    executor = gpu_toy.runner(gpu_toy.write(tmp_path / "a.dcx", case), fake, **settings).executor
    choose, turn = fake.kernels["toy_choose"], 0

    def choosing(launch: Launched) -> None:
        nonlocal turn
        turn += 1
        executor.wanted[0] = turn >= 3
        choose(launch)

    fake.kernels["toy_choose"] = choosing  # type: ignore[index]
    executor.bind(8, 1).used = 1  # as if its rows had run before, so that it is worth a graph
    executor.state["canvas"].fill(MASK)
    found = executor.repeat(executor.fill(inputs(8, block=8, threshold=1.0, temperature=1.0)), 8)
    assert (found.performed, found.done, turn) == ([ended], [False], ended)
    executor.pull(0)
    stopped = executor.state["canvas"].copy()
    assert (stopped[0, :8] == MASK).sum() == 8 - ended
    executor.wanted[0], turn = 0, -8
    executor.state["canvas"].fill(MASK)
    again = executor.repeat(
        executor.fill(inputs(8, block=8, threshold=1.0, temperature=1.0)), ended
    )
    executor.pull(0)
    assert again.performed == [ended] and np.array_equal(executor.state["canvas"], stopped)


def test_an_artifact_from_before_has_no_word_of_the_hosts(
    tmp_path: Path, code: bytes, on_gpu: OnGpu
) -> None:
    case = Toy(cache="dual", batch=2)
    wanted = generate(toy.load(tmp_path, case, code), [3, 9, 0, 4])
    fake = on_gpu(case)
    fake.kernels["advance"] = lambda launch: gpu_toy.advance(launch, case.batch, asked=False)  # type: ignore[index]

    def older(text: dict[str, Any], kernels: Any, files: Any) -> None:
        del text["loop"]["args"][8]
        table, cubins = gpu_toy.table(text)
        kernels |= table
        files |= cubins

    runner = gpu_toy.runner(gpu_toy.write(tmp_path / "gpu.dcx", case, older), fake)
    runner.executor.wanted[0] = 1
    assert generate(runner, [3, 9, 0, 4]) == wanted


def inputs(
    total: int, block: int = 4, threshold: float = 0.9, temperature: float = 0.0
) -> dict[str, npt.NDArray[Any]]:
    """All rows of one sequence whose first block begins at 0."""
    positions = np.arange(total)
    zero = np.array([0])
    return {
        "row_seq": np.zeros(total, np.int64),
        "row_pos": positions,
        "row_limit": np.full(total, total),
        "block_seq": zero,
        "block_pos": positions[None, :block],
        "choice_row": positions[None, :block],
        "seed": zero,
        "tick": zero,
        "iteration": zero,
        "threshold": np.array([threshold], np.float32),
        "temperature": np.array([temperature], np.float32),
    }


def test_a_step_and_its_times(tmp_path: Path, code: bytes, on_gpu: OnGpu) -> None:
    case = Toy()
    cpu = toy.load(tmp_path, case, code).executor
    fake = on_gpu(case)
    gpu = gpu_toy.runner(gpu_toy.write(tmp_path / "gpu.dcx", case), fake).executor
    found = []
    for executor in (cpu, gpu):
        executor.state["canvas"].fill(MASK)
        out = executor.step(inputs(8))
        found.append({name: array.copy() for name, array in out.items()})
        found[-1]["canvas"] = executor.state["canvas"].copy()
    for name in ("token", "confidence", "commit", "done", "canvas"):
        assert np.array_equal(found[0][name], found[1][name]), name
    assert np.array_equal(cpu.state["keys_1"], gpu.state["keys_1"])
    gpu.state["canvas"].fill(MASK)
    kernel = fake.kernels["toy_choose"]
    fake.kernels["toy_choose"] = lambda launch: (kernel(launch), fake.spend(41))  # type: ignore
    times = gpu.time_step(inputs(8))
    assert [name for name, _ in times] == [
        "toy_embed",
        "toy_layer",
        "toy_layer",
        "toy_choose",
        "done",
    ]
    assert np.allclose([seconds for _, seconds in times], [1e-3, 1e-3, 1e-3, 42e-3, 1e-3])


def test_a_step_in_parts(tmp_path: Path, on_gpu: OnGpu) -> None:
    case = Toy()
    fake = on_gpu(case)
    executor = gpu_toy.runner(gpu_toy.write(tmp_path / "gpu.dcx", case), fake).executor
    executor.state["canvas"].fill(MASK)
    whole = {k: v.copy() for k, v in executor.step(inputs(8)).items()}
    executor.state["canvas"].fill(MASK)
    binding = executor.fill(inputs(8))
    seconds = np.zeros(5)
    executor.launch(binding, part=(0, 2))
    between = binding.values(14)
    executor.launch(binding, seconds, part=(2, 5))
    assert between.shape == (8,) and between.any()
    assert seconds.tolist()[:2] == [0, 0] and (seconds[2:] > 0).all()
    assert all(np.array_equal(whole[name], binding.outputs[name]) for name in whole)


def test_views_are_copied_with_their_strides(tmp_path: Path, on_gpu: OnGpu) -> None:
    case = Toy()

    def column(text: dict[str, Any], kernels: Any, files: Any) -> None:
        place = {"kind": "view", "of": 16, "offset": 2, "strides": [4, 1]}
        shape = [{"B": 1}, 2]
        text["buffers"].append({"name": "v", "dtype": "i64", "shape": shape, "place": place})

    path = gpu_toy.write(tmp_path / "gpu.dcx", case, column)
    executor = gpu_toy.runner(path, on_gpu(case)).executor
    executor.state["canvas"].fill(MASK)
    binding = executor.fill(inputs(8))
    executor.launch(binding)
    last = len(executor.plan.buffers) - 1
    assert np.array_equal(binding.values(last), binding.values(16)[:, 2:])


def test_memory_is_given_back(tmp_path: Path, on_gpu: OnGpu) -> None:
    case = Toy(cache="dual", batch=2, length=128)
    fake = on_gpu(case)
    runner = gpu_toy.runner(gpu_toy.write(tmp_path / "gpu.dcx", case), fake)
    executor = runner.executor
    assert isinstance(executor, CudaExecutor)
    for rows in range(1, KEPT_BINDINGS + 9):
        executor.bind(rows, 1)
    assert len(executor.memory._bindings) <= KEPT_BINDINGS
    generate(runner, [3, 9, 0, 4, 20, 31])
    small = executor.bind(4, 1)
    executor.bind(200, 2)
    assert executor.bind(4, 1) is not small  # the scratch moved
    generate(runner, [3, 9])
    executor.close()
    assert fake.live == 0


def test_zeroed_scratch_is_zero_whenever_it_grows(tmp_path: Path, on_gpu: OnGpu) -> None:
    """The kernel of `done` asserts it; memory of the fake driver comes full of other bytes."""
    case = Toy(batch=4)
    runner = gpu_toy.runner(gpu_toy.write(tmp_path / "gpu.dcx", case), on_gpu(case))
    generate(runner, [3])
    generate(runner, [3, 4, 5, 6])


def test_wide_shared_memory_is_asked_for(tmp_path: Path, on_gpu: OnGpu) -> None:
    case = Toy()
    fake = on_gpu(case)
    executor = gpu_toy.runner(gpu_toy.write(tmp_path / "gpu.dcx", case), fake).executor
    assert [line for line in fake.log if line.startswith("attribute")] == [
        "attribute toy_layer 8 65536"
    ]
    executor.state["canvas"].fill(MASK)
    executor.step(inputs(10))
    assert "run toy_layer 3 1 1 x 64 shared 65536" in fake.log
    assert "run toy_embed 3 1 1 x 64 shared 0" in fake.log
