"""The command line: `hellm VERB ...`, the same as `python -m hellm VERB ...`.

Each verb is a module here with `run(argv) -> exit code`; it is imported when it is called, so that help comes at once.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence

from hellm.cli._output import printable

__all__ = ["main"]

VERBS = {
    "run": ("hellm.cli.run", "the whole way, from raw data to recommendations"),
    "plan": ("hellm.cli.plan", "time, memory, disk and traffic of every stage, before it runs"),
    "data": ("hellm.cli.data", "check, build, convert or make up a data set"),
    "features": ("hellm.cli.features", "encode item texts and pictures with pre-trained encoders"),
    "pretrain": ("hellm.cli.pretrain", "train the graph encoder (stage 1) into a run directory"),
    "sasrec": ("hellm.cli.sasrec", "train the sequence model SASRec into a run directory"),
    "transitions": ("hellm.cli.transitions", "count what follows what into a run directory, in seconds"),
    "finetune": ("hellm.cli.finetune", "fine-tune a language model that ranks the catalogue (stage 2)"),
    "fuse": ("hellm.cli.fuse", "add up finished runs, chosen and weighted by validation"),
    "ablate": ("hellm.cli.ablate", "what each part of a language model or a fused model adds, in one table"),
    "search": ("hellm.cli.search", "search for settings of a stage by validation"),
    "evaluate": ("hellm.cli.evaluate", "compare runs and baselines in one table"),
    "recommend": ("hellm.cli.recommend", "recommend to users, to bare histories, or items like an item"),
    "batch": ("hellm.cli.batch", "write the lists of all users into one parquet file"),
    "export": ("hellm.cli.export", "write a run as ONNX, as a search index or as vectors in parquet"),
    "append": ("hellm.cli.append", "add newer events and items to a data set; what is there keeps its rows"),
    "refit": ("hellm.cli.refit", "train a run on with newer data, and compare it with the one that serves"),
    "drift": ("hellm.cli.drift", "recent events beside what a run was trained on, and what it shows"),
    "ab": ("hellm.cli.ab", "compare the arms of an experiment by what users did"),
    "serve": ("hellm.cli.serve", "serve a run over HTTP: recommendations, events and new items as they come"),
    "replay": ("hellm.cli.replay", "compute logged answers of a server again, bit for bit"),
    "info": ("hellm.cli.info", "what is installed and usable here; --selftest checks the operators"),
    "demo": ("hellm.cli.demo", "the whole way on a made-up shop, in some minutes"),
}
# Verbs that torchrun or accelerate launch may start.
_PARALLEL = ("pretrain", "sasrec", "finetune")
_HELP = """usage: hellm VERB [options]      hellm VERB --help for the options of a verb

{verbs}

options:
  -h, --help     show this help
  --version      show the version
  --debug        with any verb: show the traceback of an error

Start with: hellm demo --out demo
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program name; None takes those of the process.
    Returns: Exit code: 0, 1 (the command ran and the answer is bad, or an error inside hellm), 2 (wrong arguments or
        data, or no room to write), 130 (interrupted), 128 + n (stopped by signal n; a training saves its state first).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [one for one in arguments if one != "--debug"]
    with _messages_on_stderr(), _one_voice(), printable(sys.stdout), printable(sys.stderr), _stopped_by_signals():
        try:
            code = _dispatch(arguments)
            # Here, so that a full disk behind standard output is told like any other.
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
        except SystemExit as stop:
            # An interrupted training says what it saved; argparse's own exits (--help) have nothing to add.
            if getattr(stop, "message", None) and _index() == 0:
                _say(str(stop))
            return stop.code if isinstance(stop.code, int) else 0
        except KeyboardInterrupt:
            _say("interrupted")
            return 130
        except BrokenPipeError:
            # The reader of our output (head, less) has gone; Python must not complain again at exit.
            sys.stdout = None
            return 0
        except Exception as error:
            if debug:
                raise
            return _report(error, arguments[0])


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_HELP.format(verbs="\n".join(f"  {verb:<12} {text}" for verb, (_, text) in VERBS.items())), end="")
        return 0
    if argv[0] in ("--version", "-V"):
        from hellm import __version__

        print(f"hellm {__version__}")
        return 0
    if argv[0] not in VERBS:
        nearest = difflib.get_close_matches(argv[0], VERBS, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"verb must be one of {', '.join(VERBS)}, got {argv[0]!r}{hint}")
    if argv[0] not in _PARALLEL and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        size, able = os.environ["WORLD_SIZE"], ", ".join(_PARALLEL)
        raise ValueError(f"only {able} run in several processes (WORLD_SIZE {size}), got {argv[0]}")
    return importlib.import_module(VERBS[argv[0]][0]).run(argv[1:])


def _report(error: Exception, verb: str) -> int:
    """One line on stderr, and the exit code."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        missing = isinstance(error, FileNotFoundError)
        text = f"{_shown(error.filename)}: {'no such file or folder' if missing else error.strerror.lower()}"
    elif isinstance(error, OSError) and error.errno is not None and error.strerror:
        text = f"standard output or a file: {error.strerror.lower()}"
    if getattr(error, "disk_is_full", False) or getattr(error, "errno", None) == errno.ENOSPC:
        again = "the same command with --resume" if _is_resumable(verb) else "the same command again"
        text += f"; make room there, then give {again}: what was written before is whole"
    # Library messages name the Python argument.
    for name in ("overwrite", "resume"):
        text = re.sub(rf"\b{name}=True\b", f"--{name}", text)
    if verb == "ablate":
        text = text.replace("--overwrite", "an --out that is new")
    missing_extra = isinstance(error, ImportError) and 'pip install "hellm[' in text
    if isinstance(error, (ValueError, OSError)) or missing_extra:
        _say(f"error: {text}")
        return 2
    if isinstance(error, (ArithmeticError, MemoryError)):
        _say(f"error: {text}")
        return 1
    # torch's own; named rather than imported, since most commands do without torch.
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        _say(f"error: this needs more memory than there is ({text}); lower batch sizes, or use a smaller model")
        return 1
    _say(f"error: internal: {type(error).__name__}: {text} (--debug shows where)")
    return 1


def _is_resumable(verb: str) -> bool:
    """Whether it goes on with what is there."""
    from hellm.training.trainers import STAGES

    return verb in (*STAGES, "run", "search", "batch", "refit")


def _shown(path: object) -> str:
    return os.fsdecode(path) if isinstance(path, (str, bytes)) else str(path)


def _say(text: str) -> None:
    # Where nobody listens any more, there is nobody to tell.
    with contextlib.suppress(OSError):
        print(f"hellm: {text}", file=sys.stderr)


def _index() -> int:
    """Of this process among those that a launcher started; 0 without one."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Lets the first of several processes print; errors come from all."""
    if _index() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Stopped(SystemExit):
    """A signal asked for the end. The exit code is 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.message = f"stopped by {signal.Signals(number).name}"

    def __str__(self) -> str:
        return self.message


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end a command the way Ctrl-C does: what is unfinished is removed, locks are freed.

    Training has its own way (`hellm.training.loop.fit`). An ignored signal, as nohup makes SIGHUP, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _Stopped(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {number: signal.signal(number, stop) for number in numbers if signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _StderrHandler(logging.Handler):
    """Writes to whatever `sys.stderr` is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        _say(f"{level}{record.getMessage()}")


@contextlib.contextmanager
def _messages_on_stderr() -> Iterator[None]:
    """Warnings always, progress only where somebody watches."""
    logger, handler = logging.getLogger("hellm"), _StderrHandler()
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO if sys.stderr is not None and sys.stderr.isatty() else logging.WARNING)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *rest, **named: _say(f"warning: {message}")
            yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
