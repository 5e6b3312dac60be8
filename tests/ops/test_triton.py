"""The Triton backend without a GPU: the interpreter, compiled code, launcher arguments and what is said when it cannot
run."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import rows

from hellm import ops
from hellm.ops import backends
from hellm.ops.backends import loaders

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
without_slow = pytest.mark.skipif(not os.environ.get("HELLM_SLOW"), reason="takes minutes; set HELLM_SLOW=1")
SLOW = [pytest.mark.slow, without_slow]


@needs_triton
def test_kernels_match_the_definitions_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"]
    command.append(str(Path(__file__).with_name("interpreted_triton.py")))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^\d{2,} passed in", done.stdout, re.MULTILINE), done.stdout[-2000:]


# -------------------------------------------------------------------------------------------------- launchers

# Tensors carry their sizes and dtype; Triton takes all three precisions by name.
NOT_PASSED = {"rows", "dim", "num_keys", "num_rows", "num_vertices", "num_hyperedges", "num_users", "num_items"}
NOT_PASSED |= {"dtype", "num_threads", "highest_precision", "bfloat16_products"}


def header_fields(op: str) -> list[str]:
    """Fields of <Op>Arguments in csrc that every device reads (those without a default), in order."""
    struct = "".join(part.capitalize() for part in op.split("_")) + "Arguments"
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "csrc").glob("*.h")))
    body = re.sub(r"//[^\n]*", "", re.search(rf"struct {struct} {{(.*?)}};", text, re.DOTALL)[1])
    names = []
    for line in filter(None, (line.strip() for line in body.split(";"))):
        if "=" in line:
            continue
        kind, declared = re.fullmatch(r"((?:const )?\w+)\s*(.*)", line, re.DOTALL).groups()
        for name in re.findall(r"\w+", declared):
            is_size = kind == "int64_t" and name in NOT_PASSED
            if kind == "Csr":
                names += [f"{name}_{part}" for part in ("indptr", "indices", "values")]
            elif not is_size and (name not in NOT_PASSED or name == "rows"):
                names.append(name)
    return names


@needs_triton
@pytest.mark.parametrize(
    ("op", "module"),
    [
        ("incidence_product", "hypergraph_conv"),
        ("hypergraph_conv", "hypergraph_conv"),
        ("bipartite_propagate", "hypergraph_conv"),
        ("info_nce", "info_nce"),
        ("item_cross_entropy", "item_cross_entropy"),
    ],
)
def test_launchers_take_the_arguments_of_the_headers_in_order(op, module):
    launcher = getattr(getattr(loaders.triton(), module), op)
    taken = [name for name in inspect.signature(launcher).parameters if name != "precision"]
    assert [name for name in taken if not name.endswith("schedule")] == header_fields(op)


# ---------------------------------------------------------------------------------------------- compiled code


def softmax_passes():
    return sys.modules[loaders.triton().info_nce.__package__ + ".softmax_passes"]


def compiled(kernel, arch: int, pointers: dict[str, str | None], constants: dict[str, Any], **options):
    """A kernel compiled for an architecture; pointers and the integers that are specialised are divisible by 16.

    pointers: argument -> element type, None for an absent one; the remaining arguments are int32.
    """
    signature, values, hints = {}, dict(constants), {}
    for position, name in enumerate(kernel.arg_names):
        kind = pointers.get(name, "i32")
        if name in constants or kind is None:
            signature[name] = "constexpr"
            values.setdefault(name, None)
        else:
            signature[name] = f"*{kind}" if name in pointers else kind
            if not kernel.params[position].do_not_specialize:
                hints[(position,)] = [["tt.divisibility", 16]]
    return machine_code(arch, kernel, signature, values, hints, options)


def machine_code(arch: int, kernel, signature: dict, values: dict, hints: dict, options: dict):
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    return triton_compile(
        ASTSource(kernel, signature, values, hints), target=GPUTarget("cuda", arch, 32), options=options
    )


def dumped(binary: bytes, folder: Path, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def resource_usage(binary: bytes, folder: Path) -> dict[str, int]:
    """Registers and bytes of stack and local memory of a kernel."""
    found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dumped(binary, folder, "--dump-resource-usage"))
    return {name: int(value) for name, value in found}


def disassembled(binary: bytes, folder: Path) -> tuple[dict[str, int], str]:
    """Resources of a kernel, and its instructions."""
    return resource_usage(binary, folder), dumped(binary, folder, "-sass")


def assert_no_spills(resources: dict[str, int], instructions: str) -> None:
    assert resources["STACK"] == 0 and resources["LOCAL"] == 0, resources
    assert not re.findall(r"\b(?:LDL|STL)\b", instructions)


@needs_triton
@pytest.mark.parametrize("part", ["short", "long"])
@pytest.mark.parametrize(("arch", "dtype"), [(80, "fp32"), (90, "fp32"), (90, "bf16")])
def test_convolution_loads_16_bytes_at_a_time(part, arch, dtype, tmp_path):
    import triton.language as tl

    module = loaders.triton().hypergraph_conv
    pointers = dict.fromkeys(("self_scale", "diagonal", "in_scale", "out_scale", "partial"), "fp32")
    pointers |= {"x": dtype, "self_x": dtype, "out": dtype, "indptr": "i64", "indices": "i32", "values": None}
    pointers |= dict.fromkeys(("row_order", "hub_chunk_begin"), "i32")
    sizes = module.block_sizes(64)
    constants = {"A": tl.float32, "BLOCK_DIM": sizes["BLOCK_DIM"]}
    if part == "short":
        # Four neighbours in flight for each eight rows of 64 columns over 64 threads.
        constants |= {name: sizes[name] for name in ("BLOCK_ROWS", "UNROLL")}
        loads = 8
    else:
        constants |= {"LONG": sizes["LONG"], "CHUNK": module.HUB_CHUNK}
        loads = 8
    kernel = compiled(getattr(module, f"{part}_kernel"), arch, pointers, constants, num_warps=2)
    resources, instructions = disassembled(kernel.asm["cubin"], tmp_path)
    assert_no_spills(resources, instructions)
    assert resources["REG"] <= 128
    assert len(re.findall(r"LDG\.E\.128", instructions)) >= loads // (1 if dtype == "fp32" else 2)


@needs_triton
@pytest.mark.parametrize("part", ["rows", "keys"])
@pytest.mark.parametrize(
    ("arch", "parts", "width"), [(80, 1, 64), (90, 1, 64), (90, 2, 64), pytest.param(90, 1, 256, marks=SLOW)]
)
def test_softmax_passes_use_tensor_cores(arch, parts, width, part, tmp_path):
    module = softmax_passes()
    sizes = module.tile_sizes(width, parts)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"SPLITS": 2, "PARTS": parts, "DIM": width, **sizes}
    pointers = {"query": "fp16", "keys": "fp16", "own": None, "bias": None, "scale": "fp32"}
    if part == "rows":
        constants["VIEWS"] = 2
        pointers |= dict.fromkeys(("top_out", "total_out", "mean_out"), "fp32")
    else:
        constants["OWN"] = False
        pointers |= dict.fromkeys(("lse", "weight", "weight_top", "gradient_out"), "fp32") | {"total_out": None}
    kernel = compiled(getattr(module, f"softmax_{part}_kernel"), arch, pointers, constants, **options)
    resources, instructions = disassembled(kernel.asm["cubin"], tmp_path)
    assert_no_spills(resources, instructions)
    assert kernel.metadata.shared <= 99 * 1024
    assert len(re.findall(r"\bHGMMA\b" if arch == 90 else r"\bHMMA\b", instructions)) >= 16
    # Loads of the next tiles go past the registers.
    assert "LDGSTS" in instructions


ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
ELEMENTS |= {torch.int32: "i32", torch.int64: "i64"}
# More than a block of rows and tiles for every split.
MANY = 4096


def launched(call: Callable[[], None]) -> list[tuple]:
    """What the launches of `call` have Triton compile, each once: kernel, signature, values, hints and options.

    Nothing runs: tensors may hold anything. Arguments are specialised as at a launch: an int of 1 is a constant.
    """
    from triton import JITFunction

    found = {}

    def run(kernel, *args, grid, warmup, **named):
        options = {name: named.pop(name) for name in list(named) if name not in kernel.arg_names}
        named |= dict(zip(kernel.arg_names, args, strict=False))
        signature, values, hints = {}, {}, {}
        for position, parameter in enumerate(kernel.params):
            name, value = parameter.name, named[parameter.name]
            specialised = not parameter.do_not_specialize
            is_tensor = isinstance(value, torch.Tensor)
            if parameter.is_constexpr or value is None or (not is_tensor and value == 1 and specialised):
                signature[name], values[name] = "constexpr", value
                continue
            signature[name] = f"*{ELEMENTS[value.dtype]}" if is_tensor else "i32"
            if specialised and (value.data_ptr() if is_tensor else value) % 16 == 0:
                hints[(position,)] = [["tt.divisibility", 16]]
        key = str((kernel.__name__, signature, values, hints, options))
        found.setdefault(key, (kernel, signature, values, hints, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        call()
    return list(found.values())


def launch_convolutions(
    dim: int,
    dtype: torch.dtype,
    *,
    num_rows: int = MANY,
    num_long: int = 5,
    num_hubs: int = 2,
    num_chunks: int = 7,
    plain: bool = False,
) -> None:
    """Short rows, long rows and hubs, with everything that goes into a row and, if `plain`, with nothing."""
    module = loaders.triton().hypergraph_conv
    x = torch.empty(num_rows, dim, dtype=dtype)
    scale = torch.empty(num_rows, dtype=torch.promote_types(dtype, torch.float32))
    workspace = scale.new_empty(4 * num_rows, dim)
    csr = torch.empty(num_rows + 1, dtype=torch.int64), torch.empty(num_rows, dtype=torch.int32), scale
    hub_chunk_begin = torch.empty(num_hubs + 1, dtype=torch.int32)
    schedule = torch.empty(num_rows, dtype=torch.int32), hub_chunk_begin, num_long, num_chunks
    module.hypergraph_conv(x, *csr, *csr, *[scale] * 4, x, workspace, 1, schedule, schedule)
    if plain:
        csr = (*csr[:2], None)
        module.incidence_product(x, *csr, x, schedule)
        module.bipartite_propagate(x, x, *csr, *csr, scale, scale, x, x, workspace, 2, schedule, schedule)


def launch_info_nce(
    dim: int, dtype: torch.dtype, precision: str, *, num_keys: int = MANY, chosen: bool = False, views: int = 2
) -> None:
    x = torch.empty(num_keys, dim, dtype=dtype)
    rows = torch.zeros(num_keys, dtype=torch.int64) if chosen else None
    gradients = [torch.empty(num_keys), torch.empty(num_keys), x, x, torch.empty(num_keys)]
    loaders.triton().info_nce.info_nce(x, x, rows, *gradients, torch.ones(1), views == 2, precision)


def launch_item_cross_entropy(
    dim: int, dtype: torch.dtype, precision: str, *, num_items: int = MANY, num_rows: int = MANY, bias: bool = True
) -> None:
    hidden, items = torch.zeros(num_rows, dim, dtype=dtype), torch.zeros(num_items, dim, dtype=dtype)
    target, row = torch.zeros(num_rows, dtype=torch.int64), torch.empty(num_rows)
    of_items = torch.empty(num_items) if bias else None
    loaders.triton().item_cross_entropy.item_cross_entropy(
        hidden, items, target, of_items, row, row, hidden, items, of_items, precision
    )


def slow(name: str, call: Callable[[], None]):
    return pytest.param(call, id=name, marks=SLOW)


FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
LAUNCHES = [
    pytest.param(lambda: launch_convolutions(64, FP32), id="conv-64"),
    pytest.param(lambda: launch_info_nce(64, FP32, "high", chosen=True), id="info-nce-64-rows"),
    pytest.param(lambda: launch_info_nce(256, FP32, "high"), id="info-nce-256"),
    pytest.param(lambda: launch_item_cross_entropy(1, FP16, "high", num_items=1, num_rows=1), id="cross-entropy-one"),
    slow("conv-1", lambda: launch_convolutions(1, FP32)),
    slow("conv-256", lambda: launch_convolutions(256, FP32)),
    slow("conv-64-plain", lambda: launch_convolutions(64, FP32, plain=True)),
    slow("conv-100-bf16", lambda: launch_convolutions(100, BF16)),
    slow("conv-64-fp64", lambda: launch_convolutions(64, FP64)),
    slow("info-nce-64", lambda: launch_info_nce(64, FP32, "highest")),
    slow("info-nce-128-rows", lambda: launch_info_nce(128, FP32, "highest", chosen=True)),
    slow("info-nce-256-rows", lambda: launch_info_nce(256, BF16, "medium", chosen=True, views=1)),
    slow("info-nce-one", lambda: launch_info_nce(1, FP32, "high", num_keys=1)),
    slow("cross-entropy-64", lambda: launch_item_cross_entropy(64, FP32, "highest")),
    slow("cross-entropy-128", lambda: launch_item_cross_entropy(128, FP32, "highest", bias=False)),
    slow("cross-entropy-256", lambda: launch_item_cross_entropy(256, BF16, "high")),
]


@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("call", LAUNCHES)
def test_launches_compile_without_spills(call, arch, tmp_path):
    for kernel, *source in launched(call):
        binary = machine_code(arch, kernel, *source)
        resources = resource_usage(binary.asm["cubin"], tmp_path)
        assert resources["STACK"] == 0 and resources["LOCAL"] == 0, (kernel.__name__, resources)
        assert binary.metadata.shared <= 99 * 1024, kernel.__name__


@needs_triton
def test_every_kernel_is_among_the_launches_that_are_compiled():
    from triton import JITFunction

    package = loaders.triton()
    kernels = {
        name
        for module in (package.hypergraph_conv, package.info_nce, package.item_cross_entropy, softmax_passes())
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    taken = {kernel.__name__ for param in LAUNCHES if not param.marks for kernel, *_ in launched(param.values[0])}
    assert taken == kernels


@needs_triton
@pytest.mark.parametrize(
    ("launch", "settings", "sizes", "others"),
    [
        (
            launch_convolutions,
            (64, FP32),
            {"num_rows": 4096, "num_long": 32, "num_hubs": 16, "num_chunks": 48},
            {"num_rows": 4093, "num_long": 3, "num_hubs": 1, "num_chunks": 2},
        ),
        (launch_info_nce, (64, FP32, "highest"), {"num_keys": 4096}, {"num_keys": 4093}),
        (
            launch_item_cross_entropy,
            (64, FP32, "high"),
            {"num_rows": 4096, "num_items": 4096},
            {"num_rows": 4093, "num_items": 4091},
        ),
    ],
)
def test_other_sizes_of_a_batch_do_not_compile_anew(launch, settings, sizes, others):
    def sources(sizes):
        return {(kernel.__name__, str(source)) for kernel, *source in launched(lambda: launch(*settings, **sizes))}

    assert sources(sizes) == sources(others)


# ------------------------------------------------------------------------------------------ choice and messages


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_triton_on_the_cpu_says_what_it_needs():
    message = "backend 'triton' cannot run on cpu: Triton needs a GPU; .*TRITON_INTERPRET=1.*; see `hellm info`"
    with ops.backend("triton"), pytest.raises(RuntimeError, match=message):
        ops.knn(rows(4, 2), 2)


def test_triton_that_cannot_be_imported_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    loaders.triton.cache_clear()
    try:
        assert "Triton cannot be loaded: " in backends.BACKENDS["triton"].unavailable(torch.device("cuda"))
    finally:
        monkeypatch.undo()
        loaders.triton.cache_clear()


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(loaders, "triton", lambda: pytest)
    monkeypatch.setattr(loaders, "architecture", lambda device: "sm_75")
    message = "the kernels need compute capability sm_80 or newer, cuda:0 has sm_75"
    assert backends.BACKENDS["triton"].unavailable(torch.device("cuda:0")) == message
