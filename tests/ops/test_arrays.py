"""Arrays of other libraries as inputs of the operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_cases import GraphCase, random_index, rows

from hellm import Hypergraph, ops, user_hypergraph
from hellm._arrays import as_tensor

GRAPH = GraphCase(random_index(9, 5, 30), 9, 5, 4).build()
X, Y = rows(9, 4), rows(5, 4, seed=1)
TARGET = torch.tensor([0, 4, 1, 1, 2, 3, 0, 4, 2])
CALLS = {
    "hypergraph_conv": (lambda x: ops.hypergraph_conv(x, GRAPH), [X]),
    "incidence_product": (lambda y: ops.incidence_product(y, GRAPH), [Y]),
    "bipartite_propagate": (lambda x, y: ops.bipartite_propagate(x, y, GRAPH), [X, Y]),
    "info_nce": (
        lambda a, p, t, r: ops.info_nce(a, p, t, rows=r),
        [X, X + 0.1, torch.tensor(0.3), torch.tensor([3, 1, 3])],
    ),
    "item_cross_entropy": (lambda h, e, t, b: ops.item_cross_entropy(h, e, t, bias=b), [X, Y, TARGET, Y[:, 0]]),
    "knn": (lambda x: ops.knn(x, 3), [X]),
}
cases = pytest.mark.parametrize(("call", "inputs"), CALLS.values(), ids=CALLS)


def as_tuple(output):
    return output if isinstance(output, tuple) else (output,)


def check(convert, call, inputs):
    for found, expected in zip(as_tuple(call(*map(convert, inputs))), as_tuple(call(*inputs)), strict=True):
        assert isinstance(found, torch.Tensor) and torch.equal(found.cpu(), expected.cpu())


@cases
def test_operators_take_numpy_arrays(call, inputs):
    check(lambda x: x.numpy(), call, inputs)


@cases
def test_operators_take_read_only_and_strided_arrays(call, inputs):
    def convert(x):
        array = np.repeat(x.numpy()[..., None], 2, axis=-1)[..., 0]
        array.flags.writeable = False
        return array

    check(convert, call, inputs)


def test_hypergraph_takes_arrays():
    index, weight = random_index(9, 5, 30), torch.rand(5)
    expected = Hypergraph(index, hyperedge_weight=weight)
    found = Hypergraph(index.numpy(), hyperedge_weight=weight.numpy())
    assert torch.equal(found.hyperedge_index, expected.hyperedge_index)
    assert torch.equal(found.hyperedge_weight, weight)
    users = user_hypergraph(index.numpy(), 9, 5)
    assert torch.equal(users.hyperedge_index, user_hypergraph(index, 9, 5).hyperedge_index)


def test_nothing_is_copied():
    array = np.zeros((3, 2), np.float32)
    tensor = as_tensor("x", array)
    tensor[1, 1] = 5
    assert array[1, 1] == 5
    assert as_tensor("x", tensor) is tensor


class OnlyDLPack:
    """What a library of its own would pass: the two methods and nothing else."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_any_object_with_dlpack_will_do():
    assert torch.equal(ops.hypergraph_conv(OnlyDLPack(X), GRAPH), ops.hypergraph_conv(X, GRAPH))


class OnlyCuda:
    __cuda_array_interface__ = {"shape": (9, 4), "typestr": "<f4", "data": (256, False), "version": 3}  # noqa: RUF012


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ([[1.0]], "x must be a tensor or an array with __dlpack__, got list"),
        (X.numpy()[::-1], r"x must have no negative strides, got \(-16, 4\) bytes; pass a copy"),
        (X.numpy().astype(">f4"), "x must be an array that torch can share memory with: .*byte order"),
        (np.array([["a"]]), "x must be an array that torch can share memory with: "),
        (np.frombuffer(bytearray(17), np.float32, offset=1).reshape(2, 2), r"x must be aligned to its torch.float32"),
        (X.numpy().astype(np.int32), "x must be float32, float64, bfloat16 or float16, got torch.int32"),
    ],
)
def test_arrays_that_cannot_be_shared_are_named(array, message):
    with pytest.raises(ValueError, match=message):
        ops.hypergraph_conv(array, GRAPH)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device")
def test_array_on_a_gpu_that_torch_cannot_use():
    with pytest.raises(ValueError, match=r"x must be an array that torch can share memory with: .*CUDA"):
        ops.hypergraph_conv(OnlyCuda(), GRAPH)


def test_every_argument_is_named():
    with pytest.raises(ValueError, match="positive must have no negative strides"):
        ops.info_nce(X, X.numpy()[::-1])
    with pytest.raises(ValueError, match="rows must be an array that torch can share memory with"):
        ops.info_nce(X, X, rows=np.array(["a"]))
    with pytest.raises(ValueError, match="hyperedge_index must have no negative strides"):
        Hypergraph(random_index(9, 5, 30).numpy()[:, ::-1])


@pytest.mark.gpu
@cases
def test_operators_take_cupy_arrays(call, inputs, monkeypatch):
    cupy = pytest.importorskip("cupy")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, torch sees none")
    monkeypatch.setitem(globals(), "GRAPH", GRAPH.to("cuda"))
    on_gpu = [x.cuda() for x in inputs]
    with ops.backend("torch"):
        check(lambda x: cupy.from_dlpack(x), call, on_gpu)
    array = cupy.zeros((3, 2), cupy.float32)
    assert as_tensor("x", array).data_ptr() == array.data.ptr
    with pytest.raises(ValueError, match="hypergraph must be on cpu like x, got cuda:0"):
        ops.hypergraph_conv(X, GRAPH)
