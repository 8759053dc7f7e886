"""What click says about a wrong command line, told in flashtask's words and with the nearest right one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import click

from flashtask.cli.options import GROUPS, TABLES, GroupedOption
from flashtask.core.errors import UsageError, nearest

__all__ = ["Commands", "explain"]

#: What other tools (Lightning 1.x and 2.x first) call an option, and what does that here.
OTHER_NAMES = {
    "accumulate_grad_batches": "--set trainer.accumulate_grad_batches=N",
    "amp_backend": "--precision P",
    "amp_level": "--precision P",
    "aa": "--augment A",
    "arch": "--backbone NAME",
    "auto_lr_find": "--lr auto",
    "auto_scale_batch_size": "--batch-size auto",
    "bs": "--batch-size N",
    "clip_grad": "--gradient-clip-val X",
    "cutmix": "--cutmix-alpha X",
    "checkpoint_callback": "--set trainer.enable_checkpointing=false",
    "ckpt_path": "--output-dir RUN --resume",
    "data_dir": "the folder as first argument: flashtask finetune DATA",
    "default_root_dir": "--output-dir RUN, or --set trainer.default_root_dir=DIR",
    "deterministic": "always on; --seed N sets the random numbers",
    "drop_path": "--drop-path-rate X",
    "fast_dev_run": "--max-steps 1",
    "gpus": "--accelerator gpu --devices N",
    "img_size": "--image-size N",
    "imgsz": "--image-size N",
    "ipus": "--accelerator auto (there is no IPU support)",
    "j": "--num-workers N",
    "learning_rate": "--lr X",
    "limit_train_batches": "--set trainer.limit_train_batches=N",
    "loss_fn": "--loss NAME",
    "max_epochs": "--epochs N",
    "mixup": "--mixup-alpha X",
    "model": "--backbone NAME",
    "model_ema_decay": "--ema-decay X",
    "num_epochs": "--epochs N",
    "num_gpus": "--accelerator gpu --devices N",
    "num_processes": "--accelerator cpu --devices N",
    "opt": "--optimizer NAME",
    "out_dir": "--output-dir RUN",
    "progress_bar_refresh_rate": "--quiet",
    "reprob": "--random-erasing P",
    "resume_from_checkpoint": "--output-dir RUN --resume",
    "save_dir": "--output-dir RUN",
    "smoothing": "--label-smoothing X",
    "topk": "--top-k K",
    "tpu_cores": "--accelerator auto (there is no TPU support)",
    "train_folder": "the folder as first argument: flashtask finetune DATA",
    "weights_summary": "--set trainer.enable_model_summary=false",
    "workers": "--num-workers N",
}


class Command(click.Command):
    """A command whose help shows its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each group of options, in the order of `GROUPS`; `--help` is in the last."""
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (row := param.get_help_record(ctx)) is not None:
                rows[param.group if isinstance(param, GroupedOption) else GROUPS[-1]].append(row)
        for group, own in rows.items():
            if own:
                with formatter.section(group):
                    formatter.write_dl(own, col_max=24)


class Commands(click.Group):
    """A group of commands whose unknown names are answered with the nearest."""

    command_class = Command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Click's, but an unknown name is a UsageError of flashtask's."""
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            names = self.list_commands(ctx)
            raise UsageError(
                f"flashtask has no command {args[0]!r}",
                fix=_suggestion(nearest(args[0], names), "`flashtask --help` lists all: " + ", ".join(names)),
            )
        return super().resolve_command(ctx, args)


def explain(error: click.ClickException, argv: Sequence[str]) -> UsageError:
    """The same complaint as an error of flashtask's: what is wrong, and what to type instead.

    Args:
        error: what click raised.
        argv: the whole command line, from which an option that click cut up is put together again.
    """
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "flashtask"
    see_help = f"`{path} --help` lists the options"
    if isinstance(error, click.NoSuchOption):
        return _no_such_option(_as_typed(error.option_name, argv), context, path)
    if isinstance(error, click.BadOptionUsage):
        return UsageError(f"{error.option_name} needs a value", fix=see_help)
    if isinstance(error, click.MissingParameter):
        name = error.param.human_readable_name if error.param else "an argument"
        return UsageError(f"`{path}` needs {name}", fix=context.get_usage().lower() if context else see_help)
    if isinstance(error, click.BadParameter):
        flag = error.param.opts[0] if error.param else "value"
        return UsageError(f"{flag}: {error.message}", fix=see_help)
    return UsageError(error.format_message(), fix=see_help)


def _as_typed(name: str, argv: Sequence[str]) -> str:
    """`-epochs` is what was typed where click says `-e`."""
    return next((arg for arg in argv if arg.startswith(name) and not name.startswith("--")), name)


def _no_such_option(name: str, context: click.Context | None, path: str) -> UsageError:
    bare = name.split("=")[0].lstrip("-").replace("-", "_")
    own = _options_of(context)
    rest = f"`{path} --help` lists all"
    what = f"`{path}` has no option {name}"
    here = OTHER_NAMES.get(bare, "")
    if here and (here.split()[0] in own.values() or not here.startswith("--")):
        return UsageError(what, fix=f"in flashtask: {here}")
    if os.path.lexists(name):
        return UsageError(what, fix=f"the file of that name is {shlex.quote(os.path.join(os.curdir, name))}")
    if "." in bare:
        return UsageError(what, fix=f"a recipe key goes after --set: --set {bare}=VALUE")
    elsewhere = [command for command, table in TABLES.items() if bare in {option.name for option in table}]
    close = [own[known] for known in nearest(bare, own)] or _within_two_letters(bare, own)
    if elsewhere and not close:
        return UsageError(what, fix=f"it is an option of `flashtask {elsewhere[0]}`; {rest}")
    return UsageError(what, fix=_suggestion(close, rest))


def _options_of(context: click.Context | None) -> dict[str, str]:
    params: Iterable[Any] = context.command.get_params(context) if context else ()
    return {
        flag.lstrip("-").replace("-", "_"): flag
        for param in params
        if isinstance(param, click.Option)
        for flag in param.opts
        if flag.startswith("--")
    }


def _within_two_letters(bare: str, own: dict[str, str]) -> list[str]:
    """For names too short to look alike by proportion, such as `lr`: as long, and one letter in common."""
    return [flag for known, flag in own.items() if len(known) == len(bare) <= 3 and set(known) & set(bare)]


def _suggestion(close: Sequence[str], otherwise: str) -> str:
    return f"did you mean {' or '.join(close)}? {otherwise}" if close else otherwise
