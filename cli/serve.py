"""`flashtask serve`: checkpoints behind HTTP, or a folder from which an image of them is built."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from flashtask._version import __version__
from flashtask.cli.input_paths import checkpoint_source
from flashtask.cli.output import require_creatable
from flashtask.cli.processes import device_of
from flashtask.core.errors import MissingInputError, OutputError, UsageError

__all__ = ["serve"]

_KEY_VARIABLE = "FLASHTASK_API_KEY"
_LIMITS = ("max_bytes", "max_images", "max_pixels", "max_waiting", "timeout")
#: Names of checkpoints that every run folder has.
_COMMON = ("best", "last")

_DOCKERFILE = """\
# docker build -t flashtask-serve . && docker run --read-only --tmpfs /tmp -p 8000:8000 flashtask-serve
FROM python:3.11-slim
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu torch torchvision \\
 && pip install --no-cache-dir "flashtask[serve]=={version}"
RUN useradd --system --uid 10001 --home-dir /nonexistent flashtask
COPY models /models
ENV FLASHTASK_CACHE=/tmp/flashtask MPLCONFIGDIR=/tmp HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready')"]
STOPSIGNAL SIGTERM
# An API key: docker run -e {variable}=...
CMD {command}
"""


def serve(checkpoints: Sequence[str], params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        checkpoints: each a model, or NAME=MODEL.
        params: the options of the command.

    Raises:
        MissingInputError: a model is not there.
        UsageError: two models of one name, or the extra is not installed.
        OutputError: the address is taken, or the folder exists.
    """
    sources = _named(checkpoints)
    if params["write_dockerfile"]:
        _write_dockerfile(Path(params["write_dockerfile"]), sources)
        return
    if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if not importlib.util.find_spec(name)]:
        raise UsageError(f"serving needs {', '.join(missing)}", fix="pip install 'flashtask[serve]'")
    host, port = params["host"] or "127.0.0.1", 8000 if params["port"] is None else params["port"]
    if params["corrections"]:
        require_creatable(Path(params["corrections"]).absolute())

    from flashtask.serve.app import create_app
    from flashtask.serve.limits import Limits
    from flashtask.serve.server import listen, run

    limits = Limits(**{name: params[name] for name in _LIMITS if params[name] is not None})
    api_key = os.environ.get(_KEY_VARIABLE) or None
    app = create_app(
        sources,
        limits=limits,
        device=device_of(None, {"accelerator": params["accelerator"]}),
        precision=params["precision"],
        api_key=api_key,
        cors=params["cors"],
        allow_urls=params["allow_urls"],
        corrections=params["corrections"],
    )
    listening = listen(host, port)
    shown = "[::1]" if ":" in host else host
    click.echo(
        f"serving {', '.join(sources)} on http://{shown}:{listening.getsockname()[1]} (Ctrl-C ends it)", err=True
    )
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        click.echo(f"anyone who reaches {host} may ask: set {_KEY_VARIABLE} to require a key", err=True)
    sys.stderr.flush()
    run(app, listening, limits)


def _named(given: Sequence[str]) -> dict[str, Path | str]:
    """Name -> model."""
    found: dict[str, Path | str] = {}
    for text in given:
        name, is_named, path = text.partition("=")
        if not is_named or "/" in name or Path(text).exists():
            name, path = "", text
        source = checkpoint_source(path)
        name = name or _name_of(source)
        if name in found:
            raise UsageError(f"two models are called {name!r}", fix=f"flashtask serve first={given[0]} second={path}")
        found[name] = source
    return found


def _name_of(source: Path | str) -> str:
    path = Path(str(source)).absolute()
    return path.parent.name if path.stem in _COMMON else path.stem


def _write_dockerfile(folder: Path, sources: Mapping[str, Path | str]) -> None:
    """A folder with a Dockerfile and copies of the models.

    Raises:
        MissingInputError: a model that is not on this disk.
        OutputError: the folder exists.
    """
    require_creatable(folder.absolute().parent)
    for name, source in sources.items():
        if not isinstance(source, Path):
            raise MissingInputError(f"{source} ({name}) is not on this disk", fix=f"flashtask pull {source}")
    try:
        (folder / "models").mkdir(parents=True)
    except FileExistsError:
        raise OutputError(f"{folder} exists already", fix="choose another folder") from None
    models = []
    for name, source in sources.items():
        assert isinstance(source, Path)
        copied = folder / "models" / (name if source.is_dir() else f"{name}.ckpt")
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, copied)
        models.append(f"{name}=/models/{copied.name}")
    command = ", ".join(f'"{word}"' for word in ["flashtask", "serve", "--host", "0.0.0.0", *models])
    text = _DOCKERFILE.format(version=__version__, variable=_KEY_VARIABLE, command=f"[{command}]")
    (folder / "Dockerfile").write_text(text, encoding="utf-8")
    click.echo(f"wrote {folder / 'Dockerfile'}; next: docker build -t flashtask-serve {folder}")
