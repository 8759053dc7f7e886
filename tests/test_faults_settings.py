"""Schedules and transforms by the user's own settings, and folders that another run is in."""

import pytest
import torch
from small import Net, colour_folders, loaders
from test_optimizers import sgd
from torch.utils.data import DataLoader

from flashtask import Callback, EarlyStopping, ImageClassificationData, ImageClassifier, MLFlowLogger, Trainer
from flashtask.cli import run as command
from flashtask.core.errors import OutputError, UsageError
from flashtask.core.failures import as_users_see_it
from flashtask.trainer.optimizers import make_scheduler
from flashtask.trainer.run_folder import RunFolder, require_no_run

QUIET = {"enable_progress_bar": False, "accelerator": "cpu", "seed": 3, "logger": False}


@pytest.mark.parametrize(("every", "told"), [(3, 1), (2, 0)])
def test_early_stopping_that_never_looks_is_told(every, told, tmp_path, capsys):
    settings = {"check_val_every_n_epoch": every, "callbacks": EarlyStopping("val_loss"), "output_dir": tmp_path}
    Trainer(**QUIET, **settings, max_epochs=2).fit(Net(), *loaders())
    assert "".join(capsys.readouterr()).count("EarlyStopping never looks") == told


class OneCycle(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": ("OneCycleLR", {"max_lr": 0.5})}


def test_one_cycle_by_name_is_the_whole_run(tmp_path):
    rates = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    trainer = Trainer(**QUIET, max_epochs=4, output_dir=tmp_path, callbacks=[Rates()], enable_checkpointing=False)
    trainer.fit(OneCycle(), *loaders(50, 10))
    assert len(rates) == len(set(rates)) == 20
    assert max(rates) == pytest.approx(0.5, rel=0.05)
    assert rates[-1] < 0.01 < rates[0] < 0.1


def test_a_cycle_that_ends_before_the_run_is_refused():
    with pytest.raises(UsageError, match="has a cycle of 6 steps, and the run has 10") as caught:
        make_scheduler("onecyclelr", sgd(), 10, lambda epoch: 5 * epoch, max_lr=0.2, total_steps=6)
    assert "interval" in caught.value.fix
    by_epoch = {"max_lr": 0.2, "total_steps": 6, "interval": "epoch"}
    assert make_scheduler("onecyclelr", sgd(), 10, lambda epoch: 5 * epoch, **by_epoch).interval == "epoch"
    with pytest.raises(UsageError, match="needs to know how long the run is"):
        make_scheduler("onecyclelr", sgd(), None, lambda epoch: None, max_lr=0.2)


def test_a_schedule_by_name_steps_when_its_options_say():
    rate = make_scheduler("steplr", sgd(), 10, lambda epoch: epoch, step_size=2, interval="step", frequency=3)
    assert (rate.interval, rate.frequency, rate.scheduler.step_size) == ("step", 3, 2)
    assert make_scheduler("steplr", sgd(), 10, lambda epoch: epoch, step_size=2).interval == "epoch"
    with pytest.raises(UsageError, match="interval"):
        make_scheduler("steplr", sgd(), 10, lambda epoch: epoch, step_size=2, interval="batch")


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (lambda image: 255 * torch.ones(3, 32, 32), "floats up to 255, which are not normalised"),
        (lambda image: torch.rand(32, 32, 3), r"shape \(32, 32, 3\), and the model takes \(3, height, width\)"),
        (lambda image: torch.rand(1, 32, 32), r"shape \(1, 32, 32\)"),
    ],
)
def test_floats_of_a_transform_that_are_no_normalised_image_are_refused(transform, words, tmp_path):
    data = ImageClassificationData.from_folders(
        train_folder=colour_folders(tmp_path, 2), transform=transform, batch_size=2, num_workers=0
    )
    data.setup("fit")
    with pytest.raises(UsageError, match=words):
        next(iter(data.train_dataloader()))


def test_a_transform_that_gives_another_size_is_reported(tmp_path, capsys):
    def cut(image):
        return torch.zeros(3, 40, 48)

    data = ImageClassificationData.from_folders(
        train_folder=colour_folders(tmp_path / "data", 4), transform=cut, batch_size=4, num_workers=0
    )
    model = ImageClassifier(backbone="test_resnet", num_classes=2, pretrained=False)
    Trainer(**QUIET, max_steps=1, output_dir=tmp_path / "run").fit(model, datamodule=data)
    assert "training images of 40 x 48; validation and prediction take" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Input height (64) doesn't match model (224).", "with height 224, and a batch has 64"),
        ("Wrong image width! Expected 224 but got 64!", "with width 224, and a batch has 64"),
    ],
)
def test_a_model_that_takes_one_size_names_both(text, words):
    found = as_users_see_it(AssertionError(text))
    assert isinstance(found, UsageError)
    assert words in str(found)


def test_a_vision_transformer_names_its_size(tmp_path):
    import timm

    class Vit(Net):
        def __init__(self):
            super().__init__()
            self.vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1)

        def training_step(self, batch, batch_idx):
            return self.vit(torch.zeros(len(batch[0]), 3, 64, 64)).sum()

    with pytest.raises(UsageError, match="takes images of one size, with height 224, and a batch has 64"):
        Trainer(**QUIET, max_steps=1, output_dir=tmp_path).fit(Vit(), loaders(8)[0])


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_a_lambda_that_a_worker_cannot_be_sent_is_named(tmp_path):
    dataset = loaders(8)[0].dataset
    loader = DataLoader(dataset, 4, num_workers=1, collate_fn=lambda rows: rows, multiprocessing_context="spawn")
    with pytest.raises(UsageError, match="cannot be sent to a worker process") as caught:
        Trainer(**QUIET, max_steps=1, output_dir=tmp_path).fit(Net(), loader)
    assert "num_workers=0" in caught.value.fix


def test_nobody_is_told_to_remove_the_folder_of_a_run_that_is_going_on(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_recipe({"task": "image_classification"})
    try:
        for claim in (require_no_run, RunFolder):
            with pytest.raises(OutputError, match="is in use by process") as caught:
                claim(tmp_path / "run")
            assert "rm " not in str(caught.value)
    finally:
        folder.release()
    with pytest.raises(OutputError, match="already holds a run"):
        require_no_run(tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("name", ["100%20", "what?"])
def test_a_folder_that_mlflow_would_take_for_another_is_refused(name, tmp_path):
    with pytest.raises(UsageError, match="cannot keep its database in"):
        MLFlowLogger().start(tmp_path / name, [], 0)
    assert not list(tmp_path.iterdir())


def test_a_file_whose_name_begins_with_a_dash_is_answered_with_how_to_name_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-dash.jpg").write_bytes(b"")
    assert command(["predict", "model.ckpt", "-dash.jpg"]) == 2
    assert "./-dash.jpg" in "".join(capsys.readouterr())
