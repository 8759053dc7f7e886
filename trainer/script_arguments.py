"""The arguments of a trainer as options of a script's own `argparse` parser, and back."""

from __future__ import annotations

import argparse
import ast
import inspect
from contextlib import suppress
from typing import Any

from flashtask.trainer.older_names import UNDERSTOOD

__all__ = ["add_arguments", "given_arguments"]

_WORDS = {"true": True, "false": False, "none": None}


def add_arguments(parser: argparse.ArgumentParser, trainer_class: type) -> argparse.ArgumentParser:
    """Give a parser an option for each argument of a trainer, except those that it has already.

    Returns:
        The same parser.
    """
    group = parser.add_argument_group(f"flashtask.{trainer_class.__name__}")
    for name, argument in _arguments(trainer_class).items():
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        is_switch = "bool" in str(argument.annotation)
        alone: dict[str, Any] = {"nargs": "?", "const": True} if is_switch else {}
        with suppress(argparse.ArgumentError):  # the script's own
            group.add_argument(*spellings, dest=name, type=_value, default=argument.default, **alone)
    for name in UNDERSTOOD:
        with suppress(argparse.ArgumentError):
            group.add_argument(f"--{name}", type=_value, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def given_arguments(namespace: argparse.Namespace, trainer_class: type) -> dict[str, Any]:
    """What a namespace says that is an argument of a trainer; the rest is the script's own."""
    known = {*_arguments(trainer_class), *UNDERSTOOD}
    return {name: value for name, value in vars(namespace).items() if name in known}


def _arguments(trainer_class: type) -> dict[str, inspect.Parameter]:
    found = inspect.signature(trainer_class).parameters
    return {name: argument for name, argument in found.items() if argument.kind is argument.KEYWORD_ONLY}


def _value(text: str) -> Any:
    """What a word of a command line means: a number, True, None, a list or a dictionary, else the word itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    with suppress(ValueError, SyntaxError):
        value = ast.literal_eval(text)
        return text if isinstance(value, tuple) else value  # "0,1" is left to `devices`
    return text
