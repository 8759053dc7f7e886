"""`flashtask learning-curve`: what more labels would bring, and which images to label next."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from flashtask.cli.input_paths import image_inputs
from flashtask.cli.kinds import whole
from flashtask.cli.output import require_writable_file
from flashtask.cli.parts import build_data
from flashtask.cli.request import requested_recipe, require_data
from flashtask.core.errors import UsageError
from flashtask.core.files import atomic_write_text

__all__ = ["learning_curve"]

_NEXT, _DRAWS = 100, 10


def learning_curve(data: str | None, params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        data: the data or recipe that the user named, or a run folder, whose data and trained backbone are used.
        params: the options of the command.

    Raises:
        UsageError: options that need another one, or data with other targets than a label or numbers.
        MissingInputError: data or images that are not there.
        OutputError: a file cannot be written.
    """
    for name in ("next", "output"):
        if params[name] and not params["unlabelled"]:
            raise UsageError(f"--{name} is about --unlabelled, which is not given", fix="--unlabelled FOLDER")
    sizes = _sizes(params["sizes"])
    run = Path(data) if data and (Path(data) / "recipe.yaml").is_file() else None
    recipe = requested_recipe(str(run / "recipe.yaml") if run else data, {**params, "backbone": None})
    require_data(recipe)
    paths = [one.path for one in image_inputs([params["unlabelled"]])] if params["unlabelled"] else []
    for name in ("output", "picture", "page"):
        if params[name]:
            require_writable_file(Path(params[name]))
    with redirect_stdout(sys.stderr):
        from flashtask.tasks.learning_curve import learning_curve as drawn

        model = _model(run, params["backbone"], recipe.get("model.backbone"))
        made = drawn(model, build_data(recipe), sizes=sizes, draws=params["draws"] or _DRAWS, seed=params["seed"] or 0)
        chosen = made.next_labels([str(path) for path in paths], params["next"] or _NEXT) if paths else []
    if params["picture"]:
        made.plot(params["picture"])
    if params["page"]:
        atomic_write_text(params["page"], made.to_html())
    if params["output"]:
        atomic_write_text(params["output"], "".join(f"{path}\n" for path in chosen))
    if params["json"]:
        click.echo(json.dumps({**made.to_dict(), **({"next": chosen} if paths else {})}))
        return
    click.echo(str(made))
    if chosen and not params["output"]:
        click.echo("\nlabel next:")
        click.echo("\n".join(chosen))


def _sizes(given: str | list[str] | None) -> list[int] | None:
    if given is None:
        return None
    try:
        return list(map(whole(1), [given] if isinstance(given, str) else given))
    except ValueError as error:
        raise UsageError(f"--sizes: {error}", fix="--sizes 50,100,200") from None


def _model(run: Path | None, backbone: str | None, of_recipe: Any) -> Any:
    """A backbone by name, else that of the run as it was trained, else that of the recipe with its first weights."""
    if run is not None and backbone is None:
        from flashtask.tasks.loading import load

        return load(run)
    from flashtask.backbones.default import AUTO
    from flashtask.tasks.image_embedding import ImageEmbedder

    return ImageEmbedder(backbone or of_recipe or AUTO)
