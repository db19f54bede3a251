import os
import platform
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ray_tracin.arithmetic import (
    arithmetic,
    inner_products,
    multiply,
    prefers_onednn,
    return_freed_memory,
    shared_threads,
)

LIBRARIES = ["MKL", "oneDNN"] if hasattr(torch.ops.mkldnn, "_linear_pointwise") else ["MKL"]
"""That multiply float32 on a CPU."""

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


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [*ROWS, (0, 3, 5), (3, 0, 5), (3, 5, 0)])
def test_inner_products_of_any_library_are_those_of_float64(shape, dtype, library, monkeypatch):
    monkeypatch.setattr("ray_tracin.arithmetic.prefers_onednn", lambda: library == "oneDNN")
    left, right = matrices(*shape, dtype)
    expected = left.double() @ right.double().T
    # Parts of longer rows, and rows that are columns elsewhere.
    wider = torch.cat([right, right], 1)[:, : shape[2]]
    for first, second in ((left, right), (left, wider), (left.T.contiguous().T, right.T.contiguous().T)):
        got = inner_products(first, second)
        assert (got.dtype, got.shape) == (dtype, expected.shape)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_library_is_chosen_by_the_machine():
    there = Path("/proc/cpuinfo").exists() and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    assert prefers_onednn() == (there and torch.backends.cpu.get_cpu_capability() == "AVX512")


@pytest.mark.parametrize(("threads", "parts", "each"), [(4, 2, 2), (3, 2, 1), (2, 1, 2)])
def test_parts_share_the_threads_of_whoever_starts_them(threads, parts, each):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    together = threading.Barrier(parts)

    def count(_):
        together.wait(10)
        torch.ones(100_000).sum()
        return torch.get_num_threads()

    with shared_threads(parts) as run_each:
        found = run_each(count, range(parts))
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert found == [each] * parts
    assert after == threads


def test_one_thread_does_parts_in_a_loop_and_one_call_needs_no_other_thread():
    before = torch.get_num_threads()
    here = threading.get_ident()
    try:
        for threads, calls in ((1, 3), (4, 1)):
            torch.set_num_threads(threads)
            with shared_threads(3) as run_each:
                assert run_each(lambda _: threading.get_ident(), range(calls)) == [here] * calls
    finally:
        torch.set_num_threads(before)


def test_what_a_part_raises_arrives():
    with shared_threads(2) as run_each, pytest.raises(ZeroDivisionError):
        run_each(lambda value: 1 / value, [1, 0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries can't be asked")
def test_memory_that_a_thread_has_freed_is_returned():
    def leave() -> torch.Tensor:
        blocks = [torch.ones(1 << 14) for _ in range(2000)]
        # The last one keeps all that lies below it from being returned.
        return blocks[-1]

    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(leave).result()
    before = resident_bytes()
    return_freed_memory()
    assert before - resident_bytes() > 100 << 20
    assert last.sum() == 1 << 14


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def switches():
    operations = [("cuda", "conv"), ("cuda", "matmul"), ("mkldnn", "conv"), ("mkldnn", "matmul")]
    return [torch._C._get_fp32_precision_getter(*one) for one in operations]


newer_switches = pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch 2.8 has the older switches alone"
)


@newer_switches
@pytest.mark.parametrize(("precision", "operands"), [("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "tf32")])
def test_switches_are_set_inside_and_put_back(precision, operands):
    before = switches(), torch.backends.cudnn.deterministic
    with arithmetic(precision):
        assert switches() == [operands, operands, "ieee", "ieee"]
        assert torch.backends.cudnn.deterministic
    assert (switches(), torch.backends.cudnn.deterministic) == before


def choose(owner, precision):
    owner.fp32_precision = precision


@newer_switches
@pytest.mark.parametrize(
    "chosen",
    [
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: choose(torch.backends, "tf32"),
        lambda: choose(torch.backends.cudnn, "tf32"),
        lambda: choose(torch.backends.cudnn.conv, "ieee"),
        lambda: choose(torch.backends.cuda.matmul, "tf32"),
        lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    ],
)
def test_programs_that_have_chosen_a_precision_keep_it(chosen):
    owners = [torch.backends, torch.backends.cudnn, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    owners += [torch.backends.cuda.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul]
    first = [owner.fp32_precision for owner in owners]
    try:
        chosen()
        before = switches()
        for precision, operands in (("float32", "ieee"), ("tf32", "tf32")):
            with arithmetic(precision):
                assert switches() == [operands, operands, "ieee", "ieee"]
            assert switches() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        for owner, precision in zip(owners, first, strict=True):
            owner.fp32_precision = precision


def test_switches_are_put_back_after_an_error():
    before = switches()
    with pytest.raises(ZeroDivisionError), arithmetic("tf32"):
        _ = 1 / 0
    assert switches() == before
