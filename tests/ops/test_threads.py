"""Every operator from many Python threads at once, from threads other than the main one, and after a fork."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from functools import partial

import pytest
import torch
from op_cases import assert_same_bits, needs_native, outputs_and_gradients, random_index, rows

from hellm import Hypergraph, ops

SECONDS = 60.0 if os.environ.get("HELLM_SLOW") == "1" else 2.0
NUM_THREADS = 20


def operator_calls():
    graph = Hypergraph(random_index(2_000, 300, 6_000), num_vertices=2_000, num_hyperedges=300)
    x, y, few = rows(2_000, 33), rows(300, 33, seed=1), rows(200, 33, seed=2)
    target = torch.arange(200) % 300
    functions = {
        "hypergraph_conv": (lambda x: ops.hypergraph_conv(x, graph, num_layers=2), [x]),
        "incidence_product": (lambda y: ops.incidence_product(y, graph), [y]),
        "bipartite_propagate": (lambda x, y: ops.bipartite_propagate(x, y, graph), [x, y]),
        "info_nce": (lambda a, b: ops.info_nce(a, b, precision="highest"), [few, few + 1]),
        "info_nce, medium": (lambda a, b: ops.info_nce(a, b, precision="medium"), [few, few + 1]),
        "item_cross_entropy": (lambda a, b: ops.item_cross_entropy(a, b, target), [few, y]),
    }
    calls = {name: partial(outputs_and_gradients, *call) for name, call in functions.items()}
    return calls | {"knn": lambda: list(ops.knn(few, 7))}


@pytest.mark.parametrize("backend_name", ["native", "torch"])
@needs_native
def test_operators_give_the_same_bits_from_twenty_threads(backend_name):
    """Each thread starts at another operator, so that all kinds run beside each other."""
    torch.set_num_threads(2 if backend_name == "native" else 1)
    calls = operator_calls()
    with ops.backend(backend_name):
        alone = {name: call() for name, call in calls.items()}
    failures, counts, until = [], [0] * NUM_THREADS, time.monotonic() + SECONDS

    def work(place):
        names = [*calls][place % len(calls) :] + [*calls][: place % len(calls)]
        try:
            with ops.backend(backend_name):
                while time.monotonic() < until or counts[place] == 0:
                    for name in names:
                        assert_same_bits(alone[name], calls[name]())
                    counts[place] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and min(counts) > 0


@needs_native
@pytest.mark.parametrize("setting", [{}, {"self_loops": False}, {"normalization": "none"}], ids=str)
def test_native_convolution_in_a_thread_reads_only_its_own_memory(setting, kernel):
    """20,000 vertices: what lies behind a buffer of one element is another arena's end there."""
    graph = Hypergraph(random_index(20_000, 300, 20_000), num_vertices=20_000, num_hyperedges=300)
    x, found = rows(20_000, 8), []
    expected = ops.hypergraph_conv(x, graph, **setting)
    backend = "native" if kernel == "native" else "torch"

    def work():
        with ops.backend(backend):
            found.extend(ops.hypergraph_conv(x, graph, **setting) for _ in range(3))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_same_bits([expected] * 3, found)


def _search(x, results):
    results.put(ops.knn(x, 5)[1].tolist())


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("repeat", range(2))
def test_forked_process_runs_kernels_after_the_parent_used_threads(repeat):
    """OpenMP's threads do not survive a fork; below 32,768 elements torch starts none itself."""
    torch.set_num_threads(4)
    x = rows(600, 32)
    expected = ops.knn(x, 5)[1].tolist()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_search, args=(x, results))
    process.start()
    try:
        assert results.get(timeout=20) == expected
    finally:
        process.kill()
        process.join()
