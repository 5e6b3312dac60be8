"""Convolution over part of a hypergraph against the whole one: exact, or right in the mean."""

from __future__ import annotations

import itertools

import pytest
import torch

from hellm import Hypergraph, ops
from hellm.sampled import SampledConvolution

V, M, NNZ = 30, 20, 160
FORMS = [
    {"normalization": normalization, "hyperedge_degree": degree, "self_loops": loops}
    for normalization, degree, loops in itertools.product(("symmetric", "row", "none"), (True, False), (True, False))
]
ROWS = torch.tensor([3, 0, 17, 3, 29])


def graph(**weights: torch.Tensor) -> Hypergraph:
    draw = torch.Generator().manual_seed(0)
    # The first hyperedges and vertices are hubs, the last vertex and hyperedge have nothing, and some pairs repeat.
    index = torch.stack([(size * torch.rand(NNZ, generator=draw) ** 2).long() for size in (V - 1, M - 1)])
    return Hypergraph(index, num_vertices=V, num_hyperedges=M, **weights)


def rows_of(x: torch.Tensor, sample: SampledConvolution) -> torch.Tensor:
    return sample(x[sample.sources])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_all_of_it_is_the_convolution(form, num_layers):
    draw = torch.Generator().manual_seed(1)
    weight = torch.rand(M, generator=draw, dtype=torch.float64).requires_grad_()
    values = torch.rand(NNZ, generator=draw, dtype=torch.float64).requires_grad_()
    hypergraph = graph(hyperedge_weight=weight, incidence_weight=values)
    x = torch.randn(V, 6, generator=draw, dtype=torch.float64).requires_grad_()
    for limit in (None, NNZ):
        sample = SampledConvolution(
            hypergraph, ROWS, num_hyperedges=limit, num_vertices=limit, num_layers=num_layers, **form
        )
        found = rows_of(x, sample)
        expected = ops.hypergraph_conv(x, hypergraph, num_layers=num_layers, **form)[ROWS]
        torch.testing.assert_close(found, expected)
        share = torch.randn(found.shape, generator=draw, dtype=torch.float64)
        grads = [torch.autograd.grad(one, (x, weight, values), share) for one in (found, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("num_hyperedges", "num_vertices", "num_layers"), [(2, None, 1), (None, 2, 1), (2, 3, 2)])
def test_the_mean_over_draws_is_the_convolution(num_hyperedges, num_vertices, num_layers):
    hypergraph = graph(hyperedge_weight=torch.rand(M, generator=torch.Generator().manual_seed(3)) + 0.5)
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(V, 4, generator=draw).requires_grad_()
    limits = {"num_hyperedges": num_hyperedges, "num_vertices": num_vertices, "num_layers": num_layers}
    share = torch.randn(len(ROWS), 4, generator=draw)
    values, gradients = [], []
    for _ in range(300):
        found = rows_of(x, SampledConvolution(hypergraph, ROWS, self_loops=False, generator=draw, **limits))
        values.append(found.detach())
        gradients.append(torch.autograd.grad(found, x, share)[0])
    expected = ops.hypergraph_conv(x, hypergraph, self_loops=False, num_layers=num_layers)[ROWS]
    for drawn, right in ((values, expected.detach()), (gradients, torch.autograd.grad(expected, x, share)[0])):
        drawn = torch.stack(drawn)
        error = drawn.std(0) / len(drawn) ** 0.5
        # Something was left out, and the mean of 300 is within five of its standard errors.
        assert (error > 1e-3).any()
        assert ((drawn.mean(0) - right).abs() <= 5 * error + 1e-5).all()


def test_what_is_read_goes_by_the_rows_and_not_by_the_graph():
    draw = torch.Generator().manual_seed(0)
    index = torch.randint(10_000, (2, 400_000), generator=draw)
    hypergraph = Hypergraph(index, num_vertices=10_000, num_hyperedges=10_000)
    sample = SampledConvolution(hypergraph, torch.arange(4), num_hyperedges=3, num_vertices=2, num_layers=2)
    assert 4 <= len(sample.sources) <= 4 * 7**2
    assert sample.sources.tolist() == sorted(set(sample.sources.tolist()))
    x = torch.randn(len(sample.sources), 8)
    assert sample(x).shape == (4, 8)


def test_draws_follow_the_generator():
    hypergraph, x = graph(), torch.randn(V, 3)

    def drawn(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        options = {"num_hyperedges": 2, "num_vertices": 2, "generator": generator}
        return rows_of(x, SampledConvolution(hypergraph, torch.arange(V), **options))

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_no_rows_and_wrong_arguments():
    hypergraph = graph()
    assert rows_of(torch.randn(V, 3), SampledConvolution(hypergraph, ROWS[:0], num_vertices=2)).shape == (0, 3)
    for rows, message in (
        (torch.tensor([0, V]), r"rows must be in \[0, 30\), got 0 to 30"),
        (torch.tensor([0.5]), r"rows must be \[R\] int64, got \[1\] torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            SampledConvolution(hypergraph, rows)
    with pytest.raises(ValueError, match="num_vertices must be >= 1, got 0"):
        SampledConvolution(hypergraph, ROWS, num_vertices=0)
    sample = SampledConvolution(hypergraph, ROWS, num_hyperedges=1, num_vertices=1)
    with pytest.raises(ValueError, match=r"x must be \[\d+, D\], the rows of `sources`, got \[30, 3\]"):
        sample(torch.randn(V, 3))
