"""README and documentation: what they show runs, parses, exists and is complete."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import jsonargparse
import pytest

from hellm.cli import VERBS, main

pytestmark = pytest.mark.usefixtures("same_threads")
ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """Folder with the runs that the pages speak of, on a small shop and hardly trained."""
    folder = tmp_path_factory.mktemp("docs")
    shop, run = folder / "demo" / "shop", folder / "demo" / "run"
    fast = ["--preset", "demo", "--num-threads", "1", "--tensorboard", "false", "--max-epochs", "1"]
    sizes = ["--num-users", "120", "--num-items", "80", "--num-groups", "4"]
    for argv in (
        ["data", "sample", shop, *sizes],
        ["data", "build", shop, run / "data"],
        ["pretrain", "--data", run / "data", "--out", run / "stage1", *fast, "--batch-size", "64"],
        ["fuse", run / "stage1", "--data", run / "data", "--out", run / "fused"],
    ):
        assert main(list(map(str, argv))) == 0
    return folder


@pytest.mark.parametrize("page", WITH_PYTHON, ids=page_id)
def test_python_of_a_page_runs(page, demo, tmp_path, monkeypatch):
    """From the top of the page to its end, as a reader would."""
    (tmp_path / "demo").symlink_to(demo / "demo")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "page"}
    for block in code_blocks(page, "python"):
        exec(compile(block, page_id(page), "exec"), names)


def test_readme_saves_what_serves(demo, tmp_path, monkeypatch):
    from hellm import Recommender

    (tmp_path / "demo").symlink_to(demo / "demo")
    monkeypatch.chdir(tmp_path)
    exec(compile(code_blocks(ROOT / "README.md", "python")[0], "README.md", "exec"), {})
    assert Recommender.load("serving").num_items == 80


class Parsed(Exception):
    """The arguments were understood; nothing more is wanted."""


def commands() -> list[str]:
    """Every `hellm` command in a code block, without its comment."""
    found = []
    for page in PAGES:
        for block in code_blocks(page, ""):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                if line.startswith("hellm ") and "..." not in line:
                    found.append(line)
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command, monkeypatch):
    parse_args = jsonargparse.ArgumentParser.parse_args

    def parse_only(parser, *args, **options):
        parse_args(parser, *args, **options)
        raise Parsed

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", parse_only)
    verb, *arguments = shlex.split(command, comments=True)[1:]
    with pytest.raises(Parsed):
        importlib.import_module(VERBS[verb][0]).run(arguments)


def test_every_verb_preset_protocol_form_split_and_metric_is_named():
    from hellm.config import PRESETS, PretrainConfig
    from hellm.data import form_names
    from hellm.data.splits import SPLIT_NAMES
    from hellm.evaluate import METRICS, PROTOCOLS

    text = "\n".join(map(text_of, PAGES))
    verbs = [f"hellm {verb}" for verb in VERBS]
    for name in (*verbs, *PRESETS[PretrainConfig], *PROTOCOLS, *form_names(), *SPLIT_NAMES, *METRICS):
        assert f"`{name}" in text, name


def test_every_public_operator_and_module_has_a_reference():
    from hellm import nn, ops

    text = "\n".join(text_of(page) for page in (ROOT / "docs" / "reference").glob("*.md"))
    for module in (ops, nn):
        for name in module.__all__:  # with a star for all of them, see docs/hooks.py
            assert re.search(rf"^::: {module.__name__}\.({name}|\*)$", text, re.MULTILINE), name


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md"])
def test_links_into_the_repository_exist(page):
    for target in re.findall(r"\]\(([^)]+)\)", text_of(ROOT / page)):
        if not target.startswith(("http", "contributing.md")):
            path, _, heading = target.partition("#")
            file = (ROOT / page).parent / path
            assert file.exists(), target
            if heading:
                headings = re.findall(r"^#+ (.*)$", text_of(file), re.MULTILINE)
                assert heading in [re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings], target


def test_readme_is_one_page():
    assert 600 <= len(text_of(ROOT / "README.md").split()) <= 950


def test_paths_that_contributing_names_exist():
    """A word in capitals stands for the name of what is added, and its file is beside others of its kind."""
    for path in re.findall(
        r"`((?:hellm|tests|csrc|kernels|benchmarks|docs)/[\w/.]*)`", text_of(ROOT / "CONTRIBUTING.md")
    ):
        shown, found = re.subn(r"OPERATOR|FORM|STAGE|TOWER", "*", path)
        assert list(ROOT.glob(shown)) if found else (ROOT / path).exists(), path
