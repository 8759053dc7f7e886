"""`Accuracy` counts as the metric of torchmetrics that it stands for, and the engine takes it for a metric."""

from __future__ import annotations

import copy

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from flashtask.core.accuracy import Accuracy
from flashtask.core.metrics import is_metric
from flashtask.trainer.results import Results


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_it_is_what_torchmetrics_computes(classes):
    ours, theirs = Accuracy(classes), MulticlassAccuracy(classes, average="micro")
    for size in (1, 7, 32):
        outputs, targets = torch.randn(size, classes), torch.randint(classes, (size,))
        assert ours(outputs, targets) == theirs(outputs, targets)
        ours.update(outputs, targets)
        theirs.update(outputs, targets)
        assert ours.compute() == theirs.compute()
    ours.reset()
    assert ours.compute() == 0
    ours.update(torch.eye(classes), torch.arange(classes))
    assert ours.compute() == 1


def test_it_is_a_metric_and_leaves_nothing_in_a_state_dict():
    assert is_metric(Accuracy(2))
    assert not is_metric(Accuracy)
    assert Accuracy(2).state_dict() == {}
    assert is_metric(copy.deepcopy(Accuracy(2)))


def test_what_it_has_counted_survives_a_stop_in_the_middle_of_an_epoch():
    module = torch.nn.Module()
    module.accuracy = Accuracy(2)
    results = Results()
    module.accuracy.update(torch.eye(2), torch.tensor([0, 0]))
    results.log("validation_step", "val_accuracy", module.accuracy, 2)
    kept = copy.deepcopy(results.state_dict(module))
    module.accuracy.reset()
    again = Results()
    again.load_state_dict(kept, module)
    module.accuracy.update(torch.eye(2), torch.tensor([0, 1]))
    assert again.callback_values() == {"val_accuracy": 0.75}
