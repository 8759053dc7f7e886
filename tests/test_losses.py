"""Losses by name against their formulas, computed sample by sample, and the rules for class weights."""

from __future__ import annotations

import math

import pytest
import torch
from timm.loss import BinaryCrossEntropy
from torch.nn import functional

from flashtask import ImageClassifier
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.tasks.head_drawing import building_without_weights
from flashtask.tasks.image_regression import ImageRegressor
from flashtask.tasks.losses import LABEL_LOSSES, LABELS_LOSSES, NUMBER_LOSSES, chosen_loss, class_weights

OUTPUTS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, -3.0], [-1.0, 4.0, 0.0], [0.0, 0.3, 0.6]])
TARGETS = torch.tensor([0, 2, 1, 1])
SEVERAL = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])


def named(known, given):
    loss = chosen_loss(given, known)
    assert loss is not None
    return loss


@pytest.mark.parametrize("gamma", [0.0, 2.0, 3.5])
def test_focal_is_the_formula(gamma):
    expected = 0.0
    for row, target in zip(OUTPUTS.tolist(), TARGETS.tolist(), strict=True):
        p = math.exp(row[target]) / sum(map(math.exp, row))
        expected += -((1 - p) ** gamma) * math.log(p) / len(OUTPUTS)
    for given in (("focal", {"gamma": gamma}), ["focal", {"gamma": gamma}], {"focal": {"gamma": gamma}}):
        found = named(LABEL_LOSSES, given)(OUTPUTS, TARGETS, None, 0.0)
        assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"gamma_neg": 2, "gamma_pos": 0, "clip": 0.0}, {"clip": 0.2}])
def test_asymmetric_is_the_formula(arguments):
    negative, positive, clip = ({"gamma_neg": 4, "gamma_pos": 1, "clip": 0.05} | arguments).values()
    expected = 0.0
    for row, labels in zip(OUTPUTS.tolist(), SEVERAL.tolist(), strict=True):
        for output, label in zip(row, labels, strict=True):
            p = 1 / (1 + math.exp(-output))
            shifted = max(p - clip, 0)
            one = (1 - p) ** positive * math.log(p) if label else shifted**negative * math.log(1 - shifted)
            expected -= one / OUTPUTS.numel()
    found = named(LABELS_LOSSES, ("asymmetric", arguments))(OUTPUTS, SEVERAL, None, 0.0)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_asymmetric_without_focusing_and_shift_is_binary_cross_entropy_also_for_certain_outputs():
    plain = named(LABELS_LOSSES, ("asymmetric", {"gamma_neg": 0, "gamma_pos": 0, "clip": 0}))
    torch.testing.assert_close(
        plain(OUTPUTS, SEVERAL, None, 0.1), named(LABELS_LOSSES, "bce")(OUTPUTS, SEVERAL, None, 0.1)
    )
    certain = (OUTPUTS * 1000).requires_grad_()
    loss = named(LABELS_LOSSES, "asymmetric")(certain, SEVERAL, None, 0.0)
    loss.backward()
    assert loss.isfinite()
    assert certain.grad is not None
    assert certain.grad.isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_of_one_label_is_that_of_timm(smoothing):
    found = named(LABEL_LOSSES, "bce")(OUTPUTS, TARGETS, None, smoothing)
    torch.testing.assert_close(found, BinaryCrossEntropy(smoothing=smoothing)(OUTPUTS, TARGETS))


def test_losses_of_numbers_are_those_of_torch():
    outputs, targets = torch.linspace(-3, 3, 8)[:, None], torch.zeros(8, 1)
    found = named(NUMBER_LOSSES, ("huber", {"delta": 0.25}))(outputs, targets)
    assert found == functional.huber_loss(outputs, targets, delta=0.25)
    found = named(NUMBER_LOSSES, {"smooth_l1": {"beta": 2.0}})(outputs, targets)
    assert found == functional.smooth_l1_loss(outputs, targets, beta=2.0)


@pytest.mark.parametrize(
    ("known", "given", "says"),
    [
        (LABEL_LOSSES, "focall", "did you mean 'focal'"),
        (LABEL_LOSSES, "asymmetric", "multi_label=True"),
        (LABEL_LOSSES, ("focal", {"gama": 1}), "did you mean 'gamma'"),
        (LABEL_LOSSES, ("cross_entropy", {"gamma": 1}), "takes no arguments"),
        (LABEL_LOSSES, ("focal", {"gamma": -1}), "gamma must be a number >= 0"),
        (LABELS_LOSSES, ("asymmetric", {"clip": 1}), "clip must be a number from 0 to below 1"),
        (NUMBER_LOSSES, ("huber", {"delta": 0}), "delta must be a number above 0"),
        (NUMBER_LOSSES, 3, "loss_fn must be huber, mse, l1, smooth_l1, or a callable"),
    ],
)
def test_what_is_no_loss_is_refused(known, given, says):
    with pytest.raises(UsageError) as caught:
        chosen_loss(given, known)
    assert says in f"{caught.value.what} {caught.value.fix}"


def test_class_weights_by_the_effective_number_of_samples():
    counts, labels, beta = {"a": 1, "b": 100, "c": 10_000}, ("a", "b", "c"), 0.999
    raw = [(1 - beta) / (1 - beta**n) for n in counts.values()]
    expected = torch.tensor([3 * one / sum(raw) for one in raw])
    torch.testing.assert_close(class_weights(("effective_number", {"beta": beta}), labels, counts), expected)
    # With few samples of each class it is nearly their inverse number, as `balanced`.
    few = {"a": 2, "b": 8}
    found = class_weights("effective_number", ("a", "b"), few)
    assert (found[0] / found[1]).item() == pytest.approx(4, rel=1e-3)


def test_tasks_take_losses_with_arguments_and_store_them():
    with building_without_weights():
        model = ImageClassifier("timm/test_resnet", 3, loss_fn=("focal", {"gamma": 1.0}), class_weights="balanced")
        regressor = ImageRegressor("timm/test_resnet", 1, loss_fn={"huber": {"delta": 0.1}})
    assert model.loss(OUTPUTS, TARGETS) == named(LABEL_LOSSES, ("focal", {"gamma": 1.0}))(OUTPUTS, TARGETS, None, 0.0)
    assert regressor.loss(torch.ones(2, 1), torch.zeros(2, 1)).item() == pytest.approx(0.1 * (1 - 0.05))
    assert model.hparams["loss_fn"] == ("focal", {"gamma": 1.0})
    with pytest.raises(UnknownNameError, match="beat"), building_without_weights():
        ImageClassifier("timm/test_resnet", 3, class_weights=("effective_number", {"beat": 0.9}))


def test_losses_of_certain_outputs_are_finite_with_every_argument():
    certain = torch.tensor([[30.0, -30.0], [-30.0, 30.0]])
    for losses, targets, given in (
        (LABEL_LOSSES, torch.tensor([0, 0]), ("focal", {"gamma": 0.5})),
        (LABELS_LOSSES, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), ("focal", {"gamma": 0.5})),
        (LABELS_LOSSES, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), ("asymmetric", {"clip": 0})),
    ):
        outputs = certain.clone().requires_grad_()
        loss = named(losses, given)(outputs, targets, None, 0.0)
        loss.backward()
        assert loss.isfinite(), given
        assert outputs.grad is not None
        assert outputs.grad.isfinite().all(), given
