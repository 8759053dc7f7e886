"""A run whose head is solved: one pass over the frozen part, and everything around it as in any other fit."""

from __future__ import annotations

import csv
import json
import os
import signal
from datetime import timedelta

import pytest
import torch
from small import colour_folders
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flashtask
from flashtask import (
    HEADS,
    Callback,
    EarlyStopping,
    ImageClassificationData,
    ImageClassifier,
    LearningRateMonitor,
    ModelCheckpoint,
    Module,
    StochasticWeightAveraging,
    Trainer,
    read_checkpoint,
)
from flashtask.cli import run as cli
from flashtask.core.errors import BadDataError, UsageError
from flashtask.heads import build_head
from flashtask.trainer.lightning1.loops import FitLoop

TINY = "timm/test_resnet"


class Sounds(Module):
    """No images anywhere: a frozen network over vectors, and a head."""

    def __init__(self, head):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))
        self.head = head
        self.modes = []

    def frozen_features(self, batch):
        self.modes.append((self.training, self.backbone[1].training, torch.is_grad_enabled()))
        inputs, targets = batch
        return self.backbone(inputs), targets

    def forward(self, inputs):
        return self.head(self.backbone(inputs))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        outputs = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(outputs, batch[1]))
        self.log("val_accuracy", (outputs.argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class OwnHead(nn.Module):
    """A head of the user's that can be trained and can be solved."""

    def __init__(self, num_features, num_outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_outputs, num_features))
        self.solved_on = None

    def forward(self, features):
        return features @ self.weight.T

    def solve(self, features, targets):
        self.solved_on = features, targets
        with torch.no_grad():
            self.weight.copy_(torch.linalg.lstsq(features, nn.functional.one_hot(targets, 3).float()).solution.T)


def sounds(head="ridge"):
    torch.manual_seed(1)
    return Sounds(build_head(head, 16, 3) if isinstance(head, str) else head)


def samples(count=50):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 4, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


def loaders(batch_size=8, **options):
    return DataLoader(samples(), batch_size, shuffle=True, **options), DataLoader(samples(30), batch_size)


def quiet(folder, **options):
    return Trainer(output_dir=folder, enable_progress_bar=False, enable_model_summary=False, **options)


def solve(folder, model=None, data=None, **options):
    """A finished run: its trainer and its model."""
    trainer, model = quiet(folder, **options), model or sounds()
    trainer.finetune(model, *(data or loaders()), strategy="freeze")
    return trainer, model


def image_data(root, **options):
    return ImageClassificationData.from_folders(
        train_folder=root / "train", val_folder=root / "val", batch_size=8, num_workers=0, **options
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    colour_folders(root / "train")
    colour_folders(root / "val", each=3)
    return root


# ---- one pass, and epoch 0


def test_a_head_is_solved_on_the_features_of_every_sample_in_eval_mode(tmp_path):
    model = sounds(OwnHead(16, 3))
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    trainer, _ = solve(tmp_path, model, loaders(drop_last=True))
    assert set(model.modes) == {(False, False, False)}
    assert len(model.modes) == 7  # the last batch of two samples too
    features, targets = model.head.solved_on
    assert features.shape == (50, 16)
    assert features.dtype == torch.float32
    everything = samples().tensors[0]
    with torch.no_grad():
        expected = model.eval().backbone(everything)
    torch.testing.assert_close(features.sum(dim=0), expected.sum(dim=0))
    assert targets.bincount().tolist() == samples().tensors[1].bincount().tolist()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert trainer.global_step == 0


def test_epoch_0_is_written_as_any_other(tmp_path):
    trainer, model = solve(tmp_path, max_epochs=30)
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["epoch"], row["step"]) == ("0", "0")
    assert trainer.callback_metrics["val_accuracy"] > 0.7
    assert float(row["val_accuracy"]) == pytest.approx(trainer.callback_metrics["val_accuracy"], abs=1e-5)
    assert float(row["trainable_parameters"]) == 51
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["strategy"], summary["epochs"]) == ("freeze", 1)
    assert summary["stopped"] == "the head has been solved"
    assert summary["best"]["val_accuracy"] == trainer.callback_metrics["val_accuracy"]
    for name in ("best.ckpt", "last.ckpt"):
        content = read_checkpoint(tmp_path / name)
        assert content["optimizer_states"] == []
        assert torch.equal(content["state_dict"]["head.0.weight"], model.head[0].weight)
    assert trainer.validate(model)[0]["val_accuracy"] == summary["best"]["val_accuracy"]


class Told(Callback):
    """The hooks, in their order."""

    def __init__(self):
        self.hooks = []
        for name in vars(Callback):
            if name.startswith("on_") and not name.endswith("_checkpoint"):
                setattr(self, name, lambda *arguments, hook=name: self.hooks.append(hook))


def test_every_moment_of_a_fit_is_told_except_those_of_steps(tmp_path):
    told = Told()
    solve(tmp_path, callbacks=[told], num_sanity_val_steps=1)
    short = [m.removeprefix("on_") for m in told.hooks if "batch" not in m]
    validation = ["validation_start", "validation_epoch_start", "validation_epoch_end", "validation_end"]
    sanity = ["sanity_check_start", *validation, "sanity_check_end"]
    epoch = ["train_start", "train_epoch_start", *validation, "train_epoch_end", "epoch_end", "train_end"]
    assert short == ["fit_start", *sanity, *epoch, "fit_end"]
    assert told.hooks.count("on_train_batch_end") == 7


def test_callbacks_and_settings_of_epochs_and_steps_do_not_disturb(tmp_path):
    stopping, saving = EarlyStopping("val_loss", patience=1), ModelCheckpoint(monitor="val_loss", save_top_k=2)
    trainer, _ = solve(
        tmp_path,
        callbacks=[stopping, saving, LearningRateMonitor()],
        check_val_every_n_epoch=5,
        accumulate_grad_batches=3,
        gradient_clip_val=1.0,
        min_epochs=4,
        max_steps=2,
    )
    assert len(trainer.fit_run.history) == 1
    assert saving.best_model_score == pytest.approx(trainer.callback_metrics["val_loss"])
    assert trainer.fit_run.samples_seen == 50


def test_the_progress_bar_and_the_announcement_say_what_happens(tmp_path, capsys):
    Trainer(output_dir=tmp_path, max_epochs=9).finetune(sounds(), *loaders(), strategy="freeze")
    said = capsys.readouterr().err
    assert "finetuning freeze: one pass, then the head is solved on the features" in said
    assert "ridge: 50 samples, penalty" in said
    assert "epoch 0/0" in said


def test_fewer_batches_mean_fewer_samples(tmp_path):
    model = sounds(OwnHead(16, 3))
    solve(tmp_path, model, limit_train_batches=2)
    assert len(model.head.solved_on[0]) == 16


def test_without_validation_the_run_is_whole_too(tmp_path):
    trainer = quiet(tmp_path)
    trainer.finetune(sounds(), loaders()[0], strategy="freeze")
    assert (tmp_path / "best.ckpt").exists()
    assert len(trainer.fit_run.history) == 1


def test_loops_as_objects_go_the_same_way(tmp_path):
    class MyFitLoop(FitLoop):
        """The engine's own."""

    trainer = quiet(tmp_path / "loops")
    trainer.fit_loop = MyFitLoop()
    model = sounds()
    trainer.finetune(model, *loaders(), strategy="freeze")
    _, other = solve(tmp_path / "page")
    assert torch.equal(model.head[0].weight, other.head[0].weight)


# ---- what is solved, what is trained


@pytest.mark.parametrize("head", ["prototype", "ridge", "logistic"])
@pytest.mark.parametrize("strategy", ["no_freeze", ("freeze_unfreeze", 1), "bitfit", ("lp_ft", 1)])
def test_a_head_that_must_be_solved_takes_freeze_alone(tmp_path, head, strategy):
    with pytest.raises(UsageError, match="is solved on the features of a frozen backbone") as caught:
        quiet(tmp_path / "run").finetune(sounds(head), *loaders(), strategy=strategy)
    assert caught.value.exit_code == 2
    assert 'strategy="freeze"' in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_a_plain_fit_and_a_search_for_a_rate_are_refused_too(tmp_path):
    with pytest.raises(UsageError, match="a fit without a finetuning strategy"):
        quiet(tmp_path / "run").fit(sounds(), *loaders())
    with pytest.raises(UsageError, match="nothing to tune"):
        quiet(tmp_path / "run").tune(sounds(), *loaders(), strategy="freeze", batch_size=True)
    with pytest.raises(UsageError, match="a fit without"):
        quiet(tmp_path / "run").tune(sounds(), *loaders(), batch_size=True)


def test_a_head_that_can_be_both_is_solved_by_freeze_and_trained_by_others(tmp_path):
    _, frozen = solve(tmp_path / "freeze", sounds(OwnHead(16, 3)))
    assert frozen.head.solved_on is not None
    trained = sounds(OwnHead(16, 3))
    quiet(tmp_path / "all", max_epochs=1).finetune(trained, *loaders(), strategy="no_freeze")
    assert trained.head.solved_on is None
    assert trained.head.weight.abs().max() > 0


def test_linear_heads_are_trained_by_freeze(tmp_path):
    trainer, _ = solve(tmp_path, sounds("linear"), max_epochs=2)
    assert (len(trainer.fit_run.history), trainer.global_step) == (2, 14)


def test_a_registered_head_of_the_users_is_solved_by_its_name(tmp_path, images):
    @HEADS.register("test_own_solved")
    class Registered(OwnHead):
        requires_solving = True

        def solve(self, features, targets):
            self.solved_on = features, targets
            return "solved by hand"

    try:
        model = ImageClassifier(TINY, head="test_own_solved", pretrained=False)
        with pytest.raises(UsageError, match="Registered is solved"):
            quiet(tmp_path / "run").finetune(model, datamodule=image_data(images), strategy="no_freeze")
        quiet(tmp_path / "run").finetune(model, datamodule=image_data(images), strategy="freeze")
        assert model.head.solved_on[0].shape == (16, model.num_features)
    finally:
        HEADS.remove("test_own_solved")


# ---- what is refused


def test_a_module_without_features_is_told_what_to_write(tmp_path):
    class Mute(Sounds):
        frozen_features = Module.frozen_features

    with pytest.raises(UsageError, match="no frozen_features") as caught:
        solve(tmp_path, Mute(build_head("ridge", 16, 3)))
    assert "def frozen_features(self, batch)" in caught.value.fix


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda features, targets: features, "gave Tensor"),
        (lambda features, targets: (features, targets[:-1]), r"features \(8, 16\) and targets \(7,\)"),
        (lambda features, targets: (features, targets.tolist()), "gave tuple"),
    ],
)
def test_features_without_their_targets_are_refused(tmp_path, given, message):
    class Wrong(Sounds):
        def frozen_features(self, batch):
            return given(*super().frozen_features(batch))

    with pytest.raises(UsageError, match=message):
        solve(tmp_path, Wrong(build_head("ridge", 16, 3)))


def test_augmentation_and_a_solved_head_contradict_each_other(tmp_path, images):
    model = ImageClassifier(TINY, head="ridge", pretrained=False)
    with pytest.raises(UsageError, match="the training data is augmented") as caught:
        quiet(tmp_path / "run").finetune(model, datamodule=image_data(images, augment="light"), strategy="freeze")
    assert 'augment="none"' in caught.value.fix
    quiet(tmp_path / "other").finetune(model, datamodule=image_data(images, augment="none"), strategy="freeze")


def test_a_sampler_and_a_solved_head_contradict_each_other(tmp_path, images):
    model = ImageClassifier(TINY, head="ridge", pretrained=False)
    with pytest.raises(UsageError, match="a sampler draws the training samples"):
        quiet(tmp_path / "run").finetune(model, datamodule=image_data(images, sampler="balanced"), strategy="freeze")


def test_averaged_weights_and_a_solved_head_contradict_each_other(tmp_path):
    with pytest.raises(UsageError, match="no steps whose weights could be averaged"):
        solve(tmp_path, callbacks=[StochasticWeightAveraging(swa_lrs=0.1)])


def test_a_pass_that_time_ends_is_an_error_and_no_half_solved_head(tmp_path):
    model = sounds()
    with pytest.raises(UsageError, match="before the features of all samples were there") as caught:
        solve(tmp_path, model, max_time=timedelta(microseconds=1))
    assert caught.value.fix == "a longer max_time"
    assert model.head[0].weight.abs().max() == 0


def test_a_callback_that_skips_the_rest_is_an_error(tmp_path):
    class Skip(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    with pytest.raises(UsageError, match="before the features of all samples were there"):
        solve(tmp_path, callbacks=[Skip()])


def test_features_that_are_no_numbers_end_the_run_as_bad_data(tmp_path):
    model = sounds()
    nn.init.constant_(model.backbone[0].weight, float("nan"))
    with pytest.raises(BadDataError, match="features of 50 of 50 samples"):
        solve(tmp_path, model)


# ---- killed and resumed


def test_a_solved_run_that_is_resumed_is_finished(tmp_path, capsys):
    _, model = solve(tmp_path)
    again = sounds()
    again.modes.clear()
    quiet(tmp_path, max_epochs=50).finetune(again, *loaders(), strategy="freeze", ckpt_path="last")
    assert "nothing left to do: the head has been solved" in capsys.readouterr().err
    assert again.modes == []
    assert torch.equal(again.head[0].weight, model.head[0].weight)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pass_that_a_signal_ended_begins_anew(tmp_path, capsys, number):
    class SignalAt(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 2:
                os.kill(os.getpid(), number)

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        solve(tmp_path / "killed", callbacks=[SignalAt()], seed=3)
    assert not (tmp_path / "killed" / "best.ckpt").exists()
    model = sounds(OwnHead(16, 3))
    model.head = build_head("ridge", 16, 3)
    trainer = quiet(tmp_path / "killed", seed=3)
    trainer.finetune(model, *loaders(), strategy="freeze", ckpt_path="last")
    assert "the pass over the frozen part starts again" in capsys.readouterr().err
    assert len(model.modes) == 7
    assert trainer.fit_run.samples_seen == 50
    _, whole = solve(tmp_path / "whole", seed=3)
    assert torch.equal(model.head[0].weight, whole.head[0].weight)


# ---- tasks and the command line


def test_settings_of_gradient_steps_are_named_at_the_start(tmp_path, images, capsys):
    given = {"optimizer": "sgd", "learning_rate": 0.5, "loss_fn": "focal", "label_smoothing": 0.1}
    for number, options in enumerate(({}, given)):
        model = ImageClassifier(TINY, head="ridge", pretrained=False, **options)
        settings = {"max_epochs": 7, "accumulate_grad_batches": 2} if options else {}
        quiet(tmp_path / str(number), **settings).finetune(model, datamodule=image_data(images), strategy="freeze")
        said = "".join(capsys.readouterr())
        names = "optimizer, learning_rate, loss_fn, label_smoothing, max_epochs, accumulate_grad_batches"
        assert (f"these have no effect on it: {names}\n" in said) == bool(options)
        assert ("no effect" in said) == bool(options)


@pytest.mark.long
@pytest.mark.parametrize("head", ["prototype", "ridge", "logistic"])
def test_a_task_with_a_solved_head_is_saved_loaded_and_predicts(tmp_path, images, head):
    model = ImageClassifier(TINY, head=head, pretrained=False)
    trainer = quiet(tmp_path / "run", seed=1)
    trainer.finetune(model, datamodule=image_data(images), strategy="freeze")
    row = trainer.fit_run.history[0]
    assert row["val_accuracy"] == 1.0
    assert row["train_loss"] < 0.3
    assert "learning_rate" not in row
    loaded = flashtask.load(tmp_path / "run" / "best.ckpt")
    paths = sorted((images / "val").rglob("*.png"))
    assert loaded.predict(paths) == model.predict(paths)
    assert [one.label for one in loaded.predict(paths)] == [path.parent.name for path in paths]
    assert model.labels == ("blue", "red")


@pytest.mark.long
def test_the_features_have_the_runs_number_format(tmp_path, images):
    weights = {}
    for precision in ("32", "bf16-mixed"):
        model = ImageClassifier(TINY, head="ridge", pretrained=False, head_options={"penalty": 1.0, "temperature": 1.0})
        torch.manual_seed(0)
        for parameter in model.backbone.parameters():
            nn.init.normal_(parameter, std=0.1)
        quiet(tmp_path / precision, precision=precision).finetune(
            model, datamodule=image_data(images), strategy="freeze"
        )
        weights[precision] = model.head[0].weight
    assert not torch.equal(weights["32"], weights["bf16-mixed"])
    torch.testing.assert_close(weights["32"], weights["bf16-mixed"], atol=0.05, rtol=0.3)


def test_the_command_line_solves_resumes_and_refuses(tmp_path, images, capsys):
    options = ["--backbone", "test_resnet", "--no-pretrained", "--num-workers", "0", "--quiet", "--head", "prototype"]
    folder = str(tmp_path / "RUN")
    assert cli(["finetune", str(images), *options, "--output-dir", folder]) == 0
    assert "best epoch 0: val_loss" in capsys.readouterr().out
    assert cli(["finetune", str(images), *options, "--output-dir", folder, "--resume"]) == 0
    assert "nothing left to do" in capsys.readouterr().err
    assert cli(["predict", f"{folder}/best.ckpt", str(images / "val" / "red"), "--format", "csv"]) == 0
    other = str(tmp_path / "OTHER")
    assert cli(["finetune", str(images), *options, "--output-dir", other, "--strategy", "no_freeze"]) == 2
    assert "PrototypeHead is solved" in capsys.readouterr().err
    assert cli(["finetune", str(images), *options, "--output-dir", other, "--lr", "auto"]) == 2
    assert "nothing to tune" in capsys.readouterr().err
