"""What an error tells to write in Python, as it is typed on the command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from flashtask.cli.options import TABLES, Option
from flashtask.cli.processes import is_distributed
from flashtask.cli.usage import OTHER_NAMES

__all__ = ["as_flags"]

_ARGUMENT = re.compile(r"(?<![\w.\-\"'`])([a-z]\w*)=(\"[^\"]*\"|'[^']*'|[\w.+-]*\w)")
_CALL = re.compile(r"\w\([^)]*\w=")


def as_flags(fix: str, argv: Sequence[str]) -> str:
    """A fix whose arguments (`num_workers=0`) are the flags of the command that was typed (`--num-workers 0`).

    Args:
        fix: of an error; one that shows a call stays as it is, as does an argument that the command has no flag for.
        argv: the whole command line.
    """
    command = next((word for word in argv if not word.startswith("-")), "")
    if command not in TABLES or _CALL.search(fix):
        return fix
    options = {option.key.rpartition(".")[2] or option.name: option for option in TABLES[command]}
    return _ARGUMENT.sub(lambda found: _flag(found, options, command), fix)


def _flag(found: re.Match[str], options: dict[str, Option], command: str) -> str:
    name, value = found[1], found[2].strip("\"'")
    option = options.get(name)
    if name == "strategy" and not is_distributed(value):
        option = next((one for one in TABLES[command] if one.key == "finetune.strategy"), None)
    if option is None:
        recipe_key = f"--set trainer.{name}="
        is_key = command == "finetune" and OTHER_NAMES.get(name, "").startswith(recipe_key)
        return f"{recipe_key}{value}" if is_key else found[0]
    if option.kind is not None:
        return f"{option.flag} {shlex.quote(value)}"
    return option.flag if value == str(option.value) else found[0]
