"""Names of parameters as the module's own, whatever wraps a part of it (`model.backbone = torch.compile(...)`)."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import nn

from flashtask.core.library_internals import compiled_call

__all__ = ["keep_unwrapped_names", "parameters_by_name", "unwrapped", "unwrapped_name", "without_wrapper"]

#: Where `torch.compile` keeps the module it was given.
_WRAPPED = "_orig_mod"


def unwrapped_name(name: str) -> str:
    """The name without what wrappers put into it: `backbone._orig_mod.fc.weight` is `backbone.fc.weight`."""
    return name.replace(f"{_WRAPPED}.", "")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside its wrapper, if it has one."""
    inner = getattr(module, _WRAPPED, module)
    assert isinstance(inner, nn.Module)
    return inner


def without_wrapper(given: object) -> object:
    """The module that `torch.compile` was given, whose calls are compiled from now on; anything else is kept."""
    inner = getattr(given, _WRAPPED, None)
    if not isinstance(given, nn.Module) or not isinstance(inner, nn.Module):
        return given
    compiled_call(given, inner)
    return inner


def parameters_by_name(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under every name it has: one that is shared appears more than once."""
    return {unwrapped_name(name): parameter for name, parameter in module.named_parameters(remove_duplicate=False)}


def keep_unwrapped_names(module: nn.Module) -> None:
    """Let the state dict of the module use unwrapped names, also while parts of it are wrapped."""
    module.register_state_dict_post_hook(_rename_saved)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_rename_loaded)  # type: ignore[no-untyped-call]


def _rename_saved(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    wrapped = [name for name in state if name.startswith(prefix) and f"{_WRAPPED}." in name]
    if wrapped:
        # All of them again, so that the order stays.
        items = [(unwrapped_name(name) if name.startswith(prefix) else name, value) for name, value in state.items()]
        state.clear()
        state.update(items)


def _rename_loaded(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    for path, part in module.named_modules(remove_duplicate=False):
        if getattr(part, _WRAPPED, None) is not None:
            outside = f"{prefix}{path}." if path else prefix
            inside = f"{outside}{_WRAPPED}."
            for name in [n for n in state if n.startswith(outside) and not n.startswith(inside)]:
                state[inside + name.removeprefix(outside)] = state.pop(name)
