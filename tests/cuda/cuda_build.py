"""Compiling the device code without a GPU: by nvcc, by NVRTC, and by the host compiler for the emulated GPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from op_cases import Direct

from hellm.ops.backends import loaders
from hellm.ops.backends import nvrtc as nvrtc_backend
from hellm.ops.backends.gpu import Gpu

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CUDA = CSRC / "cuda"
ARCHITECTURES = ("80", "90a", "120")
# Of each operator's kernels, as nvcc and NVRTC take them.
DEVICE_CODE = sorted(f"{path.stem}.cuh" for path in CSRC.glob("*.cpp") if path.stem != "bindings")
SOURCES = (*DEVICE_CODE, "launch.cu")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _cached(name: str, suffix: str, text: list[Path], command: list[str]) -> tuple[Path, str]:
    """What a compiler made of some files, and what it said; kept in the temporary folder until the text changes."""
    digest = hashlib.sha256(repr(command).encode())
    for path in text:
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / "hellm-test-builds"
    folder.mkdir(exist_ok=True)
    made = folder / f"{name}-{digest.hexdigest()[:16]}{suffix}"
    said = made.with_suffix(".log")
    if not (made.is_file() and said.is_file()):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            output = Path(temporary) / made.name
            done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True, cwd=HERE)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
            said.write_text(done.stdout + done.stderr, encoding="utf-8")
            output.replace(made)
    return made, said.read_text(encoding="utf-8")


def compile_cuda(source: str) -> tuple[Path, str]:
    """Object of one .cu, or of the kernels of one .cuh, for all architectures, and the report of the assembler.

    Warnings are errors.
    """
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = [NVCC, "-std=c++17", "-O3", "--threads", "3", "-Werror", "all-warnings", "-Xptxas", "-v", *targets]
    unit = "kernels.cu" if source.endswith(".cuh") else source
    command += ['-DHELLM_CUDA_ARCHITECTURES="tests"', f'-DHELLM_DEVICE_CODE="{source}"', "-c", str(CUDA / unit)]
    text = [*sorted(CUDA.glob("*.cu*")), *sorted(CUDA.glob("*.h")), *sorted(CSRC.glob("*.h"))]
    return _cached(Path(source).stem, ".o", text, command)


def disassembler() -> str | None:
    """cuobjdump of the CUDA toolkit or of Triton."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None:
        candidate = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(candidate) if candidate.is_file() else None
    return found


def resources(report: str) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) -> registers, stack bytes, spill bytes, from `ptxas -v`."""
    found, key = {}, None
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            key = match.groups()
            found[key] = {}
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if key is not None:
                found[key] |= {"stack": int(match[1]), "spills": int(match[2]) + int(match[3])}
        elif key is not None and (match := re.search(r"Used (\d+) registers", line)):
            found[key]["registers"] = int(match[1])
    return found


def instructions(object_file: Path) -> dict[tuple[str, str], str]:
    """(kernel, architecture) -> disassembly."""
    done = subprocess.run([disassembler(), "-sass", str(object_file)], capture_output=True, text=True, check=True)
    found: dict[tuple[str, str], str] = {}
    architecture = ""
    for part in re.split(r"(?=^\s*Function : |^arch = )", done.stdout, flags=re.MULTILINE):
        if match := re.match(r"arch = sm_(\w+)", part):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\w+)", part):
            found[match[1], architecture] = part
    return found


@functools.cache
def nvrtc() -> ctypes.CDLL | None:
    """NVRTC of the package nvidia-cuda-nvrtc, in nvidia/cu13, or of nvidia-cuda-nvrtc-cu12, in nvidia/cuda_nvrtc."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for library in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            # NVRTC opens it by name alone, which finds it once it is loaded.
            for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(library))
    return None


def compile_nvrtc(file: str, names: list[str], architecture: str) -> None:
    """Kernels of one .cuh as at first use: machine code for sm_<n>, PTX for compute_<n>."""
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    text = nvrtc_backend.source(file).encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), text, file.encode(), 0, None, None) == 0
    for name in names:
        assert library.nvrtcAddNameExpression(program, name.encode()) == 0
    options = [option.encode() for option in (*nvrtc_backend.OPTIONS, f"--gpu-architecture={architecture}")]
    status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    said = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, said)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    errors = [line for line in said.value.decode().splitlines() if "error" in line]
    assert status == 0, f"NVRTC error {status}: {errors[:5]}"


def extension_with_plans():
    """The compiled extension; skips the test where it is not there."""
    extension = loaders.native()
    if isinstance(extension, ImportError) or not hasattr(extension, "plan_knn_select"):
        pytest.skip(f"needs the launch plans of the compiled extension: {extension}")
    return extension


def planner(launches: list[tuple[str, tuple[int, int, int]]], **settings) -> Direct:
    """Runs nothing: notes the kernel and the grid of every launch."""
    extension = extension_with_plans()

    def launch(name, arguments, device):
        launches.extend(plan[:2] for plan in getattr(extension, f"plan_{name}")(*arguments))

    return Direct(Gpu(launch, lambda device: 2, **settings))


@functools.cache
def emulated_library() -> ctypes.CDLL:
    """The kernels' own text for the CPU, by `launch`; `set_accumulator_bits` of the emulated tensor cores.

    `set_order` takes the seed of the order of threads and blocks, or 0 for the order of their numbers.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler, found neither g++ nor c++")
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-include", "emulated_gpu.h"]
    # Its checks take a jump to another stack for an error.
    command += ["-U_FORTIFY_SOURCE"]
    command += [part for file in DEVICE_CODE for part in ("-include", str(CUDA / file))] + ["emulated_gpu.cpp"]
    text = [HERE / "emulated_gpu.h", HERE / "emulated_gpu.cpp", *sorted(CUDA.glob("*.cuh"))]
    return ctypes.CDLL(str(_cached("emulated", ".so", text, command)[0]))


def emulated_gpu() -> Direct:
    """That library on CPU tensors, driven by the extension's launch plans, as a GPU of two processors."""
    extension = extension_with_plans()
    library = emulated_library()

    def launch(name, arguments, device):
        for kernel, grid, threads, shared_bytes, parameters in getattr(extension, f"plan_{name}")(*arguments):
            assert grid[2] == 1
            status = library.launch(kernel.encode(), grid[0], grid[1], threads, shared_bytes, parameters)
            assert status == 0, f"no kernel {kernel}"

    return Direct(Gpu(launch, lambda device: 2, lambda device: 228 * 1024))


def of_processors(gpu: Direct, count: int) -> Direct:
    """The same as a GPU of `count` processors with 100 KiB of shared memory each."""
    return Direct(Gpu(gpu._launch, lambda device: count, lambda device: 100 * 1024))


def in_two_orders(set_order, call, *arguments) -> list[tuple]:
    """Results with the threads in the order of their numbers, which would hide a wait that is missing, and shuffled."""
    results = []
    for seed in (0, 1):
        set_order(seed)
        found = call(*arguments)
        results.append(found if isinstance(found, tuple) else (found,))
    return results
