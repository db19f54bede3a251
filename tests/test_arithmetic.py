import threading

import pytest
import torch

from ray_tracin.arithmetic import arithmetic, multiply, shared_threads

ROWS = [(1, 1, 1), (7, 5, 33), (96, 130, 257)]


def matrices(rows, others, columns, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, columns, generator=generator).to(dtype) for count in (rows, others)]


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_products_are_those_of_float64(shape, precision):
    left, right = matrices(*shape)
    got = multiply(left, right, precision)
    expected = left.double() @ right.double().T
    assert got.dtype == torch.float32
    assert float((got - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("shape", ROWS)
def test_bfloat16_rounds_operands_and_nothing_else(shape):
    left, right = matrices(*shape)
    expected = left.bfloat16().double() @ right.bfloat16().double().T
    got = multiply(left, right, "bfloat16")
    assert got.dtype == torch.float32
    assert float((got - expected).norm() / expected.norm()) < 1e-6


def test_float64_stays():
    left, right = matrices(3, 4, 5, torch.float64)
    assert torch.equal(multiply(left, right, "bfloat16"), left @ right.T)


def test_a_product_is_the_same_bits_with_any_number_of_threads():
    left, right = matrices(264, 300, 5000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(multiply(left, right))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize(("threads", "parts", "each"), [(4, 2, 2), (3, 2, 1), (1, 2, 1)])
def test_parts_share_the_threads_of_whoever_starts_them(threads, parts, each):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    together = threading.Barrier(parts)

    def count(_):
        together.wait(10)
        torch.ones(100_000).sum()
        return torch.get_num_threads()

    with shared_threads(parts) as pool:
        found = list(pool.map(count, range(parts)))
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert found == [each] * parts
    assert after == threads


@pytest.mark.parametrize(("precision", "coarse"), [("float32", False), ("tf32", True), ("bfloat16", True)])
def test_switches_are_set_inside_and_put_back(precision, coarse):
    def flags():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = flags()
    with arithmetic(precision):
        assert flags() == (coarse, coarse)
        assert torch.backends.cudnn.deterministic
    assert flags() == before


def test_switches_are_put_back_after_an_error():
    before = torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(ZeroDivisionError), arithmetic("tf32"):
        _ = 1 / 0
    assert torch.backends.cuda.matmul.allow_tf32 == before
