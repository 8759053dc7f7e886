"""The models of a server by name: loaded in the background, and replaced without losing a request."""

from __future__ import annotations

import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fastapi import HTTPException

from flashtask.core.errors import FlashtaskError, did_you_mean
from flashtask.serve.model import ServedModel

__all__ = ["Models"]


class Models:
    """Models by name.

    Args:
        load: a model by its name, read from where it is stored.
        names: of all; the first is the one that is meant without a name.
    """

    def __init__(self, load: Callable[[str], ServedModel], names: Sequence[str]) -> None:
        self._load, self.names = load, tuple(names)
        self._models: dict[str, ServedModel] = {}
        self._loads = threading.Lock()
        self._changed = threading.Condition()
        self._leases: Counter[int] = Counter()
        #: Why a model could not be loaded at the start.
        self.error: str | None = None
        self._is_closed = False

    @property
    def are_ready(self) -> bool:
        """Whether every model is loaded and warm."""
        return len(self._models) == len(self.names) and not self._is_closed

    def load_all(self) -> None:
        """Load and warm up every model; a failure is kept in `error` and printed."""
        for name in self.names:
            try:
                self.reload(name)
            except Exception as error:
                self.error = f"{name}: {error}"
                print(f"error: {self.error}", file=sys.stderr)
                if not isinstance(error, FlashtaskError):
                    traceback.print_exc()
                return

    def reload(self, name: str) -> ServedModel:
        """Load a model again; the old one answers until the new one is warm, and what it accepted already.

        Raises:
            FlashtaskError: the new file cannot be used; the old model stays.
        """
        with self._loads:
            made = self._load(name)
            made.warm_up()
            before, self._models[name] = self._models.get(name), made
            if before is not None:
                self._close(before)
        return made

    def reload_all(self) -> None:
        """Load every model again, in the background; one that cannot be loaded stays as it is, which is printed."""

        def reload_each() -> None:
            for name in self.names:
                try:
                    self.reload(name)
                    print(f"loaded {name} again", file=sys.stderr)
                except Exception as error:
                    print(f"{name} stays as it was: {error}", file=sys.stderr)

        threading.Thread(target=reload_each, name="flashtask-reload", daemon=True).start()

    def get(self, name: str | None = None) -> ServedModel:
        """A model that is ready, which may be closed at any time: for its labels and version, not to predict.

        Raises:
            HTTPException: 404 for an unknown name, 503 while it is being loaded.
        """
        wanted = self.names[0] if name is None else name
        if wanted not in self.names:
            hint = did_you_mean(wanted, self.names) or f"there are {', '.join(self.names)}"
            raise HTTPException(404, f"no model named {wanted!r}: {hint}")
        found = self._models.get(wanted)
        if found is None:
            raise HTTPException(503, self.error or f"{wanted} is being loaded", {"Retry-After": "2"})
        return found

    @contextmanager
    def lease(self, name: str | None = None) -> Iterator[ServedModel]:
        """A model that is ready, and that is not closed within the block even if it is replaced.

        Raises:
            HTTPException: as `get`.
        """
        with self._changed:
            found = self.get(name)
            self._leases[id(found)] += 1
        try:
            yield found
        finally:
            with self._changed:
                self._leases[id(found)] -= 1
                self._changed.notify_all()

    def ready(self) -> list[ServedModel]:
        """The models that are loaded, in the order of their names."""
        return [self._models[name] for name in self.names if name in self._models]

    def close(self) -> None:
        """End the threads of every model, after what was accepted has been answered."""
        self._is_closed = True
        with self._loads:
            for one in self._models.values():
                self._close(one)

    def _close(self, model: ServedModel) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._leases[id(model)])
            del self._leases[id(model)]
        model.close()
