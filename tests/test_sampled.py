"""Propagation over part of a hypergraph against the whole one: exact, or right in the mean."""

from __future__ import annotations

import itertools

import pytest
import torch

from hellm import Hypergraph, ops
from hellm.sampled import SampledConvolution, SampledPropagation

V, M, NNZ = 30, 20, 160
FORMS = [
    {"normalization": normalization, "hyperedge_degree": degree, "self_loops": loops}
    for normalization, degree, loops in itertools.product(("symmetric", "row", "none"), (True, False), (True, False))
]
ROWS = torch.tensor([3, 0, 17, 3, 29])
ITEMS = torch.tensor([19, 0, 4, 0])
# More than there are ways through six layers.
ALL_PATHS = 2**31


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
    for limits in ({}, {"num_hyperedges": NNZ, "num_vertices": NNZ}, {"num_paths": ALL_PATHS}):
        sample = SampledConvolution(hypergraph, ROWS, num_layers=num_layers, **limits, **form)
        found = rows_of(x, sample)
        expected = ops.hypergraph_conv(x, hypergraph, num_layers=num_layers, **form)[ROWS]
        torch.testing.assert_close(found, expected)
        share = torch.randn(found.shape, generator=draw, dtype=torch.float64)
        grads = [torch.autograd.grad(one, (x, weight, values), share) for one in (found, expected)]
        torch.testing.assert_close(*grads)


def assert_right_in_the_mean(draws: list[torch.Tensor], right: torch.Tensor) -> None:
    """Something was left out, and the mean is within five of its standard errors."""
    drawn = torch.stack(draws)
    error = drawn.std(0) / len(drawn) ** 0.5
    assert (error > 1e-3).any()
    assert ((drawn.mean(0) - right).abs() <= 5 * error + 1e-5).all()


@pytest.mark.parametrize("self_loops", [False, True])
@pytest.mark.parametrize(
    "limits",
    [
        {"num_hyperedges": 2, "num_layers": 1},
        {"num_vertices": 2, "num_layers": 1},
        {"num_hyperedges": 2, "num_vertices": 3, "num_layers": 2},
        {"num_paths": 6, "num_layers": 1},
        {"num_paths": 6, "num_layers": 2},
        {"num_paths": 8, "num_vertices": 2, "num_layers": 2},
    ],
    ids=str,
)
def test_the_mean_over_draws_is_the_convolution(limits, self_loops):
    hypergraph = graph(hyperedge_weight=torch.rand(M, generator=torch.Generator().manual_seed(3)) + 0.5)
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(V, 4, generator=draw).requires_grad_()
    share = torch.randn(len(ROWS), 4, generator=draw)
    values, gradients = [], []
    for _ in range(300):
        found = rows_of(x, SampledConvolution(hypergraph, ROWS, self_loops=self_loops, generator=draw, **limits))
        values.append(found.detach())
        gradients.append(torch.autograd.grad(found, x, share)[0])
    num_layers = limits["num_layers"]
    expected = ops.hypergraph_conv(x, hypergraph, self_loops=self_loops, num_layers=num_layers)[ROWS]
    assert_right_in_the_mean(values, expected.detach())
    assert_right_in_the_mean(gradients, torch.autograd.grad(expected, x, share)[0])


def test_what_is_read_goes_by_the_rows_and_not_by_the_graph():
    draw = torch.Generator().manual_seed(0)
    index = torch.randint(10_000, (2, 400_000), generator=draw)
    hypergraph = Hypergraph(index, num_vertices=10_000, num_hyperedges=10_000)
    sample = SampledConvolution(hypergraph, torch.arange(4), num_hyperedges=3, num_vertices=2, num_layers=2)
    assert 4 <= len(sample.sources) <= 4 * 7**2
    assert sample.sources.tolist() == sorted(set(sample.sources.tolist()))
    x = torch.randn(len(sample.sources), 8)
    assert sample(x).shape == (4, 8)
    for num_layers in (1, 2, 5):
        by_paths = SampledConvolution(hypergraph, torch.arange(4), num_paths=7, num_layers=num_layers)
        assert 4 * 6 <= len(by_paths.sources) <= 4 * 7
        # Without self loops the rows of a layer are read as well, each for one more path.
        options = {"num_paths": 7, "num_layers": num_layers, "self_loops": False}
        assert len(SampledConvolution(hypergraph, torch.arange(4), **options).sources) <= 4 * 8 * 2**num_layers


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
    for name in ("num_hyperedges", "num_vertices", "num_paths"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            SampledConvolution(hypergraph, ROWS, **{name: 0})
    sample = SampledConvolution(hypergraph, ROWS, num_hyperedges=1, num_vertices=1)
    with pytest.raises(ValueError, match=r"x must be \[\d+, D\], the rows of `sources`, got \[30, 3\]"):
        sample(torch.randn(V, 3))


class TestPropagation:
    @staticmethod
    def tables(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
        draw = torch.Generator().manual_seed(4)
        return tuple(torch.randn(count, 5, generator=draw, dtype=dtype).requires_grad_() for count in (V, M))

    @staticmethod
    def rows(tables: tuple[torch.Tensor, ...], sample: SampledPropagation) -> tuple[torch.Tensor, ...]:
        user, item = tables
        return sample(user[sample.user_sources], item[sample.item_sources])

    @staticmethod
    def whole(tables: tuple[torch.Tensor, ...], num_layers: int) -> tuple[torch.Tensor, ...]:
        user, item = ops.bipartite_propagate(*tables, graph(), num_layers=num_layers)
        return user[ROWS], item[ITEMS]

    @pytest.mark.parametrize("num_paths", [None, ALL_PATHS])
    @pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
    def test_all_of_it_is_the_propagation(self, num_layers, num_paths):
        tables = self.tables(torch.float64)
        sample = SampledPropagation(graph(), ROWS, ITEMS, num_layers=num_layers, num_paths=num_paths)
        found, expected = self.rows(tables, sample), self.whole(tables, num_layers)
        torch.testing.assert_close(found, expected)
        shares = [torch.randn_like(one) for one in found]
        torch.testing.assert_close(*(torch.autograd.grad(one, tables, shares) for one in (found, expected)))

    @pytest.mark.parametrize(("num_paths", "num_layers"), [(1, 1), (3, 1), (3, 2), (4, 3)])
    def test_the_mean_over_draws_is_the_propagation(self, num_paths, num_layers):
        hypergraph, tables, draw = graph(), self.tables(), torch.Generator().manual_seed(5)
        shares = [torch.randn(len(rows), 5, generator=draw) for rows in (ROWS, ITEMS)]
        draws: list[tuple[torch.Tensor, ...]] = []
        for _ in range(400):
            options = {"num_paths": num_paths, "num_layers": num_layers, "generator": draw}
            found = self.rows(tables, SampledPropagation(hypergraph, ROWS, ITEMS, **options))
            draws.append((*(one.detach() for one in found), *torch.autograd.grad(found, tables, shares)))
        expected = self.whole(tables, num_layers)
        right = (*(one.detach() for one in expected), *torch.autograd.grad(expected, tables, shares))
        for drawn, one in zip(zip(*draws, strict=True), right, strict=True):
            assert_right_in_the_mean(list(drawn), one)

    @pytest.mark.parametrize("num_layers", [1, 2, 5])
    def test_what_is_read_goes_by_the_rows_and_the_layers(self, num_layers):
        index = torch.randint(10_000, (2, 400_000), generator=torch.Generator().manual_seed(0))
        hypergraph = Hypergraph(index, num_vertices=10_000, num_hyperedges=10_000)
        users, items = torch.arange(4), torch.arange(3)
        sample = SampledPropagation(hypergraph, users, items, num_paths=6, num_layers=num_layers)
        sources = sample.user_sources, sample.item_sources
        assert 4 + 3 <= sum(map(len, sources)) <= (4 + 3) * (1 + 6 * num_layers)
        for rows, asked in zip(sources, (users, items), strict=True):
            assert rows.tolist() == sorted(set(rows.tolist())) and set(asked.tolist()) <= set(rows.tolist())

    def test_draws_follow_the_generator(self):
        def drawn(seed: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(seed)
            return self.rows(self.tables(), SampledPropagation(graph(), ROWS, ITEMS, num_paths=2, generator=generator))[
                0
            ]

        assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))

    def test_no_rows_and_wrong_arguments(self):
        hypergraph = graph()
        sample = SampledPropagation(hypergraph, ROWS[:0], ITEMS, num_paths=2, num_layers=1)
        user, item = self.rows(self.tables(), sample)
        assert user.shape == (0, 5) and item.shape == (len(ITEMS), 5)
        for arguments, message in (
            ({"users": torch.tensor([V])}, r"users must be in \[0, 30\), got 30 to 30"),
            ({"items": torch.tensor([-1])}, r"items must be in \[0, 20\), got -1 to -1"),
            ({"num_paths": 0}, "num_paths must be >= 1, got 0"),
            ({"num_layers": -1}, "num_layers must be >= 0, got -1"),
            ({"hypergraph": graph(hyperedge_weight=torch.ones(M))}, "hypergraph must have no hyperedge_weight here"),
        ):
            with pytest.raises(ValueError, match=message):
                SampledPropagation(**{"hypergraph": hypergraph, "users": ROWS, "items": ITEMS} | arguments)
        with pytest.raises(ValueError, match=r"item_x must be \[\d+, D\], the rows of `item_sources`, got \[20, 5\]"):
            sample(torch.randn(len(sample.user_sources), 5), torch.randn(M, 5))
