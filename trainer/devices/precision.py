"""Number formats: what weights and batches are held in, how the forward pass computes, how gradients are applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from flashtask.core.errors import DivergedError, IntegrityError, UsageError, did_you_mean
from flashtask.core.library_internals import mark_as_stepped
from flashtask.trainer.batch_transfer import in_dtype
from flashtask.trainer.devices.accelerators import Accelerator, accelerator_of
from flashtask.trainer.devices.bfloat16_convolutions import bfloat16_convolutions, has_bad_gradients

__all__ = [
    "MixedPrecision",
    "Precision",
    "ScaledPrecision",
    "TruePrecision",
    "check_precision",
    "inference_precision",
    "record_precision",
    "recorded_precision",
    "resolve_precision",
    "take_formats",
    "take_recorded_precision",
]

#: every spelling -> the name that files and messages use
_NAMES = {
    **dict.fromkeys(("32", "32-true", "full"), "32"),
    **dict.fromkeys(("bf16", "bf16-mixed"), "bf16-mixed"),
    **dict.fromkeys(("16", "16-mixed"), "16-mixed"),
    **dict.fromkeys(("16-true", "half"), "16-true"),
    "bf16-true": "bf16-true",
    **dict.fromkeys(("64", "64-true", "double"), "64-true"),
    "auto": "auto",
}
_TRUE = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
#: mixed formats that a checkpoint records; weights in a true format show it themselves
_RECORDED = ("bf16-mixed", "16-mixed")
# These leave metrics as they are; `module.to(dtype)` would let counts and sums be kept in a half precision.
_CONVERSIONS: dict[torch.dtype, Callable[[nn.Module], nn.Module]] = {
    torch.float16: nn.Module.half,
    torch.bfloat16: nn.Module.bfloat16,
    torch.float64: nn.Module.double,
}


class Precision:
    """Float32 everywhere. Subclasses change the context of the forward pass, the backward pass or the step.

    A subclass that gives itself no `name` is called by its class in checkpoints and logs.
    """

    name = "32"
    #: what weights and the floating parts of batches are converted to; None leaves them as they are
    dtype: torch.dtype | None = None
    #: whether a step whose gradients overflow is left out, and is no divergence
    skips_overflow = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.name = cls.__dict__.get("name", cls.__name__)

    def convert_module(self, module: nn.Module) -> None:
        """Bring the weights into this format; those that a run in another one left behind come back to float32."""
        if vars(module).get("default_precision") in _TRUE:
            del module.default_precision
            module.float()

    def convert_batch(self, batch: Any) -> Any:
        """A batch in the format of the weights; needed only where `dtype` is not None."""
        return batch if self.dtype is None else in_dtype(batch, self.dtype)

    def forward(self) -> AbstractContextManager[Any]:
        """The context that the forward pass and the loss run in."""
        return nullcontext()

    @contextmanager
    def inference(self) -> Iterator[None]:
        """The context of evaluation, prediction and feature extraction: no gradients, and no TF32 in place of float32.

        The number format is that of `forward`.
        """
        with torch.no_grad(), _ieee_float32(), self.forward():
            yield

    def backward(self, loss: torch.Tensor, **options: Any) -> None:
        """Compute gradients; options are those of `Tensor.backward`."""
        self.scaled(loss).backward(**options)  # type: ignore[no-untyped-call]

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss as gradients are computed from it."""
        return loss

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring gradients to their true size, before they are clipped or looked at; once more changes nothing."""

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """Let the optimizer step; what it returns is returned."""
        return optimizer.step() if closure is None else optimizer.step(closure)

    def update(self) -> None:
        """All optimizers have stepped; without a step before it, nothing happens."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; nothing without a gradient scaler."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; called when a run is resumed."""


class TruePrecision(Precision):
    """Weights, batches and everything computed from them in one format other than float32.

    Args:
        name: `16-true`, `bf16-true` or `64-true`.
    """

    def __init__(self, name: str) -> None:
        self.name, self.dtype = name, _TRUE[name]

    def convert_module(self, module: nn.Module) -> None:
        """Convert floating parameters and buffers; the module remembers it, for stages that follow."""
        assert self.dtype is not None
        _CONVERSIONS[self.dtype](module)
        module.default_precision = self.name  # type: ignore[assignment]


class MixedPrecision(Precision):
    """bfloat16 where autocast allows it, float32 weights and gradients."""

    name = "bf16-mixed"
    computes_in = torch.bfloat16

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._has_bad_gradients = False

    def convert_module(self, module: nn.Module) -> None:
        """Weights stay in float32; what the module consists of decides how its gradients are best computed."""
        super().convert_module(module)
        self._has_bad_gradients = self.device.type == "cpu" and has_bad_gradients(module)

    def forward(self) -> AbstractContextManager[Any]:
        """Autocast for the device, with sound and fast gradients of convolutions on a CPU."""
        if self._has_bad_gradients and self.computes_in is torch.bfloat16 and torch.is_grad_enabled():
            return bfloat16_convolutions()
        return torch.autocast(self.device.type, dtype=self.computes_in)


class ScaledPrecision(MixedPrecision):
    """float16 where autocast allows it, with a gradient scaler: a step whose gradients overflow is left out.

    The scaler may change the scale in `update`. Gradients that were computed before it must be applied before it.
    """

    name = "16-mixed"
    computes_in = torch.float16
    skips_overflow = True
    #: at this scale gradients over 2^30 would fit into float16: what overflows now is NaN or has diverged
    least_scale = 2.0**-14

    def __init__(self, device: torch.device | str) -> None:
        super().__init__(device)
        self.scaler = torch.amp.GradScaler(self.device.type)
        self._unscaled: set[int] = set()
        self._updates = 0

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the scale."""
        return self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, unless this has been done since the last update."""
        if id(optimizer) not in self._unscaled and _has_gradients(optimizer):
            self.scaler.unscale_(optimizer)
            self._unscaled.add(id(optimizer))

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """Step unless a gradient overflowed.

        Raises:
            UsageError: the optimizer wants a closure.
        """
        if closure is not None:
            raise UsageError(
                f"{type(optimizer).__name__} with a closure cannot train in 16-mixed",
                why="an overflow in the middle of its step could not be left out",
                fix='precision="bf16-mixed" or "32"',
            )
        self.unscale(optimizer)
        if id(optimizer) not in self._unscaled:
            return optimizer.step()  # nothing of it has gradients
        returned = self.scaler.step(optimizer)
        # A step that is left out counts: schedulers would else warn that they go on without the optimizer.
        mark_as_stepped(optimizer)
        return returned

    def update(self) -> None:
        """Adapt the scale to whether gradients overflowed.

        Raises:
            DivergedError: they overflow whatever the scale.
        """
        if not self._unscaled:
            return
        self.scaler.update()
        self._unscaled.clear()
        self._updates += 1
        # On a GPU to read the scale is to wait for it, so it is not read each time.
        if self._updates % 16 == 0 and self.scaler.get_scale() < self.least_scale:
            raise DivergedError(
                "the gradients overflow at every scale, so no step is taken",
                why="there are NaN or infinite gradients behind a loss that is finite",
                fix='precision="32"; torch.autograd.set_detect_anomaly(True) shows where they come from',
            )

    def state_dict(self) -> dict[str, Any]:
        """The scale of the loss and the steps since it last changed."""
        return dict(self.scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the scale and its history."""
        self.scaler.load_state_dict(state)


@contextmanager
def _ieee_float32() -> Iterator[None]:
    """Let cuDNN compute convolutions in float32 itself; by default torch lets it round their inputs to TF32.

    What the user has set in torch stays: products of matrices in TF32, or cuDNN's switches in another state than
    they begin in.
    """
    cudnn: Any = torch.backends.cudnn
    if not torch.cuda.is_available() or not cudnn.conv.fp32_precision == cudnn.rnn.fp32_precision == "tf32":
        yield
        return
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = True


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def check_precision(precision: Any) -> Precision | str:
    """The object, or the name that files and messages use; no device is asked.

    Raises:
        UsageError: no precision has this name.
    """
    if isinstance(precision, Precision):
        return precision
    if isinstance(precision, type) and issubclass(precision, Precision):
        raise UsageError(
            f"precision={precision.__name__}: not an object but a class", fix=f"precision={precision.__name__}()"
        )
    name = _NAMES.get(str(precision))
    if name is None:
        choices = sorted(set(_NAMES.values()))
        raise UsageError(
            f"no precision named {precision!r}",
            fix=f"{did_you_mean(str(precision), _NAMES)} choose one of {', '.join(choices)}".strip(),
        )
    return name


def resolve_precision(precision: Any, device: torch.device, accelerator: Accelerator | None = None) -> Precision:
    """What training steps are computed in; `auto` is bf16-mixed where the device computes bfloat16 itself, else 32.

    Args:
        precision: `32`, `bf16-mixed`, `16-mixed`, `bf16-true`, `16-true`, `64-true`, `auto`, another spelling of one
            of these (16 and `bf16` are mixed), or an object, which is given back.
        device: where it is computed.
        accelerator: of the device; the registered one of its type if not given.

    Raises:
        UsageError: no precision has this name, or the device does not have it.
    """
    name = check_precision(precision)
    if isinstance(name, Precision):
        return name
    if name == "auto":
        accelerator = accelerator or accelerator_of(device)
        name = "bf16-mixed" if accelerator.computes_bfloat16(device) else "32"
    if name == "64-true" and device.type == "mps":
        raise UsageError(f"precision={precision!r}: MPS has no float64", fix='precision="32", or accelerator="cpu"')
    if name in _TRUE:
        return TruePrecision(name)
    return {"32": lambda _: Precision(), "bf16-mixed": MixedPrecision, "16-mixed": ScaledPrecision}[name](device)


def inference_precision(precision: Any, device: torch.device, accelerator: Accelerator | None = None) -> Precision:
    """What evaluation, prediction and feature extraction are computed in: what was asked for; `auto` is float32.

    Rounding may speed up gradients, but scores that are handed out must not depend on it: in bfloat16 they
    change with the number of images in a batch.

    Args:
        precision: as for `resolve_precision`.
        device: where it is computed.
        accelerator: of the device; the registered one of its type if not given.

    Raises:
        UsageError: no precision has this name, or the device does not have it.
    """
    name = check_precision(precision)
    return resolve_precision("32" if name == "auto" else name, device, accelerator)


def record_precision(module: nn.Module, precision: Any) -> None:
    """Let later stages on a module compute in the mixed format that a fit was explicitly asked for.

    Args:
        module: that is to be trained; its checkpoints take the format along.
        precision: what the Trainer was given; None leaves the module as it is.
    """
    if precision is None or isinstance(name := check_precision(precision), Precision) or name in _TRUE:
        return
    if name in _RECORDED:
        module.default_precision = name  # type: ignore[assignment]
    elif vars(module).get("default_precision") not in _TRUE:
        vars(module).pop("default_precision", None)


def recorded_precision(module: nn.Module) -> str | None:
    """The format that a fit was explicitly asked for, as a checkpoint stores it; None for float32 or `auto`."""
    recorded: str | None = vars(module).get("default_precision")
    return recorded if recorded in _RECORDED else None


def take_formats(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a newly built module the floating formats that its weights were stored in.

    A module that is in one of the true formats then is trained, evaluated and asked in it by default.

    Args:
        module: it takes the weights next.
        state: the weights of a checkpoint.
    """
    changed = False
    for name, own in module.state_dict(keep_vars=True).items():
        stored = state.get(name, own)
        both_float = all(isinstance(one, torch.Tensor) and one.is_floating_point() for one in (own, stored))
        if both_float and own.dtype != stored.dtype:
            own.data = own.data.to(stored.dtype)
            changed = True
    formats = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    names = [name for name, dtype in _TRUE.items() if formats == {dtype}]
    if changed and names:
        module.default_precision = names[0]  # type: ignore[assignment]


def take_recorded_precision(module: nn.Module, content: Mapping[str, Any]) -> None:
    """Let a loaded module compute in the format that its fit was explicitly asked for.

    Args:
        module: it is being built from the content.
        content: of a checkpoint.

    Raises:
        IntegrityError: the content names a format that no run records.
    """
    name = content.get("inference_precision")
    if name is None:
        return
    if name not in _RECORDED:
        raise IntegrityError(f"its inference_precision is {name!r}, and only {' and '.join(_RECORDED)} are recorded")
    module.default_precision = name
