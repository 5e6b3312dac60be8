"""Imports point one way, and importing the package stays cheap."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hellm"
# Left to right: a module imports its own layer and the layers before it.
LAYERS = [
    {"_C", "_arrays", "_devices", "_files", "_folders", "_mapped", "_pretrained", "_rows", "kernels"},
    {"config", "engines"},
    {"data"},
    {"artifact"},
    {"ops"},
    {"_degrees", "_interchange", "hypergraph", "neighbours"},
    {"graphs", "nn", "losses", "models", "sampled", "selftest"},
    {"training", "evaluate", "baselines", "features"},
    {"recommend", "info"},
    {"pipeline", "export", "serve"},
    {"plan", "upkeep"},
    {"cli", "__main__"},
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
FORBIDDEN = {"evaluate": {"training", "models"}, "baselines": {"training", "models"}}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """Absolute dotted names that a file imports anywhere, type-checking blocks and function bodies included."""
    names: set[str] = set()
    parts = ("hellm", *path.relative_to(PACKAGE).with_suffix("").parts) if PACKAGE in path.parents else (path.stem,)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*parts[: -node.level], node.module or ""]).strip(".") if node.level else node.module
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def imported_layers(path: Path) -> set[str]:
    found = {name.split(".")[1] for name in imported_names(path) if name.startswith("hellm.")}
    return found & (RANK.keys() | {p.stem for p in PACKAGE.iterdir()})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path):
    own = layer_of(path)
    assert own in RANK, f"hellm.{own} has no place in LAYERS"
    for other in imported_layers(path):
        assert other in RANK, f"hellm.{other} has no place in LAYERS"
        assert RANK[other] <= RANK[own], f"{path.name} imports hellm.{other}, which is later"
        assert other not in FORBIDDEN.get(own, set()), f"{path.name} must not import hellm.{other}"


def test_imported_names_sees_every_form(tmp_path):
    source = "import hellm.cli\nfrom hellm import ops\ndef f():\n    from hellm.data import IdMap\n"
    path = tmp_path / "module.py"
    path.write_text(source)
    assert imported_names(path) == {"hellm.cli", "hellm.ops", "hellm.data.IdMap"}
    assert imported_layers(path) == {"cli", "ops", "data"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda path: path.name)
def test_ops_need_only_torch(path: Path):
    roots = {name.split(".")[0] for name in imported_names(path)}
    optional = {"cupy"} if path.name == "nvrtc.py" else set()
    assert roots <= set(sys.stdlib_module_names) | {"torch", "numpy", "hellm"} | optional
    assert imported_layers(path) <= {"ops", "_C", "_arrays"}


def modules_imported_at_once(path: Path) -> set[str]:
    """Modules of `hellm.ops` whose top level runs before that of `path`; a package stands for its `__init__`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hellm.ops"):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name for name in inside if name in OPS_MODULES} or {node.module}
    return found & OPS_MODULES.keys()


OPS_MODULES = {
    ".".join(("hellm", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in (PACKAGE / "ops").rglob("*.py")
}


def test_no_two_modules_of_the_operators_need_each_other():
    needs = {name: modules_imported_at_once(path) for name, path in OPS_MODULES.items()}
    assert needs["hellm.ops.backends.nvrtc"] >= {"hellm.ops.backends.gpu", "hellm.ops.backends.loaders"}
    graphlib.TopologicalSorter(needs).prepare()


def test_kernels_never_import_the_package():
    for path in sorted((ROOT / "kernels").rglob("*.py")) if (ROOT / "kernels").is_dir() else []:
        assert not [name for name in imported_names(path) if name.split(".")[0] == "hellm"], path.name


def test_the_package_itself_imports_nothing_of_its_own_at_once():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    immediate = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [node for node in immediate if (getattr(node, "module", None) or "").startswith("hellm")]


def _run(code: str):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def test_import_takes_under_a_second():
    # The best of three: another process may have the machine.
    code = "import json, time; t = time.perf_counter(); import hellm; print(json.dumps(time.perf_counter() - t))"
    assert min(_run(code) for _ in range(3)) < 1.0


def test_import_of_the_operators_brings_no_compiler():
    code = "import json, sys, hellm.ops; print(json.dumps(sorted(m for m in sys.modules if m.startswith('torch._'))))"
    assert {"torch._dynamo", "torch._inductor"} & set(_run(code)) == set()


def test_import_brings_no_optional_package():
    code = "import json, sys, hellm, hellm.ops; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    heavy = {"polars", "pandas", "matplotlib", "implicit", "tensorboard", "PIL", "transformers", "scipy", "sklearn"}
    assert heavy & set(_run(code)) == set()


def test_ray_is_imported_only_when_it_is_asked_for():
    imports = "hellm.cli.batch, hellm.cli.features, hellm.features.dataset, hellm.recommend.batch"
    assert not _run(f"import json, sys, {imports}; print(json.dumps('ray' in sys.modules))")
