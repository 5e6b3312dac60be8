"""Signals and exhausted memory inside a kernel, and rows of very many columns."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from op_cases import needs_native, random_index, rows

from hellm import Hypergraph, ops

pytestmark = needs_native


def long_call(name):
    """A call that takes many seconds of any processor."""
    x = torch.ones(100_000, 64)
    if name in ("hypergraph_conv", "bipartite_propagate"):
        graph = Hypergraph(random_index(100_000, 1_000, 200_000), num_vertices=100_000, num_hyperedges=1_000)
        if name == "hypergraph_conv":
            return lambda: ops.hypergraph_conv(x, graph, num_layers=100_000)
        return lambda: ops.bipartite_propagate(x, x[:1_000], graph, num_layers=100_000)
    leaf, target = x.clone().requires_grad_(), torch.zeros(100_000, dtype=torch.int64)
    return {
        "knn": lambda: ops.knn(x, 5),
        "info_nce": lambda: ops.info_nce(x, x),
        "info_nce with gradients": lambda: ops.info_nce(leaf, x),
        "info_nce of cold rows": lambda: ops.info_nce(x, x, 0.01),
        "item_cross_entropy": lambda: ops.item_cross_entropy(leaf, x, target),
    }[name]


CALLS = ["knn", "info_nce", "info_nce with gradients", "info_nce of cold rows", "item_cross_entropy"]
CALLS += ["hypergraph_conv", "bipartite_propagate"]


class Alarm(Exception):
    pass


@pytest.mark.parametrize("name", CALLS)
def test_native_kernels_end_within_a_second_of_a_signal(name, kernel):
    """By processor time, of which other work on the machine takes none."""
    if kernel != "native":
        pytest.skip("plain torch looks for signals between its own operators")
    call = long_call(name)

    def handle(*_):
        raise Alarm

    before = signal.signal(signal.SIGPROF, handle)
    started = time.process_time()
    try:
        signal.setitimer(signal.ITIMER_PROF, 0.3)
        with pytest.raises(Alarm):
            call()
        assert time.process_time() - started < 1.3
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def test_native_operators_may_be_called_by_a_signal_handler():
    graph = Hypergraph(random_index(3_000, 500, 20_000), num_vertices=3_000, num_hyperedges=500)
    x, other, handled = rows(3_000, 32), rows(3_000, 32, seed=1), []
    expected = ops.hypergraph_conv(x, graph, num_layers=600)
    before = signal.signal(signal.SIGALRM, lambda *_: handled.append(ops.hypergraph_conv(other, graph, num_layers=2)))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        for _ in range(20):
            assert torch.equal(ops.hypergraph_conv(x, graph, num_layers=600), expected)
            if handled:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert torch.equal(handled[0], ops.hypergraph_conv(other, graph, num_layers=2))


def test_native_kernel_of_another_thread_is_not_disturbed_by_a_signal():
    x, found, handled = rows(12_000, 64), [], []
    expected = ops.knn(x, 5)[1]
    before = signal.signal(signal.SIGALRM, lambda *_: handled.append(True))
    try:
        for _ in range(20):
            thread = threading.Thread(target=lambda: found.append(ops.knn(x, 5)[1]))
            thread.start()
            signal.setitimer(signal.ITIMER_REAL, 0.005)
            thread.join()
            if handled:
                break
    finally:
        # A processor that is done before it would be ended by the alarm, once nobody handles that.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert handled and all(torch.equal(one, expected) for one in found)


OUT_OF_MEMORY = """
import resource, sys, torch
from hellm import ops
torch.set_num_threads(1)
D = 300_000
a, b = torch.randn(8, D), torch.randn(8, D)
call = {"info_nce": lambda x, y: ops.info_nce(x, y), "knn": lambda x, y: ops.knn(x, 2),
        "item_cross_entropy": lambda x, y: ops.item_cross_entropy(x, y, torch.arange(8))}[sys.argv[1]]
call(a[:, :8], b[:, :8])
now = int(open("/proc/self/statm").read().split()[0]) * 4096
failures = 0
for room in range(0, 200, 4):
    resource.setrlimit(resource.RLIMIT_AS, (now + room * 2**20, resource.RLIM_INFINITY))
    try:
        call(a, b)
    except (MemoryError, RuntimeError) as error:
        failures += isinstance(error, MemoryError)
        continue
    break
print(failures > 0, room < 196)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits the address space")
@pytest.mark.parametrize("name", ["info_nce", "knn", "item_cross_entropy"])
def test_process_survives_exhausted_memory_anywhere_in_a_kernel(name):
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, name], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.split()) == (0, ["True", "True"]), done.stderr


WIDE = {
    "knn": lambda a, b: ops.knn(a, 6)[1],
    "info_nce": lambda a, b: ops.info_nce(a, b, 0.05, reduction="none"),
    "item_cross_entropy": lambda a, b: ops.item_cross_entropy(
        a / a.shape[1] ** 0.5, b, torch.arange(6), reduction="none"
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_native_error_at_many_columns_is_that_of_plain_torch(name, kernel):
    x, y = rows(6, 100_000).abs(), rows(6, 100_000, seed=1).abs()
    truth = WIDE[name](x.double(), y.double())
    error = float((WIDE[name](x, y) - truth).abs().max())
    with ops.backend("torch"):
        plain = float((WIDE[name](x, y) - truth).abs().max())
    assert error <= 2 * plain + 1e-6


LONG = [pytest.param(length, id=f"{length:g}") for length in (1e-320, 1e-200, 1e200, 1e307)]


@pytest.mark.parametrize("length", LONG)
def test_native_losses_and_neighbours_of_extreme_float64_lengths(length, kernel):
    x, y = rows(9, 3, dtype=torch.float64).sign(), rows(9, 3, dtype=torch.float64, seed=1)
    expected = ops.info_nce(x, y)
    assert torch.allclose(ops.info_nce(x * length, y), expected, rtol=1e-12)
    assert torch.allclose(ops.info_nce(y, x * length), ops.info_nce(y, x), rtol=1e-12)
    assert torch.allclose(ops.knn(x * length, 9)[1], ops.knn(x, 9)[1], rtol=0, atol=1e-12)
    if length < 1e-300:
        return  # the gradient is too large for a float64
    (grad,) = torch.autograd.grad(ops.info_nce(z := (x * length).requires_grad_(), y), [z])
    (unit,) = torch.autograd.grad(ops.info_nce(z := x.clone().requires_grad_(), y), [z])
    assert torch.allclose(grad * length, unit, rtol=1e-9, atol=1e-12)
