"""The device code without a GPU: it compiles for every architecture, keeps to registers, uses wide instructions."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import cuda_build
import pytest
import torch

from hellm.ops import backends, incidence
from hellm.ops.backends import gpu, loaders, nvrtc

needs_nvcc = pytest.mark.skipif(cuda_build.NVCC is None, reason="needs nvcc, which is not in PATH")
HOT = re.compile(
    r"attention_kernel|gather_kernel|hub_store_kernel|pack_kernel|info_nce_\w+_kernel|normalize_kernel"
    r"|table_\w+_kernel|item_\w+_kernel|knn_\w+_kernel"
)


@needs_nvcc
@pytest.mark.parametrize("source", cuda_build.SOURCES)
def test_compiles_without_warnings_spills_or_stack(source):
    report = cuda_build.resources(cuda_build.compile_cuda(source)[1])
    assert report or source == "launch.cu"
    for (kernel, architecture), used in report.items():
        assert HOT.search(kernel)
        assert used["spills"] == 0, f"{kernel} spills on sm_{architecture}"
        assert used["stack"] == 0, f"{kernel} has a stack frame on sm_{architecture}"
        # Two blocks of 128 threads a processor, as the plan counts on.
        assert used["registers"] * 128 * 2 <= 65536


@needs_nvcc
@pytest.mark.skipif(cuda_build.disassembler() is None, reason="needs cuobjdump, of the CUDA toolkit or of Triton")
@pytest.mark.parametrize("source", ["info_nce.cuh", "item_cross_entropy.cuh", "knn.cuh"])
def test_attention_uses_tensor_cores_and_wide_copies(source):
    attention = {
        key: text
        for key, text in cuda_build.instructions(cuda_build.compile_cuda(source)[0]).items()
        if re.search("attention_kernel|knn_scan_kernel", key[0])
    }
    assert {architecture for _, architecture in attention} == set(cuda_build.ARCHITECTURES)
    for key, text in attention.items():
        assert "HMMA.16816.F32" in text, f"no tensor-core product in {key}"
        assert "LDSM.16.M88.4" in text or "LDSM.16.MT88.4" in text, f"no matrix load in {key}"
        assert re.search(r"LDGSTS\.E\.(BYPASS\.)?(LTC\w+\.)?128", text), f"no 16-byte copy to shared memory in {key}"
        assert not re.search(r"\b(LDL|STL)\b", text), f"local memory in {key}"


@needs_nvcc
@pytest.mark.skipif(cuda_build.disassembler() is None, reason="needs cuobjdump, of the CUDA toolkit or of Triton")
def test_gathers_and_selection_use_wide_loads():
    gathers = cuda_build.instructions(cuda_build.compile_cuda("hypergraph_conv.cuh")[0])
    wide = {key: text for key, text in gathers.items() if re.search(r"13gather_kernel\w+Li[248]E", key[0])}
    assert len(wide) == 4 * len(cuda_build.ARCHITECTURES)
    for key, text in wide.items():
        # A batch of four rows is on its way at once.
        assert len(re.findall(r"LDG\.E\.(LTC\w+\.)?128", text)) >= 4, f"too few 16-byte loads in {key}"
    selections = cuda_build.instructions(cuda_build.compile_cuda("knn.cuh")[0])
    for key, text in selections.items():
        if "knn_select_kernel" in key[0]:
            assert len(re.findall(r"LDG\.E\.(LTC\w+\.)?128", text)) >= 2, f"too few 16-byte loads in {key}"


@pytest.mark.parametrize("path", sorted(cuda_build.CUDA.glob("*.cuh")), ids=lambda path: path.name)
def test_device_code_needs_no_host_header(path: Path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^\s*#\s*include\s*(.*)$", text, re.MULTILINE) == re.findall(
        r'^#include ("\w+\.cuh")$', text, re.M
    )
    assert not re.search(r"\bstd::|\bINFINITY\b|\bNAN\b|\bu?int\d+_t\b|\bsize_t\b|\bprintf\b", text)


def test_every_launch_plan_has_a_file_for_nvrtc():
    plans = [name.removeprefix("plan_") for name in dir(cuda_build.extension_with_plans()) if name.startswith("plan_")]
    device_code = cuda_build.extension_with_plans().device_code
    assert {*plans} == {*device_code} and {*device_code.values()} == {*cuda_build.DEVICE_CODE}


@pytest.mark.parametrize("file", cuda_build.DEVICE_CODE)
def test_the_source_for_nvrtc_is_whole(file):
    text = nvrtc.source(file)
    assert "#include" not in text and "#pragma once" not in text
    for name in ("struct AttentionParameters", "void multiply_16x8x16(", "A warp_sum("):
        assert text.count(name) == 1


def kernel_names() -> dict[str, list[str]]:
    """The kernels nvcc compiles, by file of device code."""
    return {
        file: re.findall(r"HELLM_KERNEL\(([^()]*)\)", (cuda_build.CUDA / file).read_text(encoding="utf-8"))
        for file in cuda_build.DEVICE_CODE
    }


needs_nvrtc = pytest.mark.skipif(cuda_build.nvrtc() is None, reason="needs the package nvidia-cuda-nvrtc")


# PTX, as machine code takes minutes; those of width 128 differ from the others in nothing but numbers.
@needs_nvrtc
@pytest.mark.parametrize("file", cuda_build.DEVICE_CODE)
def test_nvrtc_compiles_the_device_code(file):
    names = kernel_names()[file]
    chosen = [name for name in names if "<128" not in name]
    assert {name.partition("<")[0] for name in chosen} == {name.partition("<")[0] for name in names}
    cuda_build.compile_nvrtc(file, chosen, "compute_90")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("HELLM_SLOW"), reason="takes minutes; set HELLM_SLOW=1")
@needs_nvrtc
@pytest.mark.parametrize("file", cuda_build.DEVICE_CODE)
def test_nvrtc_makes_machine_code_of_every_kernel(file):
    for name in kernel_names()[file]:
        cuda_build.compile_nvrtc(file, [name], "sm_90")


def test_constants_of_the_adapter_are_those_of_the_kernels():
    files = ("parameters.cuh", "hypergraph_conv.cuh", "knn.cuh")
    text = "".join((cuda_build.CUDA / file).read_text(encoding="utf-8") for file in files)
    constants = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", text)}
    assert [constants[name] for name in ("kLongRow", "kHubEntries", "kHubChunk")] == [
        incidence.LONG_ROW,
        incidence.HUB_ENTRIES,
        incidence.HUB_CHUNK,
    ]
    assert constants["kMostNeighbours"] == gpu.MOST_NEIGHBOURS
    assert constants["kMostScanned"] == gpu.MOST_SCANNED


# Read on GPUs only; everything else comes in the order of the CPU functions, which is that of the Triton launchers.
GPU_ONLY = {
    "row_order",
    "row_begin",
    "workspace",
    "schedule",
    "vertex_schedule",
    "edge_schedule",
    "slab_bytes",
    "highest_precision",
    "num_processors",
    "shared_bytes",
}
CPU_ONLY = {"bfloat16_products", "num_threads"}


@pytest.mark.parametrize(
    "name", ["incidence_product", "hypergraph_conv", "bipartite_propagate", "info_nce", "item_cross_entropy"]
)
def test_plans_take_their_arguments_in_the_order_of_the_cpu_functions(name):
    text = "".join(path.read_text(encoding="utf-8") for path in cuda_build.CSRC.glob("*.cpp"))
    found = re.findall(rf"^[\w:]+ {name}\((Address[^)]*)\)", text, re.MULTILINE)
    cpu, gpu = ([part.split()[-1] for part in parameters.split(",")] for parameters in found)
    assert cpu[-2:] == ["dtype", "num_threads"] and gpu[-1] == "dtype"
    ours = [parameter for parameter in gpu if parameter in cpu or parameter not in GPU_ONLY]
    assert ours == [parameter for parameter in cpu if parameter not in CPU_ONLY]


H100_SHARED_BYTES = 228 * 1024  # of a processor


def needs_plans() -> None:
    extension = loaders.native()
    if isinstance(extension, ImportError):
        pytest.skip(f"needs the compiled extension: {extension}")


def test_plans_refuse_what_no_gpu_takes():
    needs_plans()
    extension = loaders.native()
    with pytest.raises(ValueError, match="dim must be at most 128 on a GPU, got 200"):
        extension.info_nce_workspace(10, 10, 200, True, True, True, 132, H100_SHARED_BYTES, 0)
    with pytest.raises(ValueError, match="fewer than 2\\^31 rows, got 2147483648"):
        extension.info_nce_workspace(2**31, 10, 64, True, True, False, 132, H100_SHARED_BYTES, 0)
    with pytest.raises(ValueError, match="more than a GPU takes, for gather_kernel"):
        extension.plan_incidence_product(0, 0, 0, 0, 0, 0, (0, 0, 0, 0, 0), 2**40, 4, 0)
    with pytest.raises(ValueError, match="fewer than 2\\^31 rows and items, got 10 and 2147483648"):
        extension.item_cross_entropy_workspace(10, 2**31, 64, True, True, False, 132, H100_SHARED_BYTES, 0)
    with pytest.raises(ValueError, match="k of at most 128 and fewer than 2\\^31 rows on a GPU, got 129 and 500"):
        extension.plan_knn_crowded(0, 0, 0, 0, 0, 500, 8, 129, 0)
    with pytest.raises(ValueError, match="a scan finds at most 32 neighbours, got k 33"):
        extension.knn_scan_workspace(500, 8, 33, 132, H100_SHARED_BYTES, 0)
    with pytest.raises(ValueError, match="dim must be at most 256 on a GPU, got 257"):
        extension.knn_scan_workspace(500, 257, 3, 132, H100_SHARED_BYTES, 0)


@pytest.mark.parametrize("highest", [False, True])
@pytest.mark.parametrize("num_rows", [35_598, 100_000])
def test_losses_take_six_times_their_rows_at_most(num_rows, highest):
    """Beside their inputs: workspace, both gradients, row losses and slopes."""
    needs_plans()
    extension, gpu, table = loaders.native(), (132, H100_SHARED_BYTES), num_rows * 64 * 4
    workspace = extension.info_nce_workspace(num_rows, num_rows, 64, True, True, highest, *gpu, 0)
    assert workspace + 2 * table + 2 * 4 * num_rows <= 6 * table
    workspace = extension.item_cross_entropy_workspace(num_rows, num_rows, 64, True, True, highest, *gpu, 0)
    # The rows by their targets are two int64 lists.
    assert workspace + 2 * table + 4 * num_rows + 16 * num_rows <= 6 * table


# Blocks by shared memory (with a KiB for the driver each): 5, 4, 3 on an H100, of which registers leave 2; 2, 1, 1 with
# the 100 KiB of smaller GPUs. As many without gradients, so that a loss has the same bits.
@pytest.mark.parametrize(
    ("dim", "highest", "shared_bytes", "blocks"),
    [
        (64, False, H100_SHARED_BYTES, 2),
        (64, True, H100_SHARED_BYTES, 2),
        (128, True, H100_SHARED_BYTES, 2),
        (64, False, 100 * 1024, 2),
        (64, True, 100 * 1024, 1),
        (256, False, 100 * 1024, 1),
    ],
)
def test_as_many_blocks_as_run_at_the_same_time(dim, highest, shared_bytes, blocks):
    needs_plans()
    sizes = (100_000, 100_000, dim, 16)
    for grad in (0, 16):
        arguments = (16, 16, 0, 0, 0, grad, 16, grad, grad, 16, 16, *sizes, True, highest, 132, shared_bytes, 0)
        plan = loaders.native().plan_info_nce(*arguments)
        attention = [grid for kernel, grid, *_ in plan if kernel.startswith("attention_kernel")]
        assert attention == [(132 * blocks, 1, 1)] * (2 if grad else 1)


def test_offsets_beyond_32_bits_are_kept():
    needs_plans()
    num_rows = 2**31 - 1
    ((kernel, grid, threads, shared, parameters),) = loaders.native().plan_incidence_product(
        2**40, 32, 48, 0, 64, 0, (80, 96, 0, 0, 0), num_rows, 64, 0
    )
    assert kernel == "gather_kernel<float, float, 4>"
    assert grid == (2**31 // 16, 1, 1) and threads == 256 and shared == 0
    assert (2**40).to_bytes(8, "little") in parameters and num_rows.to_bytes(8, "little") in parameters


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_launch_without_a_driver_says_so():
    needs_plans()
    extension = loaders.native()
    if not extension.cuda_architectures():
        pytest.skip("needs an extension built with HELLM_CUDA=ON")
    with pytest.raises(RuntimeError, match=r"CUDA error \d+ at cudaSetDevice.*needs an NVIDIA driver"):
        extension.cuda_incidence_product(16, 32, 48, 0, 64, 0, (80, 96, 0, 0, 0), 1, 4, 0, 0, 0)


CHECK = """
#include "%s/launch.cu"
#include <cstdio>
#include <cstdlib>
int main(int count, char** status) {
  for (int i = 1; i < count; ++i) {
    try { hellm::cuda::check(cudaError_t(std::atoi(status[i])), "a kernel"); }
    catch (const std::runtime_error& error) { std::puts(error.what()); }
  }
}
"""


@needs_nvcc
def test_errors_that_a_newer_driver_mends_say_so(tmp_path):
    source, program = tmp_path / "check.cu", tmp_path / "check"
    source.write_text(CHECK % cuda_build.CUDA, encoding="utf-8")
    options = ["-std=c++17", '-DHELLM_CUDA_ARCHITECTURES="tests"', "-o", str(program)]
    subprocess.run([cuda_build.NVCC, *options, str(source)], check=True, capture_output=True)
    # Too old a driver, no device, PTX that is too new, mismatch with the driver's library, no forward compatibility.
    driver = ["35", "100", "222", "803", "804"]
    done = subprocess.run([program, *driver, "209", "1"], check=True, capture_output=True, text=True)
    *mended, no_image, other = done.stdout.splitlines()
    for status, line in zip(driver, mended, strict=True):
        assert re.search(rf"^CUDA error {status} at a kernel: .*needs an NVIDIA driver for CUDA \d+\.\d or newer", line)
    assert no_image.endswith("compiled for compute capability tests") and "driver" not in other


def test_a_launch_leaves_the_current_device_as_it_was(monkeypatch):
    current = [0]

    class Guard:
        def __init__(self, device):
            self.device = torch.device(device)

        def __enter__(self):
            self.before, current[0] = current[0], self.device.index

        def __exit__(self, *_):
            current[0] = self.before

    def cuda_knn_unit(*arguments):
        launched.append(arguments)
        current[0] = arguments[-2]

    launched: list[tuple] = []
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(loaders, "native", lambda: SimpleNamespace(cuda_knn_unit=cuda_knn_unit))
    gpu.launch_compiled("knn_unit", (5,), torch.device("cuda", 1))
    assert launched == [(5, 1, 77)] and current == [0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["cuda", "nvrtc"])
def test_the_backends_say_why_they_cannot_run(name):
    assert "need an NVIDIA GPU" in backends.BACKENDS[name].unavailable(torch.device("cpu"))
    from hellm import ops

    with ops.backend(name), pytest.raises(RuntimeError, match=f"backend '{name}' cannot run on cpu"):
        ops.info_nce(torch.ones(3, 4), torch.ones(3, 4))
