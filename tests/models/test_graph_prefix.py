from __future__ import annotations

import pytest
import torch

from hellm.models.llm.graph_prefix import GraphPrefix, RunningGraph


def test_running_graph_starts_neutral():
    assert torch.equal(RunningGraph(4, 6, rank=3)(torch.randn(2, 5, 4)), torch.zeros(2, 5, 6))


def test_running_graph_is_the_mean_gram_matrix_of_the_items_so_far():
    graph = RunningGraph(2, 3, rank=None)
    graph.mlp = torch.nn.Identity()
    x = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    first = [1.0, 2.0, 2.0, 4.0]
    both = [(1 + 9) / 2, (2 - 3) / 2, (2 - 3) / 2, (4 + 1) / 2]
    torch.testing.assert_close(graph(x), torch.tensor([[first, both]]))


def test_running_graph_never_looks_ahead():
    graph = RunningGraph(4, 6, rank=3)
    torch.nn.init.normal_(graph.mlp[-1].weight)
    x = torch.randn(1, 5, 4)
    changed = x.clone()
    changed[:, 3:] += 1
    before, after = graph(x), graph(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-6)
    assert (before[:, 3:] - after[:, 3:]).abs().amax(2).min() > 1e-3


@pytest.mark.parametrize(("rank", "inputs"), [(None, 16), (4, 16), (9, 16), (3, 9)])
def test_rank_compresses_only_wider_embeddings(rank, inputs):
    graph = RunningGraph(4, 6, rank=rank)
    assert graph.mlp[0].in_features == inputs
    assert isinstance(graph.gram_input.compress, torch.nn.Linear) == (inputs == 9)


def test_gram_matrix_counts_masked_rows_only():
    prefix = GraphPrefix(1, 3, 2, graph_width=2, mean=False)
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    expected = torch.tensor([[[10.0, 14.0], [14.0, 20.0]], [[1.0, 2.0], [2.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(prefix.gram(x, mask), expected)
    prefix.mean = True
    torch.testing.assert_close(prefix.gram(x, mask), expected / torch.tensor([2.0, 1.0, 1.0])[:, None, None])


def test_prefix_shapes_and_what_differs_between_histories():
    gram = torch.randn(3, 2, 2)
    both = GraphPrefix(4, 5, 6, graph_width=2).eval()
    key, value = both(gram)
    assert key.shape == value.shape == (3, 4, 6, 5)
    assert not torch.allclose(key, value)
    assert not torch.allclose(key[0], key[1])
    # Without the learned part every layer and prefix token is the same.
    graph_only, _ = GraphPrefix(4, 5, 6, graph_width=2, learned=False).eval()(gram)
    torch.testing.assert_close(graph_only, graph_only[:, :1, :1].expand(-1, 4, 6, -1))
    learned, _ = GraphPrefix(4, 5, 6, graph_width=None)()
    assert learned.shape == (1, 4, 6, 5)
    # The last norm leaves unit root mean square.
    torch.testing.assert_close(learned.square().mean(-1), torch.ones(1, 4, 6), rtol=1e-3, atol=0)


def test_prefix_starts_as_published():
    torch.manual_seed(0)
    prefix = GraphPrefix(8, 64, 10, graph_width=4)
    for part in (prefix.prefix_key, prefix.prefix_value):
        assert part.shape == (8, 10, 64)
        assert abs(float(part.detach().mean())) < 0.05 and abs(float(part.detach().std()) - 1) < 0.05
    assert [m.p for m in prefix.modules() if isinstance(m, torch.nn.Dropout)] == [0.3] * 4


def test_prefix_gradients_reach_every_part():
    prefix = GraphPrefix(2, 5, 3, graph_width=4, rank=2).eval()
    gram = prefix.gram(torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    key, value = prefix(gram)
    ((key * torch.randn_like(key)).sum() + (value * torch.randn_like(value)).sum()).backward()
    assert [name for name, p in prefix.named_parameters() if p.grad is None or not p.grad.abs().max()] == []
