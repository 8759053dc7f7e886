"""One option of the command line, which is also a key of recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from flashtask.cli.kinds import Kind

__all__ = ["CONSTRUCTOR", "GROUPS", "OF_SHARDS", "OF_TABLES", "OF_THE_HUB", "OF_YOLO", "GroupedOption"]
__all__ += ["Option"]

#: The headings of `flashtask COMMAND --help`, in their order.
GROUPS = (
    *("Data", "Model", "Images", "Augmentation", "Loss and metrics", "Finetuning", "Training", "Hardware", "Output"),
    *("Selection", "Hub", "Recipe", "Other"),
)

#: The data constructor that the table's keys name. A recipe with another one has the same keys below that.
CONSTRUCTOR = "from_folders"
#: The constructor of data in tables.
OF_TABLES = "from_csv"
#: The constructor of shards.
OF_SHARDS = "from_shards"
#: The constructor of the file that describes a data set of YOLO.
OF_YOLO = "from_yolo"
#: The constructor of dataset repositories.
OF_THE_HUB = "from_hub_dataset"


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        flag: as typed, `--batch-size`.
        key: its key in a recipe (`trainer.max_epochs`), or empty if it does not describe the run.
        kind: what it takes; None for a plain flag that takes nothing.
        help: one line.
        metavar: what the help shows for the value.
        default: what counts where the option is not given, as the help shows it; empty if that is nothing. Tests
            compare it with what the code does.
        group: the heading of the help under which it is listed, one of `GROUPS`.
        value: for a plain flag, the value that it gives its key.
        many: may be given more than once.
    """

    flag: str
    key: str
    kind: Kind | None
    help: str
    metavar: str = ""
    default: str = ""
    group: str = "Other"
    value: object = True
    many: bool = False

    @property
    def name(self) -> str:
        """The name of the parameter that the command's function gets."""
        return self.flag.lstrip("-").replace("-", "_")

    def as_click(self) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """The decorator that adds it to a click command."""
        shown: dict[str, Any] = {"cls": GroupedOption, "group": self.group, "help": self.described}
        if self.kind is None:
            return click.option(self.flag, self.name, is_flag=True, default=False, **shown)
        return click.option(
            self.flag,
            self.name,
            type=_Typed(self.kind),
            metavar=self.metavar,
            default=() if self.many else None,
            multiple=self.many,
            **shown,
        )

    @property
    def described(self) -> str:
        """The line of the help, with the default."""
        return f"{self.help} [default: {self.default}]" if self.default else self.help


class GroupedOption(click.Option):
    """An option of click's that knows under which heading of the help it stands."""

    def __init__(self, *arguments: Any, group: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.group = group


class _Typed(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """A kind, as click wants it."""

    name = "value"

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.kind(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
