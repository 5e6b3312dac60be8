"""The container image: what it copies exists and is sent, its command is understood, its health check is right."""

from __future__ import annotations

import fnmatch
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import jsonargparse
import pytest
from served import save_run, serving

from hellm.cli import VERBS, main

ROOT = Path(__file__).resolve().parents[2]


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: name and arguments, without comments and broken lines."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, arguments) for name, _, arguments in (line.partition(" ") for line in lines if line.strip())]


def of(name: str) -> list[str]:
    return [arguments for one, arguments in instructions() if one == name]


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    start = max(place for place, (name, _) in enumerate(found) if name == "FROM")
    return found[start:]


def sources() -> list[str]:
    """What is copied from the repository."""
    return [source for line in of("COPY") if "--from=" not in line for source in line.split()[:-1]]


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path through; the last pattern that fits it or a folder around it counts."""
    sent = True
    around = [path, *map(str, PurePosixPath(path).parents)][:-1]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        names = [PurePosixPath(one).name for one in around] if pattern.startswith("**/") else around
        if any(fnmatch.fnmatchcase(name, pattern.removeprefix("**/")) for name in names):
            sent = line.startswith("!")
    return sent


def test_what_is_copied_exists_and_is_sent():
    assert len(sources()) > 5
    for source in sources():
        assert (ROOT / source).exists() and is_sent(source), source
    for other in (".git", ".venv", "tests", "docs", "hellm/_C.so", "hellm/serve/__pycache__", "build/x", ".env"):
        assert not is_sent(other), other
    assert is_sent("hellm/serve/app.py") and is_sent("csrc/cuda/launch.cu")


def test_what_the_build_reads_is_copied():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [project["project"]["readme"], *project["project"]["license-files"], "CMakeLists.txt", "pyproject.toml"]
    wanted += project["tool"]["scikit-build"]["wheel"]["packages"].values()
    wanted += re.findall(r"\bcsrc/[\w/.]+", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    for name in wanted:
        assert any(name == source or name.startswith(f"{source}/") for source in sources()), name
    (extras,) = (value for value in of("ARG") if value.startswith("EXTRAS="))
    assert extras.removeprefix("EXTRAS=") in project["project"]["optional-dependencies"]


def command() -> list[str]:
    stage = dict(last_stage())
    return [*json.loads(stage["ENTRYPOINT"]), *json.loads(stage["CMD"])]


class Parsed(Exception):
    """The arguments were understood; nothing more is wanted."""


def test_the_command_is_understood(monkeypatch):
    parse_args, found = jsonargparse.ArgumentParser.parse_args, []

    def parse_only(parser, *args, **options):
        found.append(parse_args(parser, *args, **options))
        raise Parsed

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", parse_only)
    program, verb, *arguments = command()
    assert program == "hellm" and verb in VERBS
    with pytest.raises(Parsed):
        importlib.import_module(VERBS[verb][0]).run(arguments)
    (args,) = found
    stage = dict(last_stage())
    assert stage["EXPOSE"] == str(args.port) and str(args.store).startswith(f"{stage['VOLUME']}/")
    assert stage["WORKDIR"] == str(Path(stage["VOLUME"]).parent) == str(Path(args.run).parent)


def test_nobody_is_answered_without_a_key(monkeypatch, capsys):
    monkeypatch.delenv("HELLM_API_KEY", raising=False)
    assert main(command()[1:]) == 2
    assert "lets other machines ask, so it needs a key" in capsys.readouterr().err


def test_it_runs_as_nobody_in_particular():
    user = dict(last_stage())["USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f"--uid {user.partition(':')[0]} " in dict(last_stage())["RUN"]
    # Nothing is installed after the user is chosen.
    names = [name for name, _ in last_stage()]
    assert names.index("USER") > max(place for place, name in enumerate(names) if name in ("RUN", "COPY"))


def test_the_health_check_asks_whether_it_is_ready(tmp_path, one_thread):
    line = dict(last_stage())["HEALTHCHECK"]
    program, option, code = json.loads(line.partition("CMD ")[2])
    assert (program, option) == ("python", "-c")
    (url,) = re.findall(r"http://[^']+", code)
    assert urlsplit(url).netloc == f"127.0.0.1:{dict(last_stage())['EXPOSE']}"

    def check(server: str) -> int:
        asked = code.replace(url, f"{server}{urlsplit(url).path}")
        return subprocess.run([sys.executable, option, asked], capture_output=True, timeout=60, check=False).returncode

    with serving(save_run(tmp_path / "run"), api_key="a-key-of-some-length") as client:
        assert check(client.url) == 0
        client.app.state.readiness.is_ready = False
        assert check(client.url) == 1
    assert check(client.url) == 1
