"""Stochastic weight averaging: what is averaged, at which rates, with which statistics, and after a stop."""

from __future__ import annotations

import math
import os
import signal
import warnings

import pytest
import torch
from small import Net, digest, loaders, net
from torch.optim.swa_utils import SWALR, update_bn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from flashtask import EarlyStopping, LearningRateMonitor, Trainer, read_checkpoint, seeded
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.seeding import generator_states
from flashtask.trainer.callbacks.callback import LambdaCallback
from flashtask.trainer.callbacks.stochastic_weight_averaging import StochasticWeightAveraging, constant_rates
from flashtask.trainer.callbacks.weight_averaging import EMAWeightAveraging


def quiet(folder, *callbacks, **options):
    settings = {"max_epochs": 6, "seed": 3, "logger": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(output_dir=folder, callbacks=list(callbacks), **{**settings, **options})


def weights_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


class Epochs:
    """The weights and the rates at the end of every epoch's training."""

    def __init__(self):
        self.weights, self.rates = [], []
        self.callback = LambdaCallback(on_train_epoch_end=self._look)

    def _look(self, trainer, module):
        self.weights.append(weights_of(module))
        self.rates.append([group["lr"] for optimizer in trainer.fit_run.optimizers for group in optimizer.param_groups])


def mean_of(weights):
    """The mean of the parameters of several epochs."""
    names = [name for name, _ in net().named_parameters()]
    return {name: torch.stack([state[name] for state in weights]).mean(0) for name in names}


def assert_near(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


class Stepped(Net):
    """Two parameter groups with their own rates, and a schedule that steps with every optimizer step."""

    def configure_optimizers(self):
        groups = [{"params": self.head.parameters(), "lr": 0.05}, {"params": self.backbone.parameters(), "lr": 0.01}]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 42)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Recorded(Net):
    """Keeps the batches of its training steps, and with which weights they met."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def training_step(self, batch, batch_idx):
        self.steps.append((batch[0].clone(), self.training, self.head.weight.detach().clone()))
        return super().training_step(batch, batch_idx)


# ---- the average


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("kind", "accumulate"), [(Net, 1), (Stepped, 1), (Stepped, 3)])
def test_s32_the_module_ends_with_the_mean_of_the_last_epochs(tmp_path, kind, accumulate):
    epochs, module = Epochs(), kind()
    average = StochasticWeightAveraging(0.1, swa_epoch_start=0.5, annealing_epochs=2)
    quiet(tmp_path, epochs.callback, average, accumulate_grad_batches=accumulate).fit(module, *loaders())
    assert average.num_averaged == 3
    expected = mean_of(epochs.weights[3:])
    assert_near(module.state_dict(), expected)
    assert (expected["head.weight"] - epochs.weights[-1]["head.weight"]).abs().max() > 1e-3


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("start", "epochs", "first"), [(0.75, 4, 3), (0.75, 1, 0), (0.29, 100, 29), (2, 5, 2), (0, 3, 0)]
)
def test_s32_the_start_is_a_share_of_the_epochs_or_an_epoch(tmp_path, start, epochs, first):
    average = StochasticWeightAveraging(swa_epoch_start=start)
    trainer = quiet(tmp_path, average, max_epochs=epochs, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(net(), *loaders())
    assert average.num_averaged == epochs - first


@pytest.mark.parametrize(("steps", "averaged"), [(21, 2), (27, 1), (28, 2)])
def test_s32_a_share_of_a_run_that_steps_limit_is_one_of_its_own_epochs(tmp_path, steps, averaged):
    """An epoch has 7 steps; one that is cut short is an epoch of the run, and is not averaged."""
    average = StochasticWeightAveraging(swa_epoch_start=0.5)
    trainer = quiet(tmp_path, average, max_epochs=None, max_steps=steps)
    trainer.fit(net(), *loaders())
    assert (trainer.global_step, average.num_averaged) == (steps, averaged)


def test_s32_a_function_of_your_own_averages(tmp_path):
    epochs, module = Epochs(), net()
    counts = []

    def latest(average, value, count):
        counts.append(count)
        return average + 0.9 * (value - average)

    average = StochasticWeightAveraging(swa_epoch_start=3, avg_fn=latest)
    quiet(tmp_path, epochs.callback, average).fit(module, *loaders())
    first, second, third = (weights["head.weight"] for weights in epochs.weights[3:])
    expected = 0.1 * (0.1 * first + 0.9 * second) + 0.9 * third
    torch.testing.assert_close(module.head.weight.detach(), expected)
    assert sorted(set(counts)) == [1, 2]


def test_s32_until_the_start_the_run_is_as_without_it(tmp_path):
    plain, averaged = Epochs(), Epochs()
    quiet(tmp_path / "a", plain.callback).fit(net(), *loaders())
    quiet(tmp_path / "b", averaged.callback, StochasticWeightAveraging(swa_epoch_start=3)).fit(net(), *loaders())
    for epoch in range(3):
        for name, value in plain.weights[epoch].items():
            assert torch.equal(averaged.weights[epoch][name], value), (epoch, name)
    assert plain.rates[:3] == averaged.rates[:3]


def test_s32_frozen_weights_average_to_themselves(tmp_path):
    module = net()
    before = weights_of(module)
    average = StochasticWeightAveraging(0.05, swa_epoch_start=2)
    quiet(tmp_path, average).finetune(module, *loaders(), strategy="freeze")
    for name, value in module.backbone.state_dict(prefix="backbone.").items():
        assert torch.equal(value, before[name]), name  # statistics too
    assert not torch.equal(module.head.weight, before["head.weight"])


def test_s32_weights_that_are_unfrozen_meanwhile_are_averaged_from_the_start(tmp_path):
    epochs, module = Epochs(), net()
    average = StochasticWeightAveraging(0.05, swa_epoch_start=2)
    quiet(tmp_path, epochs.callback, average).finetune(module, *loaders(), strategy=("freeze_unfreeze", 4))
    assert_near(module.state_dict(), mean_of(epochs.weights[2:]))
    assert not torch.equal(epochs.weights[5]["backbone.0.weight"], epochs.weights[3]["backbone.0.weight"])


def test_s32_shared_weights_stay_shared(tmp_path):
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Linear(8, 8)
            self.extra.weight = self.backbone[3].weight

        def forward(self, inputs):
            return self.head(self.extra(self.backbone(inputs)))

    torch.manual_seed(1)
    epochs, module = Epochs(), Tied()
    quiet(tmp_path, epochs.callback, StochasticWeightAveraging(swa_epoch_start=4)).fit(module, *loaders())
    assert module.extra.weight is module.backbone[3].weight
    expected = (epochs.weights[4]["extra.weight"] + epochs.weights[5]["extra.weight"]) / 2
    torch.testing.assert_close(module.extra.weight.detach(), expected)
    saved = read_checkpoint(tmp_path / "averaged.ckpt")["state_dict"]
    assert torch.equal(saved["extra.weight"], module.extra.weight)
    assert torch.equal(saved["backbone.3.weight"], module.extra.weight)


@pytest.mark.long
def test_s32_a_compiled_part_is_averaged_under_its_own_names(tmp_path):
    compiled, plain = net(), net()
    compiled.backbone = torch.compile(compiled.backbone, backend="eager")
    for name, module in (("compiled", compiled), ("plain", plain)):
        average = StochasticWeightAveraging(0.05, 1)
        quiet(tmp_path / name, average, max_epochs=2, limit_val_batches=0).fit(module, loaders()[0])
    found, expected = (read_checkpoint(tmp_path / name / "averaged.ckpt") for name in ("compiled", "plain"))
    assert_equal_trees(found["state_dict"], expected["state_dict"])
    found, expected = (read_checkpoint(tmp_path / name / "last.ckpt")["callbacks"] for name in ("compiled", "plain"))
    assert_equal_trees(found["StochasticWeightAveraging"], expected["StochasticWeightAveraging"])


# ---- the rates


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("annealing", [0, 1, 3, 10])
def test_s32_the_rates_of_each_epoch_are_those_of_torch(tmp_path, strategy, annealing):
    epochs = Epochs()
    average = StochasticWeightAveraging([0.2, 0.002], 2, annealing, strategy)
    quiet(tmp_path, epochs.callback, average, max_epochs=7).fit(Stepped(), *loaders())
    begun_with = epochs.rates[1]
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in begun_with])
    reference = SWALR(optimizer, [0.2, 0.002], annealing, strategy)
    for epoch in range(2, 7):
        expected = [group["lr"] for group in optimizer.param_groups]
        assert epochs.rates[epoch] == pytest.approx(expected), epoch
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer did not step
            reference.step()


def test_s32_the_rates_go_from_where_a_schedule_left_them(tmp_path):
    """The epoch before the start ends with the step-wise schedule at half of its way."""
    epochs = Epochs()
    average = StochasticWeightAveraging([0.2, 0.002], 3, annealing_epochs=2, annealing_strategy="linear")
    quiet(tmp_path, epochs.callback, average).fit(Stepped(), *loaders())
    assert epochs.rates[2] == pytest.approx([0.025, 0.005])
    assert epochs.rates[3] == pytest.approx([0.025, 0.005])
    assert epochs.rates[4] == pytest.approx([0.1125, 0.0035])
    assert epochs.rates[5] == pytest.approx([0.2, 0.002])


def test_s32_without_rates_each_group_goes_to_half_of_its_first_one(tmp_path, capsys):
    epochs = Epochs()
    average = StochasticWeightAveraging(swa_epoch_start=3, annealing_epochs=1)
    quiet(tmp_path, epochs.callback, average).fit(Stepped(), *loaders())
    assert epochs.rates[4] == epochs.rates[5] == pytest.approx([0.025, 0.005])
    said = "epoch 3: averaging weights from here on; learning rates are 0.025, 0.005 from epoch 4 on"
    assert capsys.readouterr().err.count(said) == 1


def test_s32_schedulers_by_epoch_and_by_metric_stand_still_too(tmp_path):
    class Plateau(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            by_metric = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=10)
            by_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return [optimizer], [{"scheduler": by_metric, "monitor": "val_loss"}, by_epoch]

    epochs = Epochs()
    average = StochasticWeightAveraging(0.3, swa_epoch_start=1, annealing_epochs=0)
    quiet(tmp_path, epochs.callback, average, max_epochs=4).fit(Plateau(), *loaders())
    assert [rates[0] for rates in epochs.rates] == [0.1, 0.3, 0.3, 0.3]


def test_s32_a_monitor_and_the_log_have_the_rates_that_were_trained_with(tmp_path):
    epochs = Epochs()
    average = StochasticWeightAveraging(0.3, swa_epoch_start=1, annealing_epochs=0)
    trainer = quiet(tmp_path, LearningRateMonitor("epoch"), epochs.callback, average, max_epochs=3)
    trainer.fit(net(), *loaders())
    assert [row["lr-AdamW"] for row in trainer.fit_run.history] == [rates[0] for rates in epochs.rates]
    assert [row["learning_rate"] for row in trainer.fit_run.history] == [0.01, 0.3, 0.3]


def test_s32_several_optimizers_have_their_own_rates(tmp_path):
    class Two(Net):
        def training_step(self, batch, batch_idx, optimizer_idx):
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.backbone, self.head)]

    epochs, module = Epochs(), Two()
    average = StochasticWeightAveraging([0.1, 0.2], swa_epoch_start=4, annealing_epochs=0)
    quiet(tmp_path, epochs.callback, average).fit(module, *loaders())
    assert epochs.rates[3:] == [[0.05, 0.05], [0.1, 0.2], [0.1, 0.2]]
    assert_near(module.state_dict(), mean_of(epochs.weights[4:]))


# ---- the statistics


def test_s32_the_statistics_are_those_that_torch_computes_over_the_same_batches(tmp_path):
    module = Recorded()
    quiet(tmp_path, StochasticWeightAveraging(0.05, 4)).fit(module, *loaders())
    assert len(module.steps) == 6 * 7 + 7
    batches = [inputs for inputs, _, _ in module.steps[-7:]]
    for (last, _, _), again in zip(module.steps[-14:-7], batches, strict=True):
        assert torch.equal(last, again)  # the order of the last epoch once more
    assert all(training for _, training, _ in module.steps[-7:])
    assert all(torch.equal(weight, module.head.weight) for _, _, weight in module.steps[-7:])
    reference = Net()
    reference.load_state_dict({**module.state_dict(), "backbone.2.running_mean": torch.full((8,), 7.0)})
    update_bn(batches, reference)
    assert module.backbone[2].momentum == 0.1
    for name, value in reference.named_buffers():
        torch.testing.assert_close(module.state_dict()[name], value)


def test_s32_the_pass_leaves_no_other_trace(tmp_path):
    class Watched(Net):
        def __init__(self):
            super().__init__()
            self.accuracy = MulticlassAccuracy(3)
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("steps", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            self.seen += len(batch[0])
            self.steps = self.steps + 1
            self.accuracy(self(batch[0]), batch[1])
            self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    def look(trainer, module):
        found.append(
            {
                "generators": repr(generator_states()),
                "seen": (module.seen.item(), module.steps.item()),
                "counted": module.accuracy._update_count,
                "modes": [part.training for part in module.modules()],
                "logged": dict(trainer.fit_run.results.callback_values()),
                "hook": trainer.active_run.current_hook,
                "gradients": sum(p.grad is not None for p in module.parameters()),
            }
        )

    found = []
    before, after = (LambdaCallback(on_train_end=look) for _ in range(2))
    trainer = quiet(tmp_path, before, StochasticWeightAveraging(0.05, 4), after, max_epochs=None, max_steps=39)
    trainer.fit(Watched(), *loaders())
    assert found[0] | {"gradients": 0} == found[1] | {"gradients": 0}
    assert (found[0]["seen"], found[0]["counted"], found[0]["hook"]) == ((5 * 50 + 4 * 8, 39), 4, "train_end")


def test_s32_the_pass_takes_the_limit_and_the_augmentation_of_training(tmp_path):
    class Noise(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            return torch.rand(4) + index, index % 2

    train = DataLoader(seeded(Noise()), batch_size=4, shuffle=True)
    module = Recorded()
    quiet(tmp_path, StochasticWeightAveraging(0.05, 4), limit_train_batches=3).fit(module, train)
    assert len(module.steps) == 7 * 3
    for (last, _, _), (again, _, _) in zip(module.steps[-6:-3], module.steps[-3:], strict=True):
        assert torch.equal(last, again)


def test_s32_what_is_drawn_before_the_pass_does_not_change_it(tmp_path):
    """A loader that is left alone has an order that comes from the process's generators."""
    data = loaders()[0].dataset
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=30)
    modules = [net(), net()]
    for module, draw in zip(modules, (lambda *arguments: None, lambda *arguments: torch.rand(3)), strict=True):
        folder = tmp_path / str(modules.index(module))
        draws = LambdaCallback(on_train_end=draw)
        train = DataLoader(data, batch_size=8, sampler=sampler)
        quiet(folder, draws, StochasticWeightAveraging(0.05, 1), max_epochs=2).fit(module, train)
    assert digest(modules[0]) == digest(modules[1])


@pytest.mark.long
def test_s32_a_compiled_part_is_not_compiled_again_for_the_pass(tmp_path):
    class Body(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8)

        def forward(self, inputs):
            return self.norm(self.layer(inputs)).relu()

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compiled, before, module = [], [], net()
    module.backbone = torch.compile(Body(), backend=backend)
    count = LambdaCallback(on_train_end=lambda trainer, module: before.append(len(compiled)))
    average = StochasticWeightAveraging(0.05, 1)
    quiet(tmp_path, count, average, max_epochs=2, limit_val_batches=0).fit(module, loaders()[0])
    assert before == [len(compiled)]
    assert before[0] > 0


def test_s32_a_part_that_a_hook_keeps_in_eval_mode_keeps_its_statistics(tmp_path):
    class Kept(Net):
        def on_train_epoch_start(self):
            self.backbone.eval()

    module, again = Kept(), Kept()
    before = weights_of(module)
    quiet(tmp_path, StochasticWeightAveraging(0.05, 4)).fit(module, *loaders())
    quiet(tmp_path, StochasticWeightAveraging(0.05, 4)).fit(again, *loaders(), ckpt_path=tmp_path / "last.ckpt")
    for name, value in module.named_buffers():
        assert torch.equal(value, before[name]), name
    assert digest(again) == digest(module)


def test_s32_without_batchnorm_there_is_no_pass(tmp_path, capsys):
    class Linear(Recorded):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Linear(4, 8)

    module = Linear()
    quiet(tmp_path, StochasticWeightAveraging(0.05, 4)).fit(module, *loaders())
    assert len(module.steps) == 6 * 7
    assert "BatchNorm" not in capsys.readouterr().err


def test_s32_a_training_step_may_compute_gradients_of_its_own(tmp_path):
    class Penalized(Net):
        def training_step(self, batch, batch_idx):
            inputs = batch[0].clone().requires_grad_()
            loss = torch.nn.functional.cross_entropy(self(inputs), batch[1])
            (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
            return loss + slope.square().sum()

    module = Penalized()
    quiet(tmp_path, StochasticWeightAveraging(0.05, 1), max_epochs=2).fit(module, *loaders())
    assert module.backbone[2].num_batches_tracked.item() == 7


# ---- what is left behind


def test_s32_the_average_is_in_a_file_of_its_own_and_last_can_be_continued(tmp_path, capsys):
    epochs, module = Epochs(), net()
    trainer = quiet(tmp_path, epochs.callback, StochasticWeightAveraging(0.05, 4))
    trainer.fit(module, *loaders())
    averaged = read_checkpoint(tmp_path / "averaged.ckpt")
    assert all(torch.equal(averaged["state_dict"][name], value) for name, value in module.state_dict().items())
    assert "progress" not in averaged
    assert averaged["metrics"] == {}  # nobody has measured these weights
    assert digest(Net.load_from_checkpoint(tmp_path / "averaged.ckpt")) == digest(module)
    last = read_checkpoint(tmp_path / "last.ckpt")
    assert all(torch.equal(last["state_dict"][name], value) for name, value in epochs.weights[-1].items())
    assert last["metrics"]["val_loss"] > 0
    said = capsys.readouterr().err
    assert "the module holds the averaged weights of epochs 4 to 5; " in said
    assert f"BatchNorm's statistics are computed for it; it is in {tmp_path / 'averaged.ckpt'}\n" in said


def test_s32_the_best_weights_are_not_put_over_the_average(tmp_path, capsys):
    epochs, module = Epochs(), net()
    trainer = quiet(tmp_path, epochs.callback, StochasticWeightAveraging(0.05, 4))
    trainer.finetune(module, *loaders(), strategy="no_freeze", restore_best=True)
    assert_near(module.state_dict(), mean_of(epochs.weights[4:]))
    assert "the best epoch's weights are not put back over it" in capsys.readouterr().err
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = read_checkpoint(tmp_path / "saved.ckpt")["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in module.state_dict().items())


def test_s32_without_checkpoints_no_file_is_written(tmp_path, capsys):
    trainer = quiet(tmp_path / "run", StochasticWeightAveraging(0.05, 4), enable_checkpointing=False)
    trainer.fit(net(), *loaders())
    assert not (tmp_path / "run").exists()
    assert "the averaged weights of epochs 4 to 5" in capsys.readouterr().err


def test_s32_a_run_that_ends_before_the_start_says_so_and_keeps_its_best(tmp_path, capsys):
    module, plain = net(), net()
    stop = EarlyStopping("val_loss", stopping_threshold=10.0, mode="min")
    trainer = quiet(tmp_path / "a", stop, StochasticWeightAveraging(0.05, 4))
    trainer.finetune(module, *loaders(), strategy="no_freeze")
    assert "the run ended before epoch 4 was complete, so nothing was averaged" in capsys.readouterr().err
    assert trainer.current_epoch == 1
    assert not (tmp_path / "a" / "averaged.ckpt").exists()
    quiet(tmp_path / "b", max_epochs=1).finetune(plain, *loaders(), strategy="no_freeze")
    assert digest(module) == digest(plain)


def test_s32_a_short_trial_run_is_not_refused_and_averages_its_only_epoch(tmp_path):
    for start, averaged in ((3, 0), (0.75, 1)):
        module, average = net(), StochasticWeightAveraging(swa_epoch_start=start)
        trainer = Trainer(
            fast_dev_run=2, callbacks=average, enable_progress_bar=False, default_root_dir=tmp_path, accelerator="cpu"
        )
        trainer.fit(module, *loaders())
        assert average.num_averaged == averaged
        assert module.backbone[2].num_batches_tracked.item() == 2


# ---- stopped and continued


def ending(folder):
    content = read_checkpoint(folder / "last.ckpt")
    state = content["callbacks"]["StochasticWeightAveraging"]
    return {
        "weights": content["state_dict"],
        "averaged": read_checkpoint(folder / "averaged.ckpt")["state_dict"],
        "average": state["average"],
        "rest": [state["count"], state["begun_at"], state["rates"], state["targets"], state["in_eval_mode"]],
        "momentum": content["optimizer_states"][0]["state"],
        "rates": [group["lr"] for group in content["optimizer_states"][0]["param_groups"]],
        "torch": content["random"]["torch"],
        "metrics": content["metrics"],
    }


def assert_equal_trees(found, expected, where="state"):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_equal_trees(found[key], value, f"{where}/{key}")
    else:
        assert found == expected, where


def signal_at(hook, count):
    """Ask the run to end when a hook has been called so many times."""
    left = [count]

    def look(*arguments):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    return LambdaCallback(**{f"on_{hook}": look})


def stepped(seed=1):
    torch.manual_seed(seed)
    return Stepped()


def averaging():
    return StochasticWeightAveraging(0.1, swa_epoch_start=0.5, annealing_epochs=2)


@pytest.fixture(scope="module", params=[1, 3])
def undisturbed(request, tmp_path_factory):
    folder, module = tmp_path_factory.mktemp("undisturbed"), stepped()
    quiet(folder, averaging(), accumulate_grad_batches=request.param).fit(module, *loaders())
    return request.param, ending(folder), digest(module)


@pytest.mark.long
@pytest.mark.parametrize(
    ("hook", "count"),
    [
        ("train_batch_end", 9),  # in the middle of epoch 1, before the start
        ("epoch_end", 3),  # the last hook before the start
        ("train_epoch_start", 4),  # the first one after it
        pytest.param("train_batch_end", 3 * 7 + 2, marks=pytest.mark.long),
        ("epoch_end", 4),
        pytest.param("train_batch_start", 4 * 7 + 6, marks=pytest.mark.long),
        ("validation_batch_end", 2 + 4 * 7 + 3),
        pytest.param("train_batch_end", 6 * 7, marks=pytest.mark.long),
        ("validation_batch_end", 2 + 5 * 7 + 3),
        pytest.param("epoch_end", 6, marks=pytest.mark.long),
    ],
)
def test_s32_a_run_stopped_anywhere_ends_with_the_same_bits(tmp_path, undisturbed, hook, count):
    accumulate, expected, final = undisturbed
    options = {"accumulate_grad_batches": accumulate}
    with pytest.raises(SystemExit):
        quiet(tmp_path, averaging(), signal_at(hook, count), **options).fit(stepped(), *loaders())
    module = stepped(seed=9)
    quiet(tmp_path, averaging(), **options).fit(module, *loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert digest(module) == final
    assert_equal_trees(ending(tmp_path), expected)


@pytest.mark.long
def test_s32_a_run_continued_again_and_again_ends_with_the_same_bits(tmp_path, undisturbed):
    accumulate, expected, final = undisturbed
    options = {"accumulate_grad_batches": accumulate}
    ckpt_path = None
    for count in (10, 12, 9, 4, 2):
        with pytest.raises(SystemExit):
            quiet(tmp_path, averaging(), signal_at("train_batch_end", count), **options).fit(
                stepped(), *loaders(), ckpt_path=ckpt_path
            )
        ckpt_path = tmp_path / "last.ckpt"
    module = stepped(seed=9)
    quiet(tmp_path, averaging(), **options).fit(module, *loaders(), ckpt_path=ckpt_path)
    assert digest(module) == final
    assert_equal_trees(ending(tmp_path), expected)


def test_s32_resuming_a_finished_run_gives_the_average_again(tmp_path, undisturbed):
    accumulate, expected, final = undisturbed
    options = {"accumulate_grad_batches": accumulate}
    quiet(tmp_path, averaging(), **options).fit(stepped(), *loaders())
    module = stepped(seed=9).eval()
    quiet(tmp_path, averaging(), **options).fit(module, *loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert not any(part.training for part in module.modules())
    assert digest(module) == final
    assert_equal_trees(ending(tmp_path), expected)


def test_s32_finetuning_stages_resume_with_the_same_bits(tmp_path):
    digests = []
    for name, stop in (("whole", None), ("stopped", 4 * 7 + 3)):
        if stop:
            with pytest.raises(SystemExit):
                quiet(tmp_path / name, averaging(), signal_at("train_batch_end", stop)).finetune(
                    net(), *loaders(), strategy="freeze_unfreeze:4"
                )
        module = net(seed=9 if stop else 1)
        resumed = tmp_path / name / "last.ckpt" if stop else None
        quiet(tmp_path / name, averaging()).finetune(
            module, *loaders(), strategy="freeze_unfreeze:4", ckpt_path=resumed
        )
        digests.append(digest(module))
    assert digests[0] == digests[1]


@pytest.mark.long
def test_s32_a_longer_run_goes_on_with_the_start_it_had(tmp_path):
    epochs, longer = Epochs(), averaging()
    quiet(tmp_path / "whole", epochs.callback, StochasticWeightAveraging(0.1, 3, 2), max_epochs=8).fit(
        whole := stepped(), *loaders()
    )
    trainer = quiet(tmp_path / "cut", averaging(), max_epochs=6)
    trainer.fit(stepped(), *loaders())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    with pytest.raises(SystemExit):
        quiet(tmp_path / "stopped", averaging(), signal_at("epoch_end", 3)).fit(stepped(), *loaders())
    for path in (tmp_path / "cut" / "last.ckpt", tmp_path / "after.ckpt", tmp_path / "stopped" / "last.ckpt"):
        module = stepped(seed=9)
        quiet(tmp_path / f"longer {path.parent.name}", longer, max_epochs=8).fit(module, *loaders(), ckpt_path=path)
        assert longer.num_averaged == 5
        assert digest(module) == digest(whole), path.name


def test_s32_a_signal_during_the_pass_leaves_the_weights_that_were_trained(tmp_path):
    class Interrupted(Recorded):
        def training_step(self, batch, batch_idx):
            if len(self.steps) == 6 * 7 + 2 and self.stops:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    modules = {}
    for stops in (True, False):
        torch.manual_seed(1)
        modules[stops] = Interrupted()
        modules[stops].stops = stops
    epochs = Epochs()
    quiet(tmp_path / "whole", StochasticWeightAveraging(0.1, 4)).fit(modules[False], *loaders())
    with pytest.raises(SystemExit):
        quiet(tmp_path / "cut", epochs.callback, StochasticWeightAveraging(0.1, 4)).fit(modules[True], *loaders())
    for name, value in modules[True].state_dict().items():
        assert torch.equal(value, epochs.weights[-1][name]), name
    assert len(modules[True].steps) == 6 * 7 + 3
    assert not (tmp_path / "cut" / "averaged.ckpt").exists()
    module = Interrupted()
    module.stops = False
    quiet(tmp_path / "cut", StochasticWeightAveraging(0.1, 4)).fit(
        module, *loaders(), ckpt_path=tmp_path / "cut" / "last.ckpt"
    )
    assert digest(module) == digest(modules[False])


def test_s32_half_precisions_are_averaged_in_float32(tmp_path):
    class Linear(Net):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Linear(4, 8)

    epochs, module = Epochs(), Linear()
    average = StochasticWeightAveraging(0.1, 2)
    quiet(tmp_path, epochs.callback, average, precision="bf16-true").fit(module, loaders()[0])
    expected = torch.stack([weights["head.weight"].float() for weights in epochs.weights[2:]]).mean(0)
    held = read_checkpoint(tmp_path / "last.ckpt")["callbacks"]["StochasticWeightAveraging"]["average"]
    torch.testing.assert_close(held["head.weight"], expected)
    torch.testing.assert_close(module.head.weight.detach(), expected.bfloat16())


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"swa_lrs": 0}, "swa_lrs=0"),
        ({"swa_lrs": [0.1, -0.1]}, r"swa_lrs=\[0\.1, -0\.1\]"),
        ({"swa_lrs": []}, r"swa_lrs=\[\]"),
        ({"swa_lrs": "high"}, "swa_lrs='high'"),
        ({"swa_lrs": math.inf}, "swa_lrs=inf"),
        ({"swa_epoch_start": 1.0}, r"swa_epoch_start=1\.0"),
        ({"swa_epoch_start": -1}, "swa_epoch_start=-1"),
        ({"swa_epoch_start": True}, "swa_epoch_start=True"),
        ({"swa_epoch_start": math.nan}, "swa_epoch_start=nan"),
        ({"annealing_epochs": -1}, "annealing_epochs=-1"),
        ({"annealing_epochs": 2.5}, r"annealing_epochs=2\.5"),
        ({"avg_fn": 0.9}, r"avg_fn=0\.9"),
    ],
)
def test_s32_arguments_that_cannot_be_meant_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        StochasticWeightAveraging(**options)


def test_s32_the_nearest_annealing_strategy_is_named():
    with pytest.raises(UnknownNameError, match="did you mean 'linear'"):
        StochasticWeightAveraging(annealing_strategy="linaer")


def test_s32_a_start_behind_the_end_is_refused_before_training(tmp_path):
    module = Recorded()
    with pytest.raises(UsageError, match="swa_epoch_start=6: the run has 6 epochs"):
        quiet(tmp_path, StochasticWeightAveraging(swa_epoch_start=6)).fit(module, *loaders())
    assert not module.steps


def test_s32_rates_for_another_number_of_groups_are_refused(tmp_path):
    with pytest.raises(UsageError, match="swa_lrs has 3 learning rates, and the optimizers have 2"):
        quiet(tmp_path, StochasticWeightAveraging([0.1, 0.1, 0.1], 0)).fit(Stepped(), *loaders())


def test_s32_a_share_of_an_unknown_number_of_epochs_is_refused(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TensorDataset(torch.randn(8, 4), torch.arange(8) % 2))

    train = DataLoader(Stream(), batch_size=4)
    with pytest.raises(UsageError, match="whose number is not known"):
        quiet(tmp_path / "a", StochasticWeightAveraging(), max_epochs=None, max_steps=6).fit(net(), train)
    average = StochasticWeightAveraging(swa_epoch_start=1)
    quiet(tmp_path / "b", average, max_epochs=None, max_steps=7).fit(net(), train)
    assert average.num_averaged == 2


def test_s32_statistics_of_a_module_that_steps_itself_are_refused(tmp_path):
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    class WithoutStatistics(Manual):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Linear(4, 8)

    with pytest.raises(UsageError, match="cannot compute BatchNorm's statistics"):
        quiet(tmp_path / "a", StochasticWeightAveraging()).fit(Manual(), *loaders())
    average = StochasticWeightAveraging(0.1)
    quiet(tmp_path / "b", average).fit(WithoutStatistics(), *loaders())
    assert average.num_averaged == 2


@pytest.mark.parametrize("other", [StochasticWeightAveraging, EMAWeightAveraging])
def test_s32_two_averages_are_refused(tmp_path, other):
    with pytest.raises(UsageError, match="two callbacks average"):
        quiet(tmp_path, other(), StochasticWeightAveraging()).fit(net(), *loaders())


def test_s32_a_paused_scheduler_is_no_setting(tmp_path):
    class Paused(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "is_paused": True}}

    with pytest.raises(UsageError, match="is_paused"):
        quiet(tmp_path).fit(Paused(), *loaders())


def test_s32_a_run_that_ends_before_its_rates_are_constant_says_so(tmp_path, capsys):
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=10)
    settings = {"max_epochs": 3, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(output_dir=tmp_path / "run", callbacks=swa, **settings).fit(net(), *loaders())
    assert "go towards 0.01, which they would reach in epoch 11, after the last one" in capsys.readouterr().err


def test_of_a_group_whose_biases_are_not_decayed_both_halves_have_its_rate():
    groups = [{"name": "head", "lr": 1.0}, {"name": "head", "lr": 1.0}, {"name": "backbone", "lr": 2.0}]
    assert constant_rates(groups, [0.5, 0.1]) == [0.5, 0.5, 0.1]
    with pytest.raises(UsageError, match="3 learning rates, and the optimizers have 2 parameter groups"):
        constant_rates(groups, [0.5, 0.5, 0.1])
    assert constant_rates([{"lr": 1.0}, {"lr": 1.0}], [0.5, 0.1]) == [0.5, 0.1]
