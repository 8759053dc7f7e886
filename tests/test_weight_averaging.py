"""Averages of the weights over steps: what they are, who sees them, and that a resumed run has the same ones."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
from small import Net, digest, loaders, net
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from flashtask import Trainer, read_checkpoint
from flashtask.core.errors import UsageError
from flashtask.trainer.callbacks.callback import LambdaCallback
from flashtask.trainer.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging


def quiet(folder, *callbacks, **options):
    settings = {"max_epochs": 3, "seed": 3, "logger": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(output_dir=folder, callbacks=list(callbacks), **{**settings, **options})


def weights_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


class Steps:
    """The weights after every optimizer step, before anything else looks at them."""

    def __init__(self):
        self.weights = []
        self.callback = LambdaCallback(on_train_batch_end=self._look)

    def _look(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.weights):
            self.weights.append(weights_of(module))


def by_hand(values, decay):
    """The exponential moving average of floating-point values; of others, the last one."""
    average = values[0]
    for value in values[1:]:
        average = {
            name: decay * average[name] + (1 - decay) * tensor if tensor.is_floating_point() else tensor
            for name, tensor in value.items()
        }
    return average


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_near(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


class Grouped(Net):
    """Two parameter groups with their own rates, and a schedule that steps with every optimizer step."""

    def configure_optimizers(self):
        groups = [{"params": self.head.parameters(), "lr": 0.05}, {"params": self.backbone.parameters(), "lr": 0.01}]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize(("kind", "accumulate"), [(Net, 1), (Net, 3), (Grouped, 2)])
def test_s32_the_moving_average_is_the_one_computed_by_hand(tmp_path, kind, accumulate):
    steps = Steps()
    trainer = quiet(tmp_path, steps.callback, EMAWeightAveraging(decay=0.9), accumulate_grad_batches=accumulate)
    module = kind()
    trainer.fit(module, *loaders())
    assert len(steps.weights) == trainer.global_step == 3 * math.ceil(7 / accumulate)
    assert_near(module.state_dict(), by_hand(steps.weights, 0.9))
    moved = by_hand(steps.weights, 0.9)["head.weight"] - steps.weights[-1]["head.weight"]
    assert moved.abs().max() > 1e-3


def test_s32_without_a_function_all_steps_count_the_same(tmp_path):
    steps, average = Steps(), WeightAveraging(update_starting_at_step=4)
    module = net()
    quiet(tmp_path, steps.callback, average).fit(module, *loaders())
    assert average.num_averaged == 21 - 4
    mean = torch.stack([weights["head.weight"] for weights in steps.weights[4:]]).mean(0)
    torch.testing.assert_close(module.head.weight.detach(), mean)


def test_s32_a_function_for_one_tensor_gives_what_the_one_for_many_gives(tmp_path):
    one, many = net(), net()
    quiet(tmp_path / "a", WeightAveraging(get_ema_avg_fn(0.8))).fit(one, *loaders())
    quiet(tmp_path / "b", EMAWeightAveraging(0.8)).fit(many, *loaders())
    assert_near(one.state_dict(), many.state_dict())


def test_s32_the_decay_may_rise_as_the_documentation_shows(tmp_path):
    steps, module = Steps(), net()
    rising = WeightAveraging(lambda a, w, n: a.lerp(w, 1 - min(0.999, (1 + n) / (10 + n))))
    quiet(tmp_path, steps.callback, rising).fit(module, loaders()[0])
    expected = steps.weights[0]["head.bias"]
    for count, weights in enumerate(steps.weights[1:], 1):
        expected = expected + (1 - (1 + count) / (10 + count)) * (weights["head.bias"] - expected)
    torch.testing.assert_close(module.head.bias.detach(), expected)


def test_s32_averaging_does_not_change_what_is_trained(tmp_path):
    plain, averaged = Steps(), Steps()
    quiet(tmp_path / "a", plain.callback).fit(net(), *loaders())
    quiet(tmp_path / "b", averaged.callback, EMAWeightAveraging(0.5)).fit(net(), *loaders())
    assert len(plain.weights) == 21
    for left, right in zip(plain.weights, averaged.weights, strict=True):
        assert_same(left, right)


def test_s32_without_buffers_the_statistics_are_those_of_training(tmp_path):
    steps, module = Steps(), net()
    quiet(tmp_path, steps.callback, EMAWeightAveraging(0.9, use_buffers=False)).fit(module, *loaders())
    for name, value in module.named_buffers():
        assert torch.equal(value, steps.weights[-1][name]), name
    torch.testing.assert_close(module.head.weight.detach(), by_hand(steps.weights, 0.9)["head.weight"])


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("options", "updated"),
    [
        ({}, list(range(21))),
        ({"update_every_n_steps": 5}, [4, 9, 14, 19]),
        ({"update_starting_at_step": 18}, [18, 19, 20]),
        ({"update_starting_at_epoch": 2}, list(range(14, 21))),
        (
            {"update_every_n_steps": 2, "update_starting_at_step": 10, "update_starting_at_epoch": 1},
            [11, 13, 15, 17, 19],
        ),
    ],
)
def test_s32_updates_come_at_the_steps_that_were_asked_for(tmp_path, options, updated):
    steps, average, module = Steps(), EMAWeightAveraging(0.7, **options), net()
    quiet(tmp_path, steps.callback, average).fit(module, *loaders())
    assert average.num_averaged == len(updated)
    expected = by_hand([steps.weights[step] for step in updated], 0.7)
    torch.testing.assert_close(module.head.weight.detach(), expected["head.weight"])


def test_s32_a_rhythm_of_your_own_is_a_method(tmp_path):
    class AtEpochs(WeightAveraging):
        def should_update(self, step_idx, epoch_idx):
            asked.append((step_idx, epoch_idx))
            return step_idx % 7 == 6 and epoch_idx > 0

    asked, average = [], AtEpochs()
    quiet(tmp_path, average).fit(net(), *loaders())
    assert asked == [(step, step // 7) for step in range(21)]
    assert average.num_averaged == 2


# ---- who sees the average


def loss_of(state, data):
    module = net()
    module.load_state_dict(state)
    module.eval()
    values = [
        (len(targets), torch.nn.functional.cross_entropy(module(inputs), targets).item()) for inputs, targets in data
    ]
    return sum(count * value for count, value in values) / sum(count for count, _ in values)


def test_s32_validation_measures_the_average_and_training_goes_on_without_it(tmp_path):
    steps, seen, losses = Steps(), [], []
    watch = LambdaCallback(
        on_validation_batch_end=lambda trainer, module, *rest: seen.append(weights_of(module)),
        on_epoch_end=lambda trainer, module: losses.append(
            (trainer.callback_metrics["val_loss"], weights_of(module), [id(p) for p in module.parameters()])
        ),
    )
    module, (train, val) = net(), loaders()
    places = [(id(p), p.data_ptr()) for p in module.parameters()]
    quiet(tmp_path, steps.callback, EMAWeightAveraging(0.9), watch, num_sanity_val_steps=0).fit(module, train, val)
    for epoch, (loss, after, _) in enumerate(losses):
        expected = by_hand(steps.weights[: 7 * (epoch + 1)], 0.9)
        assert_near(seen[7 * epoch], expected)
        assert loss == pytest.approx(loss_of(expected, val), rel=1e-5)
        assert loss != pytest.approx(loss_of(after, val), rel=1e-3)
        assert_same(after, steps.weights[7 * (epoch + 1) - 1])
    assert [(id(p), p.data_ptr()) for p in module.parameters()] == places


def test_s32_the_sanity_check_sees_the_module_as_it_came(tmp_path):
    seen = []

    class Watched(Net):
        def validation_step(self, batch, batch_idx):
            seen.append((self.trainer.sanity_checking, digest(self)))

    module = Watched()
    before = digest(module)
    quiet(tmp_path, EMAWeightAveraging(0.9), max_epochs=1).fit(module, *loaders())
    assert [found for sanity, found in seen if sanity] == [before] * 2
    assert len({found for sanity, found in seen if not sanity}) == 1


def test_s32_a_test_within_the_fit_sees_the_average_too(tmp_path):
    seen = []

    def test(trainer, module):
        before = weights_of(module)
        trainer.test(module, loaders()[1])
        assert_same(weights_of(module), before)

    watch = LambdaCallback(
        on_train_epoch_end=test, on_test_batch_end=lambda trainer, module, *rest: seen.append(weights_of(module))
    )
    steps = Steps()
    quiet(tmp_path, steps.callback, EMAWeightAveraging(0.9), watch, max_epochs=1).fit(net(), *loaders())
    assert_near(seen[0], by_hand(steps.weights, 0.9))


def test_s32_a_test_within_validation_leaves_the_average_in_its_place(tmp_path):
    seen = []

    class Nested(Net):
        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking:
                before = digest(self)
                self.trainer.test(self, loaders()[1])
                seen.append((before, digest(self)))

    plain, steps = Steps(), Steps()
    for folder, callbacks in (("a", [plain.callback]), ("b", [steps.callback, EMAWeightAveraging(0.9)])):
        torch.manual_seed(1)
        quiet(tmp_path / folder, *callbacks).fit(Nested(), *loaders())
    assert len(seen) == 6
    assert all(before == after for before, after in seen)
    for left, right in zip(plain.weights, steps.weights, strict=True):
        assert_same(left, right)


def test_s32_an_error_within_validation_leaves_the_weights_that_train(tmp_path):
    class Fails(Net):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking and batch_idx == 2:
                raise RuntimeError("broken")

    steps, module = Steps(), Fails()
    with pytest.raises(RuntimeError, match="broken"):
        quiet(tmp_path, steps.callback, EMAWeightAveraging(0.5)).fit(module, *loaders())
    assert_same(module.state_dict(), steps.weights[-1])


def test_s32_an_error_in_a_test_within_the_fit_leaves_the_weights_that_train(tmp_path):
    class Fails(Net):
        def test_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    def test(trainer, module):
        before = digest(module)
        with pytest.raises(RuntimeError, match="broken"):
            trainer.test(module, loaders()[1])
        assert digest(module) == before
        tested.append(before)

    tested = []
    watch = LambdaCallback(on_train_epoch_end=test)
    quiet(tmp_path, EMAWeightAveraging(0.5), watch).fit(Fails(), *loaders())
    assert len(tested) == 3


def test_s32_stages_after_the_fit_see_the_average_and_leave_it(tmp_path):
    module, (train, val) = net(), loaders()
    trainer = quiet(tmp_path, EMAWeightAveraging(0.9))
    trainer.fit(module, train, val)
    before = weights_of(module)
    (metrics,) = trainer.validate(module, val)
    assert metrics["val_loss"] == pytest.approx(loss_of(before, val), rel=1e-5)
    assert_same(module.state_dict(), before)


# ---- checkpoints


def test_s32_checkpoints_hold_the_average_and_what_trains_beside_it(tmp_path):
    steps, module = Steps(), net()
    trainer = quiet(tmp_path, steps.callback, EMAWeightAveraging(0.9))
    trainer.fit(module, *loaders())
    content = read_checkpoint(tmp_path / "last.ckpt")
    assert_same(content["state_dict"], module.state_dict())
    trained = content["callbacks"]["EMAWeightAveraging"]["trained"]
    assert {"head.weight", "backbone.2.running_var"} <= set(trained)
    for name, value in trained.items():
        assert torch.equal(value, steps.weights[-1][name]), name
    loaded = Net.load_from_checkpoint(tmp_path / "last.ckpt")
    assert digest(loaded) == digest(module)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    content = read_checkpoint(tmp_path / "weights.ckpt")
    assert_same(content["state_dict"], module.state_dict())
    assert "callbacks" not in content


def test_s32_best_weights_are_the_average_that_was_measured(tmp_path):
    module, (train, val) = net(), loaders()
    trainer = quiet(tmp_path, EMAWeightAveraging(0.9))
    trainer.finetune(module, train, val, strategy="no_freeze", restore_best=True)
    best = read_checkpoint(tmp_path / "best.ckpt")
    assert best["metrics"]["val_loss"] == pytest.approx(loss_of(best["state_dict"], val), rel=1e-5)
    assert_same(module.state_dict(), best["state_dict"])
    (metrics,) = trainer.validate(module, val, ckpt_path="best")
    assert metrics["val_loss"] == pytest.approx(best["metrics"]["val_loss"], rel=1e-5)


def ending(folder):
    """All that a run came to: weights, what trains beside them, optimizer, schedule, generators, logged losses."""
    content = read_checkpoint(folder / "last.ckpt")
    kept = {key: content[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "random", "metrics")}
    return kept | {"averaging": content["callbacks"]["EMAWeightAveraging"]}


def assert_equal_trees(found, expected, where="state"):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_equal_trees(found[key], value, f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_equal_trees(found[index], value, f"{where}/{index}")
    elif type(expected).__module__ == "numpy":
        assert (found == expected).all(), where
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


SHAPES = {
    "every step": ({"decay": 0.9}, {}),
    "now and then, accumulating": (
        {"decay": 0.8, "update_every_n_steps": 2, "update_starting_at_step": 3},
        {"accumulate_grad_batches": 2},
    ),
}


@pytest.fixture(scope="module", params=SHAPES)
def undisturbed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    average, options = SHAPES[request.param]
    torch.manual_seed(1)
    module = Grouped()
    start = weights_of(module)
    quiet(folder, EMAWeightAveraging(**average), **options).fit(module, *loaders())
    return start, average, options, ending(folder), digest(module)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("hook", "count"),
    [
        ("train_batch_end", 1),
        ("train_batch_end", 6),
        ("train_batch_end", 12),
        ("before_optimizer_step", 5),
        ("validation_batch_end", 4 + 2),
        ("validation_start", 1 + 2),
        ("epoch_end", 2),
    ],
)
def test_s32_a_run_stopped_anywhere_goes_on_with_the_same_average(tmp_path, undisturbed, hook, count):
    start, average, options, expected, final = undisturbed
    module = Grouped()
    module.load_state_dict(start)
    with pytest.raises(SystemExit):
        quiet(tmp_path, EMAWeightAveraging(**average), signal_at(hook, count), **options).fit(module, *loaders())
    module = Grouped()
    quiet(tmp_path, EMAWeightAveraging(**average), **options).fit(module, *loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert_equal_trees(ending(tmp_path), expected)
    assert digest(module) == final


def test_s32_a_file_written_after_the_end_can_be_continued(tmp_path):
    whole, first, second = net(), net(), net(seed=9)
    quiet(tmp_path / "whole", EMAWeightAveraging(0.9)).fit(whole, *loaders())
    trainer = quiet(tmp_path / "cut", EMAWeightAveraging(0.9), max_epochs=2)
    trainer.fit(first, *loaders())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert_same(read_checkpoint(tmp_path / "after.ckpt")["state_dict"], first.state_dict())
    quiet(tmp_path / "more", EMAWeightAveraging(0.9)).fit(second, *loaders(), ckpt_path=tmp_path / "after.ckpt")
    assert digest(second) == digest(whole)


def test_s32_a_file_written_between_a_step_and_its_update_goes_on_with_the_same_bits(tmp_path):
    def save(trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 10:
            trainer.save_checkpoint(tmp_path / "between.ckpt")

    whole, resumed = net(), net(seed=9)
    quiet(tmp_path / "a", LambdaCallback(on_train_batch_end=save), EMAWeightAveraging(0.9)).fit(whole, *loaders())
    state = read_checkpoint(tmp_path / "between.ckpt")["callbacks"]["EMAWeightAveraging"]
    assert (state["count"], state["last_step"]) == (9, 9)
    quiet(tmp_path / "b", EMAWeightAveraging(0.9)).fit(resumed, *loaders(), ckpt_path=tmp_path / "between.ckpt")
    assert digest(resumed) == digest(whole)


def test_s32_resuming_a_finished_run_gives_the_average_again(tmp_path):
    whole, again = net(), net(seed=9)
    quiet(tmp_path, EMAWeightAveraging(0.9)).fit(whole, *loaders())
    quiet(tmp_path, EMAWeightAveraging(0.9)).fit(again, *loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert digest(again) == digest(whole)


def test_s32_a_run_that_is_resumed_averages_what_it_did(tmp_path):
    whole, resumed = net(), net(seed=9)
    quiet(tmp_path / "a", EMAWeightAveraging(0.9)).fit(whole, *loaders())
    quiet(tmp_path / "b", EMAWeightAveraging(0.9), max_epochs=1).fit(net(), *loaders())
    average = EMAWeightAveraging(0.9, use_buffers=False)
    quiet(tmp_path / "b", average).fit(resumed, *loaders(), ckpt_path=tmp_path / "b" / "last.ckpt")
    assert digest(resumed) == digest(whole)


# ---- what is averaged


def test_s32_frozen_weights_stay_and_unfrozen_ones_are_averaged(tmp_path):
    steps, module = Steps(), net()
    before = weights_of(module)
    quiet(tmp_path / "a", EMAWeightAveraging(0.9)).finetune(module, *loaders(), strategy="freeze", restore_best=False)
    for name, value in module.backbone.state_dict(prefix="backbone.").items():
        assert torch.equal(value, before[name]), name
    trained = read_checkpoint(tmp_path / "a" / "last.ckpt")["callbacks"]["EMAWeightAveraging"]["trained"]
    assert "head.weight" in trained
    module = net()
    quiet(tmp_path / "b", steps.callback, EMAWeightAveraging(0.9)).finetune(
        module, *loaders(), strategy=("freeze_unfreeze", 1), restore_best=False
    )
    assert_near(module.state_dict(), by_hand(steps.weights, 0.9))


def test_s32_what_no_optimizer_holds_is_not_copied(tmp_path):
    class HeadOnly(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    quiet(tmp_path, EMAWeightAveraging(0.9, use_buffers=False)).fit(HeadOnly(), *loaders())
    trained = read_checkpoint(tmp_path / "last.ckpt")["callbacks"]["EMAWeightAveraging"]["trained"]
    assert set(trained) == {"head.weight", "head.bias"}


class Tied(Net):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.backbone[3].weight = torch.nn.Parameter(torch.randn(8, 8) / 8)
        self.extra = torch.nn.Linear(8, 8)
        self.extra.weight = self.backbone[3].weight

    def forward(self, inputs):
        return self.head(self.extra(self.backbone(inputs)))


def test_s32_shared_weights_stay_shared_and_resume_with_the_same_bits(tmp_path):
    torch.manual_seed(1)
    steps, whole, resumed = Steps(), Tied(), Tied()
    start = weights_of(whole)
    quiet(tmp_path / "a", steps.callback, EMAWeightAveraging(0.9)).fit(whole, *loaders())
    assert whole.extra.weight is whole.backbone[3].weight
    assert_near(whole.state_dict(), by_hand(steps.weights, 0.9))
    resumed.load_state_dict(start)
    quiet(tmp_path / "b", EMAWeightAveraging(0.9), max_epochs=1).fit(resumed, *loaders())
    content = read_checkpoint(tmp_path / "b" / "last.ckpt")["state_dict"]
    assert torch.equal(content["extra.weight"], content["backbone.3.weight"])
    quiet(tmp_path / "b", EMAWeightAveraging(0.9)).fit(Tied(), *loaders(), ckpt_path=tmp_path / "b" / "last.ckpt")
    content = read_checkpoint(tmp_path / "b" / "last.ckpt")["state_dict"]
    assert_same(content, whole.state_dict())


@pytest.mark.long
def test_s32_a_compiled_part_is_averaged_under_its_own_names(tmp_path):
    compiled, plain = net(), net()
    compiled.backbone = torch.compile(compiled.backbone, backend="eager")
    for name, module in (("compiled", compiled), ("plain", plain)):
        quiet(tmp_path / name, EMAWeightAveraging(0.9), max_epochs=1, limit_val_batches=0).fit(module, loaders()[0])
    found, expected = (read_checkpoint(tmp_path / name / "last.ckpt") for name in ("compiled", "plain"))
    assert_same(found["state_dict"], expected["state_dict"])
    found, expected = (content["callbacks"]["EMAWeightAveraging"] for content in (found, expected))
    assert_equal_trees(found, expected)


def test_s32_infinite_and_temporary_buffers_are_left_alone(tmp_path):
    class Masked(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((2,), -torch.inf))
            self.register_buffer("cache", torch.zeros(2), persistent=False)

        def training_step(self, batch, batch_idx):
            self.cache = self.cache + 1
            return super().training_step(batch, batch_idx)

    module = Masked()
    quiet(tmp_path, EMAWeightAveraging(0.9)).fit(module, *loaders())
    assert module.mask.tolist() == [-math.inf] * 2
    assert module.cache.tolist() == [21.0] * 2


def test_s32_a_buffer_that_is_assigned_anew_is_averaged(tmp_path):
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            self.seen = self.seen + 1
            return super().training_step(batch, batch_idx)

    module = Counting()
    quiet(tmp_path, WeightAveraging()).fit(module, *loaders())
    assert module.seen.item() == pytest.approx(11)  # the mean of 1 to 21


def test_s32_several_optimizers_make_one_step(tmp_path):
    class Two(Net):
        def training_step(self, batch, batch_idx, optimizer_idx):
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.backbone, self.head)]

    steps, average, module = Steps(), EMAWeightAveraging(0.9), Two()
    quiet(tmp_path, steps.callback, average).fit(module, *loaders())
    assert average.num_averaged == 21
    assert_near(module.state_dict(), by_hand(steps.weights, 0.9))


def test_s32_half_precisions_are_averaged_in_float32_and_resume_with_the_same_bits(tmp_path):
    class Linear(Net):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Linear(4, 8)

    torch.manual_seed(1)
    steps, whole, resumed = Steps(), Linear(), Linear()
    start = weights_of(whole)
    options = {"precision": "bf16-true"}
    quiet(tmp_path / "a", steps.callback, EMAWeightAveraging(0.99), **options).fit(whole, loaders()[0])
    assert whole.head.weight.dtype == torch.bfloat16
    expected = by_hand([{n: v.float() for n, v in weights.items()} for weights in steps.weights], 0.99)
    torch.testing.assert_close(whole.head.weight.detach(), expected["head.weight"].bfloat16())
    resumed.load_state_dict(start)
    quiet(tmp_path / "b", EMAWeightAveraging(0.99), max_epochs=1, **options).fit(resumed, loaders()[0])
    again = Linear()
    quiet(tmp_path / "b", EMAWeightAveraging(0.99), **options).fit(
        again, loaders()[0], ckpt_path=tmp_path / "b" / "last.ckpt"
    )
    assert_same(again.state_dict(), whole.state_dict())


# ---- what is said, and what is refused


def test_s32_a_run_too_short_for_the_decay_is_told_so(tmp_path, capsys):
    quiet(tmp_path / "a", EMAWeightAveraging()).fit(net(), *loaders())
    assert "decay=0.999 remembers about 1000 updates and the run makes at most 21" in capsys.readouterr().err
    quiet(tmp_path / "b", EMAWeightAveraging(0.9)).fit(net(), *loaders())
    assert "remembers" not in capsys.readouterr().err


def test_s32_a_run_that_ends_before_the_first_update_is_as_without_it(tmp_path, capsys):
    plain, module = net(), net()
    quiet(tmp_path / "a").fit(plain, *loaders())
    quiet(tmp_path / "b", EMAWeightAveraging(0.5, update_starting_at_epoch=3)).fit(module, *loaders())
    assert digest(module) == digest(plain)
    assert "EMAWeightAveraging: the run ended before the first update" in capsys.readouterr().err
    assert_same(read_checkpoint(tmp_path / "b" / "last.ckpt")["state_dict"], plain.state_dict())


def test_s32_a_second_fit_begins_a_new_average(tmp_path):
    average = WeightAveraging()
    for folder in ("a", "b"):
        quiet(tmp_path / folder, average, max_epochs=1).fit(net(), *loaders())
        assert average.num_averaged == 7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decay": 1.0}, "decay=1.0"),
        ({"decay": -0.1}, "decay=-0.1"),
        ({"decay": "high"}, "decay='high'"),
        ({"update_every_n_steps": 0}, "update_every_n_steps=0"),
        ({"update_starting_at_step": -1}, "update_starting_at_step=-1"),
        ({"update_starting_at_step": 0.5}, "update_starting_at_step=0.5"),
        ({"update_starting_at_epoch": True}, "update_starting_at_epoch=True"),
    ],
)
def test_s32_arguments_that_cannot_be_meant_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        EMAWeightAveraging(**options)


def test_s32_functions_are_checked():
    with pytest.raises(UsageError, match=r"avg_fn=0\.9: a function"):
        WeightAveraging(0.9)
    with pytest.raises(UsageError, match="contradict each other"):
        WeightAveraging(avg_fn=get_ema_avg_fn(0.9), multi_avg_fn=get_ema_avg_fn(0.9))


def test_s32_two_averages_are_refused(tmp_path):
    with pytest.raises(UsageError, match="two callbacks average"):
        quiet(tmp_path, EMAWeightAveraging(), WeightAveraging()).fit(net(), *loaders())


def test_s32_a_module_without_trained_weights_is_refused(tmp_path):
    class Nothing(Net):
        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    with pytest.raises(UsageError, match="nothing to average"):
        quiet(tmp_path, EMAWeightAveraging()).fit(Nothing(), *loaders())


def test_s32_an_average_of_weights_that_are_not_there_cannot_be_resumed(tmp_path):
    class First(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([self.head.weight], lr=0.1)

    class Second(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([self.head.bias], lr=0.1)

    quiet(tmp_path, EMAWeightAveraging(use_buffers=False), max_epochs=1).fit(First(), *loaders())
    with pytest.raises(UsageError, match=r"averaged head\.weight, which no optimizer holds"):
        quiet(tmp_path, EMAWeightAveraging(use_buffers=False)).fit(
            Second(), *loaders(), ckpt_path=tmp_path / "last.ckpt"
        )


def test_s32_checkpoints_are_ranked_by_the_loss_of_the_average(tmp_path):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 4, generator=generator)
    data = TensorDataset(inputs, (inputs.sum(1) > 0).long())
    module = net()
    trainer = quiet(tmp_path, EMAWeightAveraging(0.9), max_epochs=4)
    trainer.fit(module, DataLoader(data, batch_size=8), DataLoader(data, batch_size=64))
    losses = [row["val_loss"] for row in trainer.fit_run.history]
    assert losses == sorted(losses, reverse=True)  # so the last is the best
    best = read_checkpoint(tmp_path / "best.ckpt")
    assert best["metrics"]["val_loss"] == losses[-1]
    assert_same(best["state_dict"], module.state_dict())
