"""Folders that the program makes: what is deleted, who may write, what a kill leaves."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hellm import _folders
from hellm._files import WriteError, append_line, atomic_path, reading, writing
from hellm._folders import FolderInUseError, check_target, hold, mark_folder, new_folder, read_mark

ROOT = Path(__file__).resolve().parents[1]


def make(path, text="new", **options) -> None:
    with new_folder(path, **options) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file.txt").write_text(text)


def text_of(path) -> str:
    return (path / "part" / "file.txt").read_text()


def names(path) -> list[str]:
    return sorted(one.name for one in path.iterdir())


class TestWhatMayBeReplaced:
    def test_what_this_program_made(self, tmp_path):
        make(tmp_path / "x", "old")
        with pytest.raises(FileExistsError, match="x is not empty; overwrite=True replaces it, or give another folder"):
            make(tmp_path / "x")
        make(tmp_path / "x", overwrite=True)
        assert text_of(tmp_path / "x") == "new" and names(tmp_path) == ["x"]
        assert read_mark(tmp_path / "x")["files"] == {"part/file.txt": 3}

    @pytest.mark.parametrize("change", ["added", "link", "changed", "folder with files", "hidden"])
    def test_not_with_what_others_put_there(self, tmp_path, change):
        make(tmp_path / "x", "old")
        folder = tmp_path / "x" / "part"
        (tmp_path / "own").mkdir()
        {
            "added": lambda: (folder / "own.txt").touch(),
            "link": lambda: (folder / "own").symlink_to(tmp_path / "own"),
            "changed": lambda: (folder / "file.txt").write_text("my own work"),
            "folder with files": lambda: ((folder / "own").mkdir(), (folder / "own" / "a").touch()),
            "hidden": lambda: (tmp_path / "x" / ".own").touch(),
        }[change]()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(FileExistsError, match=r"x holds \S+, which hellm did not write or which was changed since"):
            make(tmp_path / "x", overwrite=True)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("name", ["config.yaml", "dataset.json", "embeddings.safetensors", ".hellm.lock"])
    def test_not_by_what_a_file_is_called(self, tmp_path, name):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / name).touch()
        (tmp_path / "x" / "thesis.tex").touch()
        with pytest.raises(FileExistsError, match=r"holds no \.hellm\.json, so hellm did not make it"):
            make(tmp_path / "x", overwrite=True)
        assert names(tmp_path / "x") == sorted([name, "thesis.tex"])

    @pytest.mark.parametrize(
        ("mark", "message"),
        [
            ("{", "damaged"),
            ("[]", "must be the mark of a folder made by hellm"),
            ('{"made_by": "hellm"}', "must be the mark"),
            ('{"made_by": "hellm", "format": 99, "kind": "data", "files": {}}', "format 99 is of a later version"),
        ],
    )
    def test_not_with_another_mark(self, tmp_path, mark, message):
        make(tmp_path / "x", "old")
        (tmp_path / "x" / ".hellm.json").write_text(mark)
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "x", overwrite=True)
        assert text_of(tmp_path / "x") == "old"

    def test_not_as_another_kind(self, tmp_path):
        make(tmp_path / "x", "old")
        with pytest.raises(FileExistsError, match="x is a data folder, not a recommender folder"):
            make(tmp_path / "x", kind="recommender", overwrite=True)

    @pytest.mark.parametrize("how", ["same", "slash", "dots", "link", "link in the way", "parent", "relative"])
    def test_not_what_is_read(self, tmp_path, monkeypatch, how):
        make(tmp_path / "top" / "x", "old")
        mark_folder(tmp_path / "top", "data")
        (tmp_path / "link").symlink_to(tmp_path / "top" / "x")
        (tmp_path / "way").symlink_to(tmp_path / "top")
        monkeypatch.chdir(tmp_path)
        out = {
            "same": tmp_path / "top" / "x",
            "slash": f"{tmp_path}/top/x/",
            "dots": f"{tmp_path}/top/../top/x/part/..",
            "link": tmp_path / "link",
            "link in the way": tmp_path / "way" / "x",
            "parent": tmp_path / "top",
            "relative": "top/x",
        }[how]
        for source in (tmp_path / "top" / "x", tmp_path / "link", "way/x", tmp_path / "top" / "x" / "part"):
            with pytest.raises(FileExistsError, match=r"(is|holds) .*, which is read, so it is not replaced"):
                make(out, overwrite=True, inputs=[source])
        assert text_of(tmp_path / "top" / "x") == "old"

    def test_not_the_working_directory_or_home(self, tmp_path, monkeypatch):
        make(tmp_path / "x", "old")
        monkeypatch.chdir(tmp_path / "x" / "part")
        with pytest.raises(FileExistsError, match="holds the working directory, so it is not replaced"):
            make(tmp_path / "x", overwrite=True)
        with pytest.raises(FileExistsError, match="holds the working directory"):
            make("..", overwrite=True)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "x"))
        with pytest.raises(FileExistsError, match="is the home directory, so it is not replaced"):
            make(tmp_path / "x", overwrite=True)

    def test_a_link_is_followed(self, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "x").symlink_to(tmp_path / "disk" / "x")
        make(tmp_path / "x")
        make(tmp_path / "x", "newer", overwrite=True)
        assert (tmp_path / "x").is_symlink() and text_of(tmp_path / "disk" / "x") == "newer"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("file", "file is a file; give another folder"),
            ("file/x", "file is a file; give another folder"),
            ("n" * 201, "must be at most 200 bytes long"),
            ("r\udcff", "must be UTF-8"),
            ("r\0", "must hold no NUL"),
        ],
    )
    def test_names_that_cannot_be(self, tmp_path, name, message):
        (tmp_path / "file").write_text("dear")
        with pytest.raises((ValueError, FileExistsError), match=message):
            make(f"{tmp_path}/{name}", overwrite=True)
        assert names(tmp_path) == ["file"]

    def test_an_empty_folder_is_as_good_as_none(self, tmp_path):
        (tmp_path / "x").mkdir()
        make(tmp_path / "x")
        assert text_of(tmp_path / "x") == "new"


class TestOldOrNew:
    def test_there_is_always_one(self, tmp_path, monkeypatch):
        make(tmp_path / "x", "old")
        seen = []
        exchange = _folders._exchange

        def watched(*pair):
            seen.append(text_of(tmp_path / "x"))
            done = exchange(*pair)
            seen.append(text_of(tmp_path / "x"))
            return done

        monkeypatch.setattr(_folders, "_exchange", watched)
        make(tmp_path / "x", overwrite=True)
        assert seen == ["old", "new"] and names(tmp_path) == ["x"]

    def test_without_the_system_call(self, tmp_path, monkeypatch):
        monkeypatch.setattr(_folders, "_exchange", lambda *pair: False)
        make(tmp_path / "x", "old")
        make(tmp_path / "x", overwrite=True)
        assert text_of(tmp_path / "x") == "new" and names(tmp_path) == ["x"]

    @pytest.mark.parametrize("swap", [True, False])
    @pytest.mark.parametrize("place", ["new", "replace", "old"])
    def test_the_next_one_clears_up_after_a_kill(self, tmp_path, swap, place):
        make(tmp_path / "x", "old")
        program = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from hellm import _folders
from test_folders import make
kill = lambda *_: os.kill(os.getpid(), 9)
if not {swap}: _folders._exchange = lambda *_: False
rename, delete = Path.rename, _folders._delete
if {place!r} == "new": _folders._sync = kill
elif {place!r} == "old": _folders._delete = lambda path: kill() if _folders.read_mark(path) else delete(path)
elif {swap}: _folders._exchange = kill
else: Path.rename = lambda self, to: kill() if self.suffix == ".new" else rename(self, to)
make({str(tmp_path / "x")!r}, overwrite=True)
"""
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT)
        assert done.returncode == -9 and len(names(tmp_path)) > 1
        if swap or place != "replace":
            assert text_of(tmp_path / "x") == ("new" if place == "old" else "old")
        make(tmp_path / "x", "newer", overwrite=True)
        assert text_of(tmp_path / "x") == "newer" and names(tmp_path) == ["x"]

    def test_a_failure_leaves_the_old_and_names_the_file(self, tmp_path):
        make(tmp_path / "x", "old")
        with (
            pytest.raises(WriteError, match=r"x/part/file\.txt cannot be written: the disk is full") as caught,
            new_folder(tmp_path / "x", overwrite=True) as folder,
        ):
            (folder / "part").mkdir()
            (folder / "part" / "file.txt").touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        assert caught.value.disk_is_full
        assert text_of(tmp_path / "x") == "old" and names(tmp_path) == ["x"]

    def test_rights_stay(self, tmp_path):
        make(tmp_path / "x")
        (tmp_path / "x").chmod(0o2750)
        make(tmp_path / "x", overwrite=True)
        assert (tmp_path / "x").stat().st_mode & 0o7777 == 0o2750


class TestLocks:
    @pytest.mark.parametrize("beside", [False, True])
    def test_the_second_process_says_who_writes(self, tmp_path, beside):
        program = f"""
import sys, time
from hellm._folders import hold
with hold({str(tmp_path / "x")!r}, beside={beside}):
    print("held", flush=True)
    sys.stdin.read()
"""
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **streams) as process:
            assert process.stdout.readline() == "held\n"
            who = rf"x is being written by process {process.pid} on \S+ since 20\d\d-\S+ \S+; wait until it has ended"
            with pytest.raises(FolderInUseError, match=who), hold(tmp_path / "x", beside=beside):
                pass
            process.kill()
        # What a killed process leaves locks nobody out, and goes.
        assert len(list(tmp_path.rglob(".*lock"))) == 1
        with hold(tmp_path / "x", beside=beside):
            pass
        assert list(tmp_path.rglob(".*lock")) == []

    def test_a_thread_may_hold_it_again_and_another_may_not(self, tmp_path):
        found = []

        def other():
            try:
                with hold(tmp_path / "x"):
                    found.append("held")
            except FolderInUseError as error:
                found.append(str(error))

        with hold(tmp_path / "x"), hold(tmp_path / "x"):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        assert len(found) == 1 and f"process {os.getpid()}" in found[0]
        assert names(tmp_path) == []

    def test_what_killed_writers_left_is_removed(self, tmp_path):
        (tmp_path / "x" / "checkpoint").mkdir(parents=True)
        (tmp_path / "x" / "towers" / "a").mkdir(parents=True)
        (tmp_path / "x" / "other").mkdir()
        mark_folder(tmp_path / "x" / "other", "run", layout=())
        left = (
            ".result.json.77.tmp",
            "checkpoint/.last.safetensors.8.tmp",
            "checkpoint/.tmpSr70kL",
            "towers/a/.embeddings.safetensors.8.tmp",
            "towers/a/.tmpb4YMoU",
            ".data.0123abcd.new",
        )
        kept = (".own.txt", "other/.config.yaml.8.tmp")
        for name in (*left, *kept):
            (tmp_path / "x" / name).touch()
        with hold(tmp_path / "x"):
            pass
        files = {one.relative_to(tmp_path / "x").as_posix() for one in (tmp_path / "x").rglob("*") if one.is_file()}
        assert files == {*kept, "other/.hellm.json"}

    def test_a_file_system_without_locks_is_told_of(self, tmp_path, monkeypatch, caplog):
        def refuse(*_):
            raise OSError(errno.EOPNOTSUPP, "not supported")

        monkeypatch.setattr(_folders.fcntl, "flock", refuse)
        with hold(tmp_path / "x"):
            (tmp_path / "x" / "file").touch()
        assert "this file system has no locks" in caplog.text and names(tmp_path / "x") == ["file"]


class TestGoingOn:
    LAYOUT = ("config.yaml", "checkpoint/*.safetensors")

    def check(self, path, **options):
        check_target(path, kind="run", layout=self.LAYOUT, proof="checkpoint", **({"resume": True} | options))

    def test_a_folder_without_a_mark_needs_proof(self, tmp_path):
        (tmp_path / "config.yaml").touch()
        with pytest.raises(FileExistsError, match=r"holds no \.hellm\.json"):
            self.check(tmp_path)
        (tmp_path / "checkpoint").mkdir()
        (tmp_path / "checkpoint" / ".last.safetensors.12.tmp").touch()
        (tmp_path / "checkpoint" / ".tmp0aZ9xY").touch()
        self.check(tmp_path)
        with pytest.raises(FileExistsError, match=r"holds no \.hellm\.json"):
            self.check(tmp_path, resume=False, overwrite=True)
        (tmp_path / "model.py").touch()
        with pytest.raises(FileExistsError, match=r"holds no \.hellm\.json"):
            self.check(tmp_path)

    @pytest.mark.parametrize("options", [{}, {"resume": False}, {"resume": False, "overwrite": True}])
    def test_a_mark_that_a_kill_cut_short_is_none(self, tmp_path, options):
        (tmp_path / ".hellm.lock").touch()
        (tmp_path / "..hellm.json.12.tmp").touch()
        self.check(tmp_path, **options)
        with hold(tmp_path):
            assert names(tmp_path) == [".hellm.lock"]

    def test_a_mark_that_a_kill_cut_short_is_replaced_with_the_folder(self, tmp_path):
        mark_folder(tmp_path, "run", layout=self.LAYOUT)
        (tmp_path / "..hellm.json.12.tmp").touch()
        self.check(tmp_path, resume=False, overwrite=True)

    def test_a_marked_folder_may_hold_more_but_is_not_replaced_then(self, tmp_path):
        mark_folder(tmp_path, "run", layout=self.LAYOUT)
        (tmp_path / "notes.txt").touch()
        self.check(tmp_path)
        with pytest.raises(FileExistsError, match=r"holds notes\.txt, which hellm did not write"):
            self.check(tmp_path, resume=False, overwrite=True)


class TestFiles:
    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
            (OSError(errno.EDQUOT, "Quota"), "the disk is full"),
            (OSError("12 requested and 0 written"), "the disk is full"),
            (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
            (RuntimeError("database or disk is full"), "the disk is full"),
            (OSError(errno.EROFS, "x"), "read-only file system"),
            (RuntimeError("I/O error (os error 13)"), "permission denied"),
        ],
    )
    def test_what_cannot_be_written_is_named(self, tmp_path, error, reason):
        (tmp_path / "x").write_text("old")
        with (
            pytest.raises(WriteError, match=f"x cannot be written: {reason}"),
            atomic_path(tmp_path / "x") as temporary,
        ):
            temporary.write_text("half")
            raise error
        assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]

    def test_other_errors_stay(self, tmp_path):
        with pytest.raises(KeyError), writing(tmp_path / "x"):
            raise KeyError("a")

    def test_a_line_is_added_whole_or_not_at_all(self, tmp_path, monkeypatch):
        append_line(tmp_path / "x", "one")

        class Full(io.FileIO):
            def write(self, content):
                super().write(content[:2])
                raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr("builtins.open", lambda path, *mode, **options: Full(path, "ab"))
        with pytest.raises(WriteError, match="x cannot be written: the disk is full"):
            append_line(tmp_path / "x", "two")
        monkeypatch.undo()
        assert (tmp_path / "x").read_text() == "one\n"

    @pytest.mark.parametrize(
        "read", [lambda: json.loads("{}")["a"], lambda: json.loads("{"), lambda: int("x"), lambda: b"\xff".decode()]
    )
    def test_what_cannot_be_read_is_named(self, tmp_path, read):
        with pytest.raises(ValueError, match="x: damaged, or not the file that must be there"), reading(tmp_path / "x"):
            read()

    def test_a_panic_of_a_library_is_of_the_file(self, tmp_path):
        import polars as pl

        with pytest.raises(ValueError, match=r"x: damaged.*unwrap"), reading(tmp_path / "x"):
            raise pl.exceptions.PanicException("called unwrap on None")

    @pytest.mark.parametrize(
        "error", [PermissionError("no"), MemoryError(), KeyboardInterrupt(), ImportError("the index needs a package")]
    )
    def test_what_is_not_of_the_file_stays(self, tmp_path, error):
        with pytest.raises(type(error)) as caught, reading(tmp_path / "x"):
            raise error
        assert caught.value is error

    def test_what_is_named_already_stays(self, tmp_path):
        told = ValueError(f"{tmp_path / 'x'}: line 3 is wrong")
        with pytest.raises(ValueError, match="x: line 3 is wrong") as caught, reading(tmp_path / "x"):
            raise told
        assert caught.value is told


def test_a_folder_with_a_marked_folder_in_it_is_replaced_while_nothing_in_it_was_changed(tmp_path):
    def save(content: str) -> None:
        whole = new_folder(tmp_path / "saved", kind="recommender", overwrite=True)
        with whole as new, new_folder(new / "model", kind="language model") as model:
            (model / "weights").write_text(content)

    save("old")
    save("other")
    assert (tmp_path / "saved" / "model" / "weights").read_text() == "other"
    (tmp_path / "saved" / "model" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="saved holds model/mine, which hellm did not write"):
        save("third")
