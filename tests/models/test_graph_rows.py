"""Rows of the graph encoder over what is drawn of its graphs, against its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hellm.graphs import user_hypergraph
from hellm.hypergraph import Hypergraph
from hellm.models import GraphEncoder
from hellm.models.graph import SampledRows

NUM_USERS, NUM_ITEMS, DIM = 40, 25, 6
USERS, ITEMS = torch.tensor([0, 3, 4, 39]), torch.tensor([0, 1, 8, 20, 24])


def encoder(**options) -> GraphEncoder:
    draw = torch.Generator().manual_seed(0)
    pairs = torch.unique(
        torch.stack([torch.randint(count, (160,), generator=draw) for count in (NUM_USERS, NUM_ITEMS)]), dim=1
    )
    members = torch.unique(
        torch.stack([torch.randint(count, (90,), generator=draw) for count in (NUM_ITEMS, 12)]), dim=1
    )
    weight = torch.rand(12, generator=draw) + 0.5
    items = Hypergraph(members, num_vertices=NUM_ITEMS, num_hyperedges=12, hyperedge_weight=weight)
    torch.manual_seed(0)
    graphs = {"user_hypergraph": user_hypergraph(pairs, NUM_USERS, NUM_ITEMS), "item_hypergraph": items}
    return GraphEncoder(NUM_USERS, NUM_ITEMS, **{**graphs, "embedding_dim": DIM, "num_layers": 2, **options})


@pytest.mark.parametrize("backbone", ["lightgcn", "mf"])
@pytest.mark.parametrize(
    "options", [{}, {"unit_items": True}, {"use_user_branch": False}, {"item_hypergraph": None}], ids=str
)
def test_where_nothing_is_left_out_rows_are_those_of_the_encoder(options, backbone):
    model = encoder(backbone=backbone, **options).double()
    output, found = model(), SampledRows(model, 10**9)(USERS, ITEMS)
    for name, whole, rows in zip(output._fields, output, found, strict=True):
        if whole is None:
            assert rows is None
            continue
        torch.testing.assert_close(rows, whole[USERS if name.startswith("user") else ITEMS])


def test_the_mean_over_draws_is_right_before_rows_have_unit_length():
    model = encoder().double()
    with torch.no_grad():
        output, draw = model(), torch.Generator().manual_seed(1)
        sampled, draws = SampledRows(model, 3), []
        for _ in range(500):
            user, item, user_view, item_view = sampled(USERS, ITEMS, draw)
            draws.append((user - F.normalize(user_view), item - F.normalize(item_view), user_view, item_view))
        backbone = output.user - F.normalize(output.user_view), output.item - F.normalize(output.item_view)
    whole = (*backbone, output.user_view, output.item_view)
    for drawn, right, rows in zip(zip(*draws, strict=True), whole, (USERS, ITEMS) * 2, strict=True):
        drawn = torch.stack(drawn)
        error = drawn.std(0) / len(drawn) ** 0.5
        assert (error > 1e-4).any()
        assert ((drawn.mean(0) - right[rows]).abs() <= 5 * error + 1e-6).all()


def test_gradients_are_sparse_and_of_few_rows():
    model = encoder()
    SampledRows(model, 1)(USERS[:1], ITEMS[:1])[0].sum().backward()
    for table in (model.user_table, model.item_table, model.user_branch_table):
        gradient = table.weight.grad.coalesce()
        assert 0 < gradient.indices().shape[1] <= 8 and gradient.shape == table.weight.shape
    assert model.item_branch_table.weight.grad is None


def test_a_backbone_that_is_not_linear_is_refused():
    with pytest.raises(ValueError, match="linear"):
        SampledRows(encoder(backbone="ngcf"), 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none")
def test_rows_on_a_gpu_are_drawn_alike():
    found = []
    for device in ("cpu", "cuda"):
        model = encoder().to(device)
        output = SampledRows(model, 3)(USERS.to(device), ITEMS.to(device), torch.Generator().manual_seed(1))
        sum(one.square().sum() for one in output).backward()
        found.append([*output, *(one.grad.to_dense() for one in model.parameters())])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second.cpu(), rtol=1e-4, atol=1e-5)
