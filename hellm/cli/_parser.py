"""Option parsing shared by the verbs: spelling, suggestions and errors as one readable line."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from hellm.engines import ENGINES

__all__ = ["PAIRS", "add_engine", "add_settings", "new_parser", "parse"]

# How the values of an option that takes "key=value" words show in the help.
PAIRS = "ROLE=COLUMN"

_KEY_VALUE = re.compile(r"(?P<key>[A-Za-z_][\w.-]*)=")
_WRONG_VALUE = re.compile(r'Parser key "(?P<key>[\w.]+)":\s*(?P<what>.*)', re.DOTALL)
_WRONG_NUMBER = re.compile(r'Parser key "(?P<key>[\w.]+)" element \d+:.*Got value: (?P<given>.*)', re.DOTALL)
_NO_VALUE = re.compile(r"argument (?P<option>\S+): expected (at least )?one argument")
_TYPES = {"<class 'int'>": "an integer", "<class 'float'>": "a number", "<class 'bool'>": "true or false"}


class _HelpFormatter(DefaultHelpFormatter):
    """Wider, and without the type after each option: names and defaults say it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action) -> str:
        text = re.sub(r"\s*\((type: |required|default: )[^\n]*\)$", "", super()._get_help_string(action) or "")
        notable = action.default not in (None, False, argparse.SUPPRESS, SUPPRESS)
        return f"{text} (default: %(default)s)" if notable and action.option_strings else text


def new_parser(verb: str, usage: str, description: str) -> ArgumentParser:
    """A parser that raises instead of leaving the process."""
    return ArgumentParser(
        prog=f"hellm {verb}",
        usage=f"hellm {verb} {usage}",
        description=description,
        exit_on_error=False,
        formatter_class=_HelpFormatter,
    )


def add_settings(parser: ArgumentParser, config_class: type) -> None:
    """Every setting of a config class as an option, with its help and default; values show as X in the help."""
    before = set(parser._actions)
    parser.add_class_arguments(config_class)
    for action in set(parser._actions) - before:
        if any(other.dest.startswith(f"{action.dest}.") for other in parser._actions):
            # The option for a whole group: its parts are all there.
            action.help = argparse.SUPPRESS
        elif action.metavar is None and not action.choices:
            action.metavar = "X"


def add_engine(parser: ArgumentParser) -> None:
    """The options of `hellm.engines.engine_of`."""
    parser.add_argument(
        "--engine",
        default="local",
        choices=ENGINES,
        help='who does the work: this process, or workers of Ray (pip install "hellm[ray]"), on the cluster that '
        "RAY_ADDRESS names or on this machine",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="of --engine ray; default: CPUs of the cluster by threads of each"
    )


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse, with `-` and `_` alike in option names and `key=value` the same as `--key value`.

    The numbers of an option that takes several are words, or have commas between them.

    Raises: ValueError saying which option, what it must be and what it was, or the nearest name of an unknown one.
    """
    options = {name.lstrip("-"): name for name in parser._option_string_actions}
    by_spelling = {name.replace("-", "_"): name for name in options}
    arguments, pairs = [], False
    for one in argv:
        # What follows an option for pairs is its own, whatever options are called.
        if one.startswith("--"):
            name = by_spelling.get(one[2:].partition("=")[0].replace("-", "_"))
            pairs = name is not None and parser._option_string_actions[options[name]].metavar == PAIRS
            arguments.append(_spelled(one, options, by_spelling))
        else:
            arguments.append(one if pairs else _spelled(one, options, by_spelling))
    arguments = _separated(arguments, parser._option_string_actions)
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(_explain(str(error.message), arguments, list(options))) from None


def _spelled(argument: str, options: dict[str, str], by_spelling: dict[str, str]) -> str:
    """The argument with the name of its option as the parser knows it."""
    match = _KEY_VALUE.match(argument)
    if match:
        known = by_spelling.get(match["key"].replace("-", "_"))
        return f"{options[known]}={argument[match.end() :]}" if known is not None and len(known) > 1 else argument
    if argument.startswith("--"):
        name, equals, value = argument[2:].partition("=")
        known = by_spelling.get(name.replace("-", "_"))
        return f"{options[known]}{equals}{value}" if known is not None else argument
    return argument


def _separated(arguments: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """With a word for each number of an option that takes several."""
    found, numbers = [], False
    for one in arguments:
        name, equals, value = one.partition("=")
        if name in options:
            action = options[name]
            numbers = action.nargs == "+" and getattr(action, "_typehint", None) in (int, float)
            found += [name, *_words(value)] if numbers and equals else [one]
        else:
            found += _words(one) if numbers else [one]
    return found


def _words(text: str) -> list[str]:
    return [one for one in text.strip("[]").split(",") if one] or [text]


def _explain(message: str, argv: Sequence[str], options: list[str]) -> str:
    if message.startswith("unrecognized arguments: "):
        # Several words may be left over; the first is what went wrong.
        left = message.removeprefix("unrecognized arguments: ").split()[0]
        if not left.startswith("-") and not _KEY_VALUE.match(left):
            return f"unexpected argument {left!r}"
        name = left.lstrip("-").partition("=")[0]
        nearest = difflib.get_close_matches(name.replace("-", "_"), options, n=1, cutoff=0.5)
        nearest = nearest or [one for one in options if one.endswith(f".{name.replace('-', '_')}")][:1]
        hint = f"; did you mean --{nearest[0]}?" if nearest else ""
        return f"unknown option {left.partition('=')[0]!r}{hint}"
    if message.startswith("the following arguments are required: "):
        missing = message.removeprefix("the following arguments are required: ").split(", ")
        return f"missing: {', '.join(f'--{one}' if one in options else one.upper() for one in missing)}"
    wrong = _WRONG_NUMBER.match(message)
    if wrong:
        return f"--{wrong['key']} must be {_expected(message)}, or several of them, got {wrong['given']!r}"
    wrong = _WRONG_VALUE.match(message)
    if wrong:
        return f"--{wrong['key']} must be {_expected(wrong['what'])}, got {_given(wrong['key'], argv)}"
    if nothing := _NO_VALUE.match(message):
        return f"{nothing['option']} needs a value"
    return " ".join(message.split())


def _expected(what: str) -> str:
    """What a value must be, in words, from the parser's list of accepted types."""
    choices = []
    for kind in re.findall(r"Expected an? (<class '\w+'>|typing\.Literal\[[^\]]*\])", what):
        if kind == "<class 'NoneType'>":
            choices.append("null")
        elif kind.startswith("typing.Literal["):
            choices += [one.strip(" '") for one in kind[len("typing.Literal[") : -1].split(",")]
        else:
            choices.append(_TYPES.get(kind, {"<class 'tuple'>": "a list such as [a,b]"}.get(kind, kind)))
    choices = list(dict.fromkeys(choices))
    return f"one of {', '.join(choices)}" if len(choices) > 1 else (choices or ["another value"])[0]


def _given(key: str, argv: Sequence[str]) -> Any:
    names = [f"--{key}", f"-{key}"]
    for place, one in enumerate(argv):
        name, equals, value = one.partition("=")
        if name.replace("-", "_") in [one.replace("-", "_") for one in names]:
            return repr(value if equals else argv[place + 1] if place + 1 < len(argv) else "nothing")
    return "another"
