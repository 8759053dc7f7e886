"""LoRA: factors of a low rank beside the frozen weights of linear and convolutional layers (Hu et al., 2021).

A layer that is adapted stays the same object, under the same names: its class is replaced by a subclass that adds the
product of two factors to the weight, and back again when they are merged. So the base weights keep their keys
(`blocks.0.attn.qkv.weight`), and the factors are stored beside them (`...qkv.lora_down`, `...qkv.lora_up`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from flashtask.core.errors import IntegrityError, UsageError, did_you_mean
from flashtask.core.files import PathLike
from flashtask.core.library_internals import tensor_tables
from flashtask.core.number_checks import is_whole
from flashtask.core.seeding import derive_seed, seeded_generators
from flashtask.trainer.finetuning.phase import LowRank
from flashtask.trainer.wrapping import unwrapped_name

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun

__all__ = [
    "Adaptation",
    "adapt",
    "adapt_for",
    "adapted_layers",
    "describe_adapters",
    "factor_names",
    "merge",
    "merged_state_dict",
    "restore_adapters",
]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: the two factors of a layer, as its parameters are called
_FACTORS = ("lora_down", "lora_up")
_PLAIN_FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class _LowRankLayer:
    """What a layer with factors has beside its own class; the attribute of its weight gives weight and product."""

    lora_base: type[nn.Module]
    lora_settings: LowRank
    lora_down: nn.Parameter
    lora_up: nn.Parameter

    def lora_product(self) -> Tensor:
        """What the factors add to the weight, in the weight's shape."""
        product = _scaled_up(self) @ self.lora_down
        return product.reshape(_base_weight(self).shape)


class _LowRankLinear(_LowRankLayer):
    """A linear layer: the factors see the inputs, so no gradient of the size of the weight is computed."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = F.linear(inputs, _base_weight(self), self.bias)  # type: ignore[attr-defined]
        beside: Tensor = F.linear(F.linear(_dropped(self, inputs), self.lora_down), _scaled_up(self))
        return outputs + beside


class _LowRankConvolution(_LowRankLayer):
    """A convolution: the first factor is one of few channels, the second one of size 1 after it."""

    def forward(self, inputs: Tensor) -> Tensor:
        convolve, weight = self._conv_forward, _base_weight(self)  # type: ignore[attr-defined]
        outputs: Tensor = convolve(inputs, weight, self.bias)  # type: ignore[attr-defined]
        inputs = _dropped(self, inputs)
        if self.groups > 1:  # type: ignore[attr-defined]
            beside: Tensor = convolve(inputs, self.lora_product().to(weight.dtype), None)
            return outputs + beside
        hidden = convolve(inputs, self.lora_down.reshape(-1, *weight.shape[1:]), None)
        up = _scaled_up(self).reshape(*self.lora_up.shape, *[1] * (weight.dim() - 2))
        beside = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3](hidden, up)
        return outputs + beside


def _scaled_up(layer: Any) -> Tensor:
    """The second factor times the scale: it is smaller than what it gives."""
    scaled: Tensor = layer.lora_up * layer.lora_settings.scale
    return scaled


def _base_weight(layer: Any) -> Tensor:
    weight = tensor_tables(layer)[0][_weight_name(layer.lora_base)]
    assert weight is not None
    return weight


def _dropped(layer: Any, inputs: Tensor) -> Tensor:
    share = layer.lora_settings.dropout
    return F.dropout(inputs, share, training=True) if share and layer.training else inputs


def _weight_name(kind: type[nn.Module]) -> str:
    return "in_proj_weight" if issubclass(kind, nn.MultiheadAttention) else "weight"


@cache
def _adapted(kind: Hashable) -> type[nn.Module]:
    """The subclass of a layer's class that adds the factors."""

    def weight(self: Any) -> Any:
        return _base_weight(self) + self.lora_product()

    assert isinstance(kind, type)
    own: type = _LowRankLayer
    if _sees_inputs(kind):
        own = _LowRankLinear if issubclass(kind, nn.Linear) else _LowRankConvolution
    # Whoever reads the weight, such as a layer's own forward or a fused kernel, gets the sum.
    members = {_weight_name(kind): property(weight), "lora_base": kind, "__module__": __name__}
    return type(f"LowRank{kind.__name__}", (own, kind), members)


def _sees_inputs(kind: type[nn.Module]) -> bool:
    """Whether the layer computes as torch's own does, so that the factors can be applied to its inputs."""
    return kind.forward in _PLAIN_FORWARDS


class Adaptation(NamedTuple):
    """What `adapt` did.

    Args:
        layers: names of the layers that have factors.
        parameters: numbers in their factors.
        left_out: reason -> how many layers that the targets match have none.
    """

    layers: list[str]
    parameters: int
    left_out: dict[str, int]

    def __str__(self) -> str:
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return f"LoRA: {len(self.layers)} layers, {self.parameters:,} parameters" + (f" ({reasons})" if reasons else "")


def adapt(module: nn.Module, roots: Iterable[nn.Module], settings: LowRank, seed: int) -> Adaptation:
    """Give the layers below `roots` that the settings name their factors; layers that have the same keep theirs.

    The first factor is drawn from the seed, the second is zero, so the outputs stay what they are.

    Raises:
        UsageError: no layer can be adapted, or some are with other settings.
    """
    present = adapted_layers(module)
    others = {layer.lora_settings for layer in present.values()} - {settings}
    if others:
        raise UsageError(
            f"the model has LoRA factors of rank {others.pop().rank} with other settings already",
            fix="model.merge_lora()",
        )
    if not present:
        found, left_out = _find_layers(module, roots, settings)
        with seeded_generators(derive_seed("lora", seed)):
            for layer in found.values():
                _add_factors(layer, settings)
        present = adapted_layers(module)
    else:
        left_out = {}
    size = sum(getattr(layer, name).numel() for layer in present.values() for name in _FACTORS)
    return Adaptation(list(present), size, left_out)


def adapt_for(run: FitRun) -> None:
    """Give the layers that a run's strategy trains by factors theirs, before anybody looks at the parameters.

    Raises:
        UsageError: the module has factors, and the run would not train them.
    """
    settings = None if run.finetuning is None else run.finetuning.lora
    if settings is not None:
        adaptation = adapt(run.module, run.module.parts_to_freeze(), settings, run.seed)
        if run.trainer.enable_model_summary:
            run.trainer.say(str(adaptation))
    elif adapted_layers(run.module):
        raise UsageError(
            "the model has LoRA factors, and this run would not train them",
            fix='model.merge_lora() before the fit, or strategy="lora:8" with the same rank',
        )


def _find_layers(
    module: nn.Module, roots: Iterable[nn.Module], settings: LowRank
) -> tuple[dict[str, Any], dict[str, int]]:
    inside = {id(part) for root in roots for part in root.modules()}
    candidates = {
        unwrapped_name(n): p for n, p in module.named_modules() if id(p) in inside and _weight_in(p) is not None
    }
    for pattern in settings.targets:
        if not any(_matches(name, pattern) for name in candidates):
            ends = {name.rpartition(".")[2] for name in candidates} | set(candidates)
            fix = did_you_mean(pattern, sorted(ends)) or 'targets: ["*"]'
            raise UsageError(f"lora.targets: no linear or convolutional layer is called {pattern!r}", fix=fix)
    wanted = {n: p for n, p in candidates.items() if any(_matches(n, pattern) for pattern in settings.targets)}
    uses = Counter(id(_weight_in(part)) for part in module.modules())
    reasons = {name: _why_not(part, settings.rank, uses[id(_weight_in(part))]) for name, part in wanted.items()}
    found = {name: part for name, part in wanted.items() if not reasons[name]}
    left_out = Counter(reason for reason in reasons.values() if reason)
    if not found:
        reason = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise UsageError("no layer of the backbone can be adapted", why=reason, fix="a smaller rank: lora:1")
    deaf = [name for name, part in found.items() if settings.dropout and not _sees_inputs(type(part))]
    if deaf:
        raise UsageError(
            f"lora.dropout cannot be applied to {deaf[0]}",
            why="it computes with its weight itself, so nothing can be dropped from the inputs of its factors",
            fix="dropout: 0, or targets that leave it out",
        )
    return found, dict(left_out)


def _weight_in(part: nn.Module) -> Tensor | None:
    """The weight that could be adapted, None if this is no such layer."""
    kind = type(part)
    is_layer = isinstance(part, (nn.Linear, nn.MultiheadAttention, *_CONVOLUTIONS))
    weight = tensor_tables(part)[0].get(_weight_name(kind)) if is_layer else None
    return None if weight is None or is_lazy(weight) else weight


def _why_not(part: nn.Module, rank: int, uses: int) -> str:
    weight = _weight_in(part)
    assert weight is not None
    if isinstance(part, _CONVOLUTIONS) and part.groups == part.in_channels > 1:
        return "depthwise layers are left out"
    if rank * (weight.shape[0] + weight[0].numel()) >= weight.numel():
        return "layers are not larger than their factors would be"
    return "layers share their weight" if uses > 1 else ""


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _add_factors(layer: nn.Module, settings: LowRank) -> None:
    """Give a layer its factors: the first drawn from the process's generator, the second zero."""
    weight = _weight_in(layer)
    assert weight is not None
    rows, columns = weight.shape[0], weight[0].numel()
    down = torch.empty(settings.rank, columns)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    layer.lora_settings = settings  # type: ignore[assignment]
    layer.lora_down = nn.Parameter(down.to(weight))
    layer.lora_up = nn.Parameter(torch.zeros(rows, settings.rank).to(weight))
    kind: Any = type(layer)
    layer.__class__ = _adapted(kind)


def adapted_layers(module: nn.Module) -> dict[str, Any]:
    """The layers that have factors, by their own names."""
    return {unwrapped_name(n): part for n, part in module.named_modules() if isinstance(part, _LowRankLayer)}


def factor_names(module: nn.Module) -> set[str]:
    """The names of all factors in the module's state dict."""
    return {f"{name}.{factor}" for name in adapted_layers(module) for factor in _FACTORS}


def merge(module: nn.Module) -> int:
    """Add the factors to the weights and take them away; gives how many layers had some."""
    layers = adapted_layers(module)
    with torch.no_grad():
        for layer in layers.values():
            weight = _base_weight(layer)
            weight.copy_(_sum(layer))
            for name in (*_FACTORS, "lora_settings"):
                delattr(layer, name)
            layer.__class__ = layer.lora_base
    return len(layers)


def _sum(layer: Any) -> Tensor:
    """Weight and product, added in at least single precision."""
    weight = _base_weight(layer).detach()
    wide = torch.promote_types(weight.dtype, torch.float32)
    product: Tensor = (layer.lora_up.detach().to(wide) @ layer.lora_down.detach().to(wide)) * layer.lora_settings.scale
    return (weight.to(wide) + product.reshape(weight.shape)).to(weight.dtype)


def merged_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict as it would be after `merge`; the module stays as it is."""
    state: dict[str, Tensor] = dict(module.state_dict())
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, _LowRankLayer):
            own = unwrapped_name(name)
            for factor in _FACTORS:
                del state[f"{own}.{factor}" if f"{own}.{factor}" in state else f"{name}.{factor}"]
            key = f"{own}.{_weight_name(layer.lora_base)}"
            state[key if key in state else f"{name}.{_weight_name(layer.lora_base)}"] = _sum(layer)
    return state


# ---- in checkpoints


def describe_adapters(module: nn.Module) -> dict[str, Any]:
    """`{"lora": ...}` for a checkpoint, from which `restore_adapters` makes the layers again; empty without any."""
    layers = adapted_layers(module)
    if not layers:
        return {}
    settings = next(iter(layers.values())).lora_settings
    return {
        "lora": {
            "rank": settings.rank,
            "alpha": settings.alpha,
            "dropout": settings.dropout,
            "targets": list(settings.targets),
            "layers": list(layers),
        }
    }


def restore_adapters(module: nn.Module, content: Mapping[str, Any], path: PathLike) -> None:
    """Give a module the factors that a checkpoint describes, if it has none; the weights are loaded afterwards.

    Raises:
        IntegrityError: the description is malformed, or does not fit the module or the file's own tensors.
    """
    described = content.get("lora")
    if described is None or adapted_layers(module):
        return
    settings, names = _read_description(described, path)
    parts = {unwrapped_name(name): part for name, part in module.named_modules()}
    state = content["state_dict"]
    for name in names:
        weight = _weight_in(parts[name]) if name in parts else None
        shapes = [tuple(state[key].shape) if (key := f"{name}.{one}") in state else () for one in _FACTORS]
        if weight is None or shapes != [(settings.rank, weight[0].numel()), (weight.shape[0], settings.rank)]:
            raise _damaged(path, f"layer {name!r} does not fit")
        with seeded_generators(0):  # the values are replaced, and the process's generators stay where they are
            _add_factors(parts[name], settings)


def _read_description(described: Any, path: PathLike) -> tuple[LowRank, list[str]]:
    if not isinstance(described, Mapping) or set(described) != {"rank", "alpha", "dropout", "targets", "layers"}:
        raise _damaged(path, "it has other keys")
    names = described["layers"]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise _damaged(path, "its layers are not a list of names")
    if not is_whole(described["rank"]) or len(set(names)) != len(names):
        raise _damaged(path, "its rank is invalid, or a layer is listed twice")
    try:
        targets = tuple(described["targets"])
        return LowRank(described["rank"], described["alpha"], described["dropout"], targets), list(names)
    except (UsageError, TypeError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from error


def _damaged(path: PathLike, why: str) -> IntegrityError:
    return IntegrityError(f"{path}: its description of LoRA factors cannot be used", why=why)
