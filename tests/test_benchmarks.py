import copy
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pretended
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import engine
import full_size

SIZES = {"slices": 5, "width": 4, "size": 32, "checkpoints": 2, "block": 0, "batch": 2, "checked": 3}
OPTIONS = Namespace(**SIZES, dtype="float32", precision="float32", device="cpu")


@pytest.fixture
def problems():
    network, *parts = engine.make_problem(OPTIONS.slices, OPTIONS.width, OPTIONS.size)
    return [(one, *parts) for one in full_size.checkpoints(network, OPTIONS.checkpoints)]


def test_the_full_size_is_the_tensor_on_a_device_in_the_precision_of_a_gpu(problems):
    rates, given = torch.tensor([0.1, 0.03]), copy.deepcopy(problems)
    with pretended.gpu(values=1 << 16) as device:
        mixed = {"block": 3, "dtype": "bfloat16", "precision": "bfloat16", "device": str(device)}
        options = Namespace(**{**vars(OPTIONS), **mixed})
        full_size.warm_up(problems[0], options)
        tensor = full_size.compute(problems, rates, options, full_size.Timer(device))
        assert full_size.difference(tensor, problems, rates, options) < 4e-3
    kernels = torch.stack([engine.in_float64(problem).flatten(2) for problem in given])
    expected = torch.einsum("t,t...->...", rates.double(), kernels)
    assert (tensor - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("changed", [{}, {"block": 2}, {"block": 3, "dtype": "bfloat16", "precision": "bfloat16"}])
def test_the_full_size_is_the_tensor_in_one_block_and_in_several(problems, changed):
    options = Namespace(**{**vars(OPTIONS), **changed})
    rates = torch.tensor([0.1, 0.03])
    timer = full_size.Timer(torch.device("cpu"))
    tensor = full_size.compute(problems, rates, options, timer)
    kernels = torch.stack([engine.in_float64(problem).flatten(2) for problem in problems])
    expected = torch.einsum("t,t...->...", rates.double(), kernels)
    largest = 1e-5 if options.dtype == "float32" else 2e-3
    assert (tensor - expected).norm() < largest * expected.norm()
    assert full_size.difference(tensor, problems, rates, options) < 2 * largest
    assert full_size.difference(2 * tensor, problems, rates, options) == pytest.approx(1, rel=1e-2)
    assert set(timer.seconds) == {"networks", "gradients", "products", "sum over checkpoints"}


def test_operations_are_those_of_the_passes_and_of_half_the_kernel():
    (passes, kernel), columns = engine.operations(Namespace(slices=1, width=4, size=32))
    network = engine.make_problem(1, 4, 32)[0]
    assert columns == sum(parameter.numel() for parameter in network.parameters())
    assert kernel == 9 * columns
    assert engine.operations(Namespace(slices=10, width=4, size=32))[0] == (10 * passes, 900 * columns)


def test_rows_made_in_processes_give_the_same_kernel_and_their_memory_is_counted(problems):
    torch.set_num_threads(2)
    try:
        kernel, peak = engine.in_processes(problems[0], batch=2)
        assert peak > 0
        expected = engine.in_float64(problems[0])
        assert (engine.on_one_thread(problems[0]) - expected).norm() < 1e-5 * expected.norm()
        # Of rows rounded to float16.
        assert (kernel - expected).norm() < 3e-5 * expected.norm()
        assert (kernel - engine.engine(problems[0], 2, "float16")).norm() < 3e-6 * expected.norm()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_process_that_fails_is_an_error(problems, monkeypatch):
    def fail(*_):
        raise ValueError("no rows")

    monkeypatch.setattr(engine.Rows, "fill", fail)
    with pytest.raises(RuntimeError, match="exit codes"):
        engine.in_processes(problems[0])


def test_differences_are_from_the_first_method_and_from_one_thread():
    figures = {name: [{"seconds": 2.0, "peak": 1 << 20}] for name in ("shared forward", "shared forward, one thread")}
    kernels = dict(zip(figures, (np.full((2, 2), 2.0), np.ones((2, 2))), strict=True))
    first, second = engine._rows(figures, kernels, 4e9, 4e9, 1 << 21)
    assert first == "| shared forward | 2.00 | 2 | 50% |  | 1.00 | 1 | 0.50 | 0.0e+00 | 1.0e+00 |"
    assert second.endswith("| 5.0e-01 | 0.0e+00 |")
