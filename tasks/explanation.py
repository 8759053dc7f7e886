"""Where in an image a prediction comes from: heat maps by attention or by gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from flashtask.core.errors import UsageError
from flashtask.core.library_internals import seen_attentions
from flashtask.data.decoding import Pixels
from flashtask.data.inputs import Input
from flashtask.data.transforms import eval_transform

if TYPE_CHECKING:
    from flashtask.tasks.task import Task

__all__ = ["HEAT_MAPS", "HeatMaps", "heat_maps", "heated", "heated_whole"]

#: Images at a time.
_BATCH = 16
#: The methods with what they show.
HEAT_MAPS = {
    "rollout": "Heat maps (attention rollout) show how much each place contributes to the features through attention.",
    "hirescam": "Heat maps (HiResCAM) show which places contribute to the largest output.",
}


class HeatMaps(NamedTuple):
    """Maps of some pictures.

    Args:
        method: one of `HEAT_MAPS`.
        maps: (h, w) each, over the whole input, from 0 to 1.
    """

    method: str
    maps: list[np.ndarray[Any, Any]]


def heat_maps(task: Task, inputs: Sequence[Input], method: str = "auto") -> HeatMaps | None:
    """Where in pictures their predictions come from.

    `hirescam` (Draelos and Carin, 2020) is the gradient of the largest output times the last features that have places,
    summed over channels: what speaks for that output. With a mean over the places and a linear head it is the same as
    Grad-CAM. `rollout` (Abnar and Zuidema, 2020) follows the attention of a transformer through all its blocks, half of
    it and half the tokens themselves: what the pooled features are made of, whatever the output.

    Args:
        task: in eval mode, with outputs (B, K).
        inputs: pictures.
        method: one of `HEAT_MAPS`, or `auto`: `rollout` for the transformers of timm with attention between all tokens
            and pooling by mean or class token, else `hirescam`.

    Returns:
        None if the backbone has no features with places, or the outputs are not one row an image; of `rollout` if it
        is no such transformer.

    Raises:
        UsageError: another method.
    """
    if method not in ("auto", *HEAT_MAPS):
        raise UsageError(f"there is no heat map {method!r}", fix=f"method is auto, {' or '.join(HEAT_MAPS)}")
    if eval_transform(task.preprocessing).is_tiled:
        return None
    with _frozen(task):
        for name, maps_of in (("rollout", _rolled_out), ("hirescam", _by_gradient)):
            if method in ("auto", name) and (found := maps_of(task, inputs)) is not None:
                return HeatMaps(name, found)
    return None


def _batches(task: Task, inputs: Sequence[Input]) -> Iterator[Tensor]:
    """The pictures as the model gets them."""
    transform = eval_transform(task.preprocessing)
    for start in range(0, len(inputs), _BATCH):
        own = inputs[start : start + _BATCH]
        yield torch.stack([transform.rest(one.read(transform.first)) for one in own]).to(task.device)


def _by_gradient(task: Task, inputs: Sequence[Input]) -> list[np.ndarray[Any, Any]] | None:
    found: list[np.ndarray[Any, Any]] = []
    place: nn.Module | None = None
    for images in _batches(task, inputs):
        if place is None and (place := _last_with_places(task, images[:1])) is None:
            return None
        found += _maps(task, place, images)
    return found


# ---- attention rollout


def _rolled_out(task: Task, inputs: Sequence[Input]) -> list[np.ndarray[Any, Any]] | None:
    """Maps by attention rollout; None if the backbone is not a transformer whose attentions can be followed."""
    model: Any = next((part for part in task.backbone.modules() if _is_transformer(part)), None)
    if model is None:
        return None
    found: list[np.ndarray[Any, Any]] = []
    for images in _batches(task, inputs):
        with torch.no_grad():
            attentions = _attentions(task, model, images)
        if not attentions or len({tuple(one.shape) for one in attentions}) > 1:
            return None  # windows, or tokens that are merged on the way
        grid = _sides(attentions[0].shape[-1] - model.num_prefix_tokens, task)
        if grid is None:
            return None
        rolled = torch.eye(attentions[0].shape[-1], device=images.device)
        for one in attentions:
            own = 0.5 * one + 0.5 * torch.eye(one.shape[-1], device=one.device)
            rolled = own @ rolled  # rows sum to 1, as those of both factors do
        pooled = rolled[:, 0] if model.global_pool == "token" else rolled[:, model.num_prefix_tokens :].mean(dim=1)
        maps = pooled[:, model.num_prefix_tokens :]
        least, most = maps.amin(dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)
        found += [*((maps - least) / (most - least).clamp(min=1e-12)).reshape(-1, *grid).cpu().numpy()]
    return found


def _is_transformer(part: nn.Module) -> bool:
    """Whether a module is a transformer of timm that pools its tokens by their mean or the class token."""
    has_parts = all(hasattr(part, name) for name in ("blocks", "num_prefix_tokens"))
    return has_parts and getattr(part, "global_pool", None) in ("token", "avg")


def _attentions(task: Task, model: Any, images: Tensor) -> list[Tensor]:
    """The attention of each block, the mean over its heads: (B, tokens, tokens); empty if one has none to be seen."""
    with seen_attentions(model.blocks) as seen:
        task(images)
    are_whole = len(seen) == len(model.blocks) and all(one.ndim == 4 and one.shape[2] == one.shape[3] for one in seen)
    return [one.float().mean(dim=1) for one in seen] if are_whole else []


# ---- gradients


@contextmanager
def _frozen(task: Task) -> Iterator[None]:
    """Eval mode and no gradients of weights; each part's own state comes back afterwards."""
    modes = [(part, part.training) for part in task.modules()]
    wanted = [(one, one.requires_grad) for one in task.parameters()]
    task.eval()
    for one, _ in wanted:
        one.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for one, requires in wanted:
            one.requires_grad_(requires)
        for part, mode in modes:
            part.training = mode


def _score(task: Task, images: Tensor) -> Tensor | None:
    """The sum of the largest outputs of the images; None if they are not numbers (B, K)."""
    outputs = task(images)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        return None
    return outputs.amax(dim=1).sum()


def _last_with_places(task: Task, image: Tensor) -> nn.Module | None:
    """The last module of the backbone whose output has places that the largest output depends on."""
    seen: list[tuple[nn.Module, Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and _grid(output, task) is not None:
            seen.append((module, output))

    with ExitStack() as stack:
        for part in task.backbone.modules():
            stack.callback(part.register_forward_hook(keep).remove)
        score = _score(task, image.clone().requires_grad_())
    if score is None or not score.requires_grad or not seen:
        return None
    # Of a transformer only whole tokens count, not the parts of them that attention is made of.
    if any(output.ndim == 3 for _, output in seen):
        seen = [one for one in seen if one[1].ndim == 3]
    gradients = torch.autograd.grad(score, [output for _, output in seen], allow_unused=True)
    for (module, _), gradient in zip(reversed(seen), reversed(gradients), strict=True):
        if gradient is not None and _places(gradient, task).abs().sum() > 0 and _is_once(module, seen):
            return module
    return None


def _is_once(module: nn.Module, seen: Sequence[tuple[nn.Module, Tensor]]) -> bool:
    return sum(one is module for one, _ in seen) == 1


def _grid(output: Tensor, task: Task) -> tuple[int, int] | None:
    """(height, width) of the places in features; None if they have none."""
    height, width = task.preprocessing.input_size[1:]
    if output.ndim == 3 and output.shape[2] == task.num_features:
        return next((grid for prefix in range(6) if (grid := _sides(output.shape[1] - prefix, task))), None)
    if output.ndim != 4:
        return None
    sides = output.shape[1:3] if _is_channels_last(output, task) else output.shape[2:]
    is_map = min(sides) > 1 and abs(sides[0] * width - sides[1] * height) <= width + height
    return (sides[0], sides[1]) if is_map else None


def _sides(tokens: int, task: Task) -> tuple[int, int] | None:
    """(height, width) of a grid of so many tokens over the input; None if they make none."""
    height, width = task.preprocessing.input_size[1:]
    rows = math.isqrt(max(0, tokens) * height // width)
    return (rows, rows * width // height) if rows > 1 and rows * (rows * width // height) == tokens else None


def _is_channels_last(output: Tensor, task: Task) -> bool:
    return output.shape[3] == task.num_features != output.shape[1]


def _places(output: Tensor, task: Task) -> Tensor:
    """Features (B, h, w, C)."""
    grid = _grid(output, task)
    assert grid is not None
    if output.ndim == 3:
        return output[:, output.shape[1] - grid[0] * grid[1] :].reshape(len(output), *grid, -1)
    return output if _is_channels_last(output, task) else output.permute(0, 2, 3, 1)


def _maps(task: Task, place: nn.Module, images: Tensor) -> list[np.ndarray[Any, Any]]:
    held: list[Tensor] = []

    def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())  # nothing before it needs a gradient
        return held[-1]

    with ExitStack() as stack:
        stack.callback(place.register_forward_hook(cut).remove)
        score = _score(task, images)
    assert score is not None
    (gradient,) = torch.autograd.grad(score, held)
    maps = (_places(gradient, task) * _places(held[0].detach(), task)).sum(dim=3).clamp(min=0)
    most = maps.flatten(1).amax(dim=1).clamp(min=1e-12)
    return [*(maps / most[:, None, None]).cpu().numpy()]


def heated(picture: Image.Image, heat: np.ndarray[Any, Any]) -> Image.Image:
    """A copy of a picture, in mode RGB, on which a heat map (h, w) over all of it lies in red and yellow."""
    whole = Image.fromarray((heat * 255).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    strength = np.asarray(whole, dtype=np.float32)[..., None] / 255
    colour = np.concatenate([np.full_like(strength, 255), 220 * strength, np.zeros_like(strength)], axis=2)
    pixels: Pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    share = 0.65 * strength
    return Image.fromarray((pixels * (1 - share) + colour * share).round().astype(np.uint8))


def heated_whole(task: Task, given: Input, side: int) -> Image.Image | None:
    """A picture as it is in its file, in mode RGB, with its heat map where the model has looked.

    Args:
        task: as for `heat_maps`.
        given: the picture; what the crop cuts off stays as it is.
        side: pixels that the longer side of the result has at the most.

    Returns:
        None as for `heat_maps`.
    """
    found = heat_maps(task, [given])
    if found is None:
        return None
    picture = given.thumbnail(side)
    picture.thumbnail((side, side))
    place = given.placed(task.preprocessing)
    edges = place.points_in_file(torch.tensor([(0, 0), place.size], dtype=torch.float64))
    edges = edges * torch.tensor([ours / whole for ours, whole in zip(picture.size, place.whole, strict=True)])
    left, top, right, bottom = edges.round().long().flatten().tolist()
    seen = Image.fromarray((found.maps[0] * 255).astype(np.uint8))
    seen = seen.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BICUBIC)
    heat = Image.new("L", picture.size)
    heat.paste(seen, (left, top))
    return heated(picture, np.asarray(heat, dtype=np.float32) / 255)
