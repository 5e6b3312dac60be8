"""The Triton backend without a GPU: the interpreter, compiled code, launcher arguments and what is said when it cannot
run."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from op_cases import rows

from hellm import ops
from hellm.ops import _backends

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


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
NOT_PASSED |= {"dtype", "num_threads", "highest_precision"}


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
    launcher = getattr(getattr(_backends.triton(), module), op)
    taken = [name for name in inspect.signature(launcher).parameters if name != "precision"]
    assert [name for name in taken if not name.endswith("schedule")] == header_fields(op)


# ---------------------------------------------------------------------------------------------- compiled code


def compiled(kernel, arch: int, pointers: dict[str, str | None], constants: dict[str, Any], **options):
    """Resources and opcode counts of a kernel compiled for an architecture, integers divisible by 16.

    pointers: argument -> element type, None for an absent one; the remaining arguments are int32.
    """
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, values, hints = {}, dict(constants), {}
    for position, name in enumerate(kernel.arg_names):
        kind = pointers.get(name, "i32")
        if name in constants or kind is None:
            signature[name] = "constexpr"
            values.setdefault(name, None)
        else:
            signature[name] = f"*{kind}" if name in pointers else kind
            if name not in ("num_rows", "num_keys"):
                hints[(position,)] = [["tt.divisibility", 16]]
    return triton_compile(
        ASTSource(kernel, signature, values, hints), target=GPUTarget("cuda", arch, 32), options=options
    )


def disassembled(binary: bytes, folder: Path) -> tuple[dict[str, int], str]:
    """Registers and bytes of stack and local memory of a kernel, and its instructions."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(binary)

    def run(option: str) -> str:
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout

    resources = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run("--dump-resource-usage")))
    return {name: int(value) for name, value in resources.items()}, run("-sass")


def assert_no_spills(resources: dict[str, int], instructions: str) -> None:
    assert resources["STACK"] == 0 and resources["LOCAL"] == 0, resources
    assert not re.findall(r"\b(?:LDL|STL)\b", instructions)


@needs_triton
@pytest.mark.parametrize("part", ["short", "long"])
@pytest.mark.parametrize(("arch", "dtype"), [(80, "fp32"), (90, "fp32"), (90, "bf16")])
def test_convolution_loads_16_bytes_at_a_time(part, arch, dtype, tmp_path):
    import triton.language as tl

    module = _backends.triton().hypergraph_conv
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
@pytest.mark.parametrize(("arch", "parts"), [(80, 1), (90, 1), (90, 2)])
def test_softmax_passes_use_tensor_cores(arch, parts, part, tmp_path):
    module = sys.modules[_backends.triton().info_nce.__package__ + ".softmax_passes"]
    sizes = module.tile_sizes(64, parts)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"SPLITS": 2, "PARTS": parts, "DIM": 64, **sizes}
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


# ------------------------------------------------------------------------------------------ choice and messages


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_triton_on_the_cpu_says_what_it_needs():
    message = "backend 'triton' cannot run on cpu: Triton needs a GPU; .*TRITON_INTERPRET=1.*; see `hellm info`"
    with ops.backend("triton"), pytest.raises(RuntimeError, match=message):
        ops.knn(rows(4, 2), 2)


def test_triton_that_cannot_be_imported_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    _backends.triton.cache_clear()
    try:
        assert "Triton cannot be loaded: " in _backends.unusable("triton", "cuda")
    finally:
        monkeypatch.undo()
        _backends.triton.cache_clear()


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(_backends, "triton", lambda: pytest)
    monkeypatch.setattr(_backends, "architecture", lambda device: "sm_75")
    message = "the kernels need compute capability sm_80 or newer, cuda:0 has sm_75"
    assert _backends.unusable("triton", "cuda:0") == message
