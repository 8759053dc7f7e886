"""Optimizers and schedules by name, and what `configure_optimizers` may return: what cannot be meant is told."""

from __future__ import annotations

import pytest
import torch
from timm.optim import create_optimizer_v2

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.trainer.optimizers import (
    check_names,
    make_optimizer,
    make_scheduler,
    needs_closure,
    read_optimizers,
    weight_decay_of,
)


def weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2))]


def sgd(**group) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": weights(), **group}], lr=0.1)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("adamw", {"weight_decy": 0.1}, "did you mean 'weight_decay'"),
        ("adamw", {"weight_decay": -1}, "weight_decay"),
        ("sgd", {"nesterov": True}, "Nesterov"),
        ("muon", {}, "2D"),
        ("sgd", {"momentum": "much"}, "momentum"),
        ("sgd", {"lr": 1.0}, "learning_rate=0.001"),
        ("lbfgs", {}, "from configure_optimizers"),
    ],
)
def test_options_that_an_optimizer_cannot_take_are_usage_errors(name, options, words):
    with pytest.raises(UsageError, match=words):
        make_optimizer(name, weights(), 0.1, **options)


def test_names_are_checked_before_anything_is_built():
    with pytest.raises(UsageError, match="cannot be chosen by name"):
        check_names("LBFGS", "constant")
    with pytest.raises(UnknownNameError, match="did you mean 'adam'"):
        check_names("adamv", "constant")
    with pytest.raises(UsageError, match="by its name"):
        check_names(torch.optim.SGD, "constant")
    check_names("AdamW", "Cosine")


@pytest.mark.parametrize(
    "name", ["adagrad", "adam", "adamax", "adamw", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd"]
)
def test_an_optimizer_by_name_steps(name):
    parameters = weights()
    optimizer = make_optimizer(name, parameters, 0.1)
    parameters[0].sum().backward()
    optimizer.step()
    assert (parameters[0] < 1).all()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("steplr", {}, "step_size"),
        ("steplr", {"step_sise": 2}, "did you mean 'step_size'"),
        ("multisteplr", {"milestones": 3}, "cannot be made"),
        ("steplr", {"step_size": 2, "monitor": "val_loss"}, "monitor"),
        ("cosine", {"warmup": 0.1}, "did you mean 'warm_up'"),
        ("cosine", {"warm_up": 1.0}, "below 1"),
        ("cosine", {"warm_up": -0.1}, "below 1"),
        ("cosine", {"warm_up": True}, "below 1"),
        ("cosine", {"warm_up": "0.1"}, "below 1"),
        ("constant", {"warm_up": 0.1}, "no 'warm_up'"),
        ("reducelronplateau", {"monitor": 3}, "name of a metric"),
    ],
)
def test_options_that_a_schedule_cannot_take_are_usage_errors(name, options, words):
    with pytest.raises(UsageError, match=words):
        make_scheduler(name, sgd(), 10, lambda epoch: 5 * epoch, **options)


def test_a_schedule_has_options_of_any_name():
    rate = make_scheduler("onecyclelr", sgd(), 10, lambda epoch: 5 * epoch, total_steps=12, max_lr=0.2)
    assert rate.scheduler.total_steps == 12
    assert (
        make_scheduler(
            "ReduceLROnPlateau", sgd(), 10, lambda epoch: 5 * epoch, monitor="val_accuracy", mode="max"
        ).monitor
        == "val_accuracy"
    )
    assert make_scheduler("Constant", sgd(), None, lambda epoch: None) is None


def test_no_warm_up_begins_with_the_whole_rate():
    optimizer = sgd()
    make_scheduler("cosine", optimizer, 100, lambda epoch: 10 * epoch, warm_up=0)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_later_start_needs_epochs_of_a_known_length():
    with pytest.raises(UsageError, match="starts to train in epoch 3"):
        make_scheduler("cosine", sgd(start=3), 100, lambda epoch: None)
    optimizer = sgd(start=3)
    make_scheduler("cosine", optimizer, 100, lambda epoch: 10 * epoch)
    assert optimizer.param_groups[0]["lr"] == 0
    assert make_scheduler("cosine", sgd(start=0), 100, lambda epoch: None).interval == "step"


def test_optimizers_that_need_a_closure_are_known():
    scheduled = torch.optim.LBFGS(weights())
    torch.optim.lr_scheduler.StepLR(scheduled, 2)  # changes the optimizer's step
    assert needs_closure(type(scheduled))
    assert not needs_closure(torch.optim.AdamW)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"interval": "batch"}, '"epoch" or "step"'),
        ({"interval": 1}, '"epoch" or "step"'),
        ({"frequency": 0}, "at least 1"),
        ({"frequency": 1.5}, "at least 1"),
        ({"frequency": True}, "at least 1"),
        ({"frequency": "2"}, "at least 1"),
        ({"monitor": 5}, "name of a metric"),
        ({"intervall": "step"}, "did you mean 'interval'"),
        ({"scheduler": 3}, "step()"),
    ],
)
def test_settings_of_a_scheduler_are_checked(settings, words):
    optimizer = sgd()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    with pytest.raises(UsageError) as caught:
        read_optimizers({"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **settings}})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ({"optimiser": None}, "did you mean 'optimizer'"),
        ({"lr_scheduler": None}, "without `optimizer`"),
        ({"optimizer": "adam"}, "str where an optimizer"),
        (([torch.nn.Linear(1, 1)], []), "Linear where an optimizer"),
        ("adam", "returned str"),
    ],
)
def test_what_is_no_optimizer_is_told(returned, words):
    with pytest.raises(UsageError, match=words):
        read_optimizers(returned)


def test_settings_without_a_scheduler_are_told():
    with pytest.raises(UsageError, match="no `scheduler`"):
        read_optimizers({"optimizer": sgd(), "lr_scheduler": {"interval": "step"}})


@pytest.mark.parametrize("name", ["lamb", "timm/adamw", "adopt", "nesterovw"])
def test_an_optimizer_of_timms_factory_is_timms(name):
    ours, theirs = weights(), weights()
    made = make_optimizer(name, ours, 0.1, weight_decay=0.01)
    options = {"lr": 0.1, "weight_decay": 0.01, "filter_bias_and_bn": False}
    expected = create_optimizer_v2(theirs, name.removeprefix("timm/"), **options)
    assert type(made) is type(expected)
    for optimizer, parameters in ((made, ours), (expected, theirs)):
        for _ in range(3):
            parameters[0].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(ours[0], theirs[0])


def test_a_bare_name_that_both_have_is_torchs():
    assert type(make_optimizer("adamw", weights(), 0.1)) is torch.optim.AdamW
    assert weight_decay_of("lamb", {}) == 0.01


@pytest.mark.parametrize(
    ("name", "words"),
    [("lamp", "did you mean 'lamb'"), ("timm/lambd", "'timm/lamb"), ("adahessian", "second derivatives")],
)
def test_what_timms_factory_cannot_give_is_told(name, words):
    with pytest.raises(UsageError) as caught:
        check_names(name, "constant")
    assert words in f"{caught.value.what} {caught.value.fix}"
