"""Build hellm._C in the checkout with g++ and nvcc alone: no network, no cmake, kernels for the GPU at hand only."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
_CSRC = ROOT / "csrc"
# As in CMakeLists.txt.
_INSTRUCTION_SETS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
_HOST = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp"]


def build(capability: tuple[int, int]) -> Path:
    """Compile everything side by side and put the module into hellm/.

    Raises:
        RuntimeError: a tool is missing, or a compiler refused (with what it said).
    """
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise RuntimeError("nvcc must be in PATH or /usr/local/cuda/bin")
    # torch carries pybind11's headers.
    includes = [f"-I{sysconfig.get_paths()['include']}", f"-I{Path(torch.__file__).parent / 'include'}"]
    architecture = "{}{}".format(*capability)
    operators = sorted(path.stem for path in _CSRC.glob("*.cpp") if path.stem != "bindings")
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for name, flags in _INSTRUCTION_SETS.items():
            for operator in operators:
                source = _CSRC / "cpu" / f"{operator}.cpp"
                jobs.append(["g++", *_HOST, "-ffp-contract=fast", "-fno-math-errno", *flags, f"-DHELLM_ISA={name}"])
                jobs[-1] += ["-c", str(source), "-o", f"{folder}/{name}-{operator}.o"]
        shared = [_CSRC / "cpu" / f"{name}.cpp" for name in ("dispatch", "interruption")]
        for source in (*sorted(_CSRC.glob("*.cpp")), *shared):
            jobs.append(["g++", *_HOST, "-DHELLM_X86", "-DHELLM_CUDA", *includes, "-c", str(source)])
            jobs[-1] += ["-o", f"{folder}/host-{source.stem}.o"]
        for operator in (None, *operators):
            source = _CSRC / "cuda" / ("launch.cu" if operator is None else "kernels.cu")
            target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
            jobs.append([nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", target])
            jobs[-1] += [f'-DHELLM_CUDA_ARCHITECTURES="{architecture}"', f'-DHELLM_DEVICE_CODE="{operator}.cuh"']
            jobs[-1] += ["-c", str(source), "-o", f"{folder}/cuda-{operator or source.stem}.o"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, jobs))
        made = Path(folder) / "_C.so"
        objects = sorted(str(path) for path in Path(folder).glob("*.o"))
        _run([nvcc, "-shared", "-Xcompiler", "-fopenmp", "-cudart", "static", *objects, "-o", str(made)])
        target = ROOT / "hellm" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        shutil.copy(made, target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)
    importlib.invalidate_caches()
    return target


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
