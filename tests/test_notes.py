"""The examples of the notes (docs/notes.md): Flash, the three classes, tests, inference, training tricks, transfer."""

from __future__ import annotations

import http.server
import re
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch as t
import torchvision as tv
from small import Net, colour_folders, digest, loaders, net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flashtask as flash
import flashtask as pl
from flashtask import (
    Callback,
    ImageClassificationData,
    ImageClassifier,
    LightningDataModule,
    LightningModule,
    Trainer,
    download_data,
    load,
    read_checkpoint,
    seed_everything,
)
from flashtask.core.errors import UsageError


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """The examples write into the working folder."""
    monkeypatch.chdir(tmp_path)


# ---- Lightning Flash


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(tmp_path):
    """The address of a folder that is served on this machine, with an archive of two classes of images in it."""
    for part, each in (("train", 8), ("val", 3), ("test", 3)):
        colour_folders(tmp_path / "made" / "hymenoptera" / part, each=each)
    (tmp_path / "www").mkdir()
    shutil.make_archive(str(tmp_path / "www" / "hymenoptera_data"), "zip", tmp_path / "made")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "www")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_s1_to_s9_the_flash_example(tmp_path, served, capsys):
    seed_everything(42)

    download_data(f"{served}/hymenoptera_data.zip", tmp_path / "mldata", allow_http=True)
    data = ImageClassificationData.from_folders(
        train_folder=f"{tmp_path}/mldata/hymenoptera/train/",
        val_folder=f"{tmp_path}/mldata/hymenoptera/val/",
        test_folder=f"{tmp_path}/mldata/hymenoptera/test",
        batch_size=32,
    )

    model = ImageClassifier(backbone="test_resnet", num_classes=data.num_classes, pretrained=False)
    before = digest(model.backbone), digest(model.head)
    trainer = flash.Trainer(max_epochs=10, gpus=-1)
    trainer.fit(model, datamodule=data, strategy="freeze")
    trainer.save_checkpoint(tmp_path / "classifier.ckpt")

    assert data.num_classes == 2
    assert digest(model.backbone) == before[0]
    assert digest(model.head) != before[1]
    assert (trainer.current_epoch, trainer.seed) == (10, 42)
    assert "there is no CUDA device here, so the CPU is used" in capsys.readouterr().err
    assert load(tmp_path / "classifier.ckpt").labels == ("blue", "red")
    assert set(trainer.test(ckpt_path="best")[0]) == {"test_loss", "test_accuracy"}


# ---- Overview


def test_s10_to_s13_the_three_classes_have_the_methods_of_the_table():
    table = {
        Trainer: "fit validate test predict tune",
        LightningModule: "configure_optimizers forward predict_step test_step training_step validation_step",
        LightningDataModule: "prepare_data setup train_dataloader val_dataloader test_dataloader predict_dataloader",
    }
    for owner, names in table.items():
        assert [name for name in names.split() if not callable(getattr(owner, name, None))] == []


def test_s12_s15_s16_the_hooks_that_end_steps_and_epochs_are_called_with_outputs():
    """Those of the table that a module has only if somebody writes them."""
    seen = {}

    class Ends(Net):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            return batch_idx

        test_step = validation_step

        def validation_epoch_end(self, outs):
            seen["validation_epoch_end"] = list(outs)

        def test_epoch_end(self, outs):
            seen["test_epoch_end"] = list(outs)

        def training_epoch_end(self, outs):
            seen["training_epoch_end"] = [sorted(out) for out in outs]

        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "batch_idx": batch_idx}

        def training_step_end(self, out):
            seen["training_step_end"] = out["batch_idx"]

        def validation_step_end(self, out):
            seen["validation_step_end"] = out

        def test_step_end(self, out):
            seen["test_step_end"] = out

    trainer, model = Trainer(max_epochs=1), Ends()
    trainer.fit(model, *loaders(samples=24))
    trainer.test(model, loaders(samples=24)[1])
    assert seen == {
        "training_step_end": 2,
        "validation_step_end": 2,
        "test_step_end": 2,
        "training_epoch_end": [["batch_idx", "loss"]] * 3,
        "validation_epoch_end": [0, 1, 2],
        "test_epoch_end": [0, 1, 2],
    }


# ---- Test loop


@pytest.fixture
def fitted():
    trainer, model = Trainer(max_epochs=2, seed=3), net()
    trainer.fit(model, *loaders())
    return trainer, model


def test_s21_s25_a_test_with_the_best_checkpoint(fitted):
    trainer, _ = fitted
    (values,) = trainer.test(dataloaders=loaders()[1], ckpt_path="best")
    best = read_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert values["test_loss"] == pytest.approx(best["metrics"]["val_loss"])


def test_s22_a_test_with_a_certain_checkpoint(fitted):
    trainer, _ = fitted
    other = Trainer(max_epochs=1, seed=9)
    other.fit(net(seed=9), *loaders())
    other.save_checkpoint("specific_checkpoint.ckpt")
    (values,) = trainer.test(dataloaders=loaders()[1], ckpt_path="specific_checkpoint.ckpt")
    assert values["test_loss"] == pytest.approx(other.callback_metrics["val_loss"])


def test_s23_a_test_of_a_pretrained_model(fitted):
    fitted[0].save_checkpoint("model.ckpt")
    model = Net.load_from_checkpoint(checkpoint_path="model.ckpt")
    trainer = Trainer()
    (values,) = trainer.test(model, loaders()[1])
    assert values["test_loss"] == pytest.approx(fitted[0].callback_metrics["val_loss"])


def test_s24_a_test_with_another_loader_or_data_module(fitted):
    class MyTestOnlyLightningDataModule(pl.LightningDataModule):
        def test_dataloader(self):
            return loaders(samples=16)[1]

    trainer, _ = fitted
    test_dl = loaders(samples=16)[1]
    by_loader = trainer.test(dataloaders=test_dl)
    test_dm = MyTestOnlyLightningDataModule()
    assert trainer.test(datamodule=test_dm) == by_loader != trainer.test(dataloaders=loaders()[1])


# ---- Inference


def test_s26_forward_is_called_by_hand():
    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, batch_x):
            return self.fc(batch_x)

    inputs = torch.randn(3, 4)
    model = Net()
    model.eval()
    with torch.no_grad():
        pred = model(inputs)
    assert pred.shape == (3, 2)
    assert not pred.requires_grad


def test_s27_predict_step_is_called_by_the_trainer():
    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, batch_x):
            return self.fc(batch_x)

        def predict_step(self, batch_x, batch_idx):
            return self(batch_x)

    class Data(pl.LightningDataModule):
        def predict_dataloader(self):
            return DataLoader(torch.arange(20.0).reshape(5, 4), batch_size=2)

    model, data_module = Net(), Data()
    with pytest.raises(UsageError, match="gpus=2: the CUDA devices here are: none"):
        Trainer(gpus=2)
    trainer = Trainer(gpus=0)
    found = trainer.predict(model, data_module)
    assert torch.equal(torch.cat(found), model(torch.arange(20.0).reshape(5, 4)))
    assert not found[0].requires_grad


# ---- Training tricks


class Gradients(Callback):
    """The gradients with which each step was taken."""

    def __init__(self):
        self.norms, self.largest = [], []

    def on_before_zero_grad(self, trainer, module, optimizer):
        parts = torch.cat([p.grad.flatten() for p in module.parameters()])
        self.norms.append(parts.norm().item())
        self.largest.append(parts.abs().max().item())


class Steep(Net):
    def training_step(self, batch, batch_idx):
        return 100 * super().training_step(batch, batch_idx)


@pytest.mark.long
def test_s28_the_largest_batch_that_fits_is_found_for_a_data_module():
    """The notes ask whether a data module will do: yes. The flag has two names."""

    class Data(pl.LightningDataModule):
        def __init__(self, batch_size=2):
            super().__init__()
            self.batch_size = batch_size

        def train_dataloader(self):
            return DataLoader(loaders(samples=64)[0].dataset, batch_size=self.batch_size)

    data = Data()
    trainer = Trainer(max_epochs=1, auto_batch_size_finder=True)
    trainer.tune(net(), data)
    assert data.batch_size > 2
    assert trainer.auto_scale_batch_size == Trainer(auto_scale_batch_size=True).auto_scale_batch_size


def test_s29_gradients_are_clipped_by_norm():
    free, clipped = Gradients(), Gradients()
    Trainer(max_steps=3, callbacks=free).fit(Steep(), *loaders())
    trainer = Trainer(gradient_clip_val=0.5, max_steps=3, callbacks=clipped)
    trainer.fit(Steep(), *loaders())
    assert min(free.norms) > 0.5 >= max(clipped.norms) - 1e-5
    assert clipped.norms == pytest.approx([0.5] * 3, rel=1e-4)


def test_s30_gradients_are_clipped_by_value():
    clipped = Gradients()
    trainer = Trainer(gradient_clip_val=0.5, gradient_clip_algorithm="value", max_steps=3, callbacks=clipped)
    trainer.fit(Steep(), *loaders())
    assert clipped.largest == [0.5] * 3
    assert min(clipped.norms) > 0.5


def test_s31_gradients_of_several_batches_are_accumulated():
    n, gradients = 3, Gradients()
    trainer = Trainer(accumulate_grad_batches=n, max_epochs=1, callbacks=gradients)
    trainer.fit(net(), loaders(samples=48)[0])
    assert trainer.global_step == len(gradients.norms) == 2


def test_s32_weights_of_the_last_quarter_are_averaged():
    from flashtask.trainer.callbacks.stochastic_weight_averaging import StochasticWeightAveraging

    ends, rates = [], []

    class Noting(Callback):
        def on_train_epoch_start(self, trainer, module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_epoch_end(self, trainer, module):
            ends.append(module.head.weight.detach().clone())

    trainer = Trainer(callbacks=[StochasticWeightAveraging(), Noting()], max_epochs=8)
    model, train = net(), loaders(samples=48)[0]
    trainer.fit(model, train)
    assert torch.allclose(model.head.weight, (ends[6] + ends[7]) / 2, atol=1e-6)
    assert not torch.equal(model.head.weight, ends[7])
    assert rates[:6] == pytest.approx([0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025])
    before, norm = model.backbone[:2], model.backbone[2]
    with torch.no_grad():
        assert torch.allclose(norm.running_mean, before(train.dataset.tensors[0]).mean(0), atol=1e-5)


# ---- Learning rate finder


def test_s33_tune_finds_a_learning_rate_and_fit_uses_it():
    rates = []

    class Net(pl.LightningModule):
        def __init__(self, learning_rate=1e-6):
            super().__init__()
            self.save_hyperparameters()
            self.fc = nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            return nn.functional.cross_entropy(self.fc(inputs), targets)

        def train_dataloader(self):
            return loaders()[0]

        def configure_optimizers(self):
            rates.append(self.hparams.learning_rate)
            return t.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)

    model = Net()
    before = digest(model)
    trainer = Trainer(auto_lr_find=True, max_epochs=1)
    trainer.tune(model)
    assert digest(model) == before
    found = model.hparams.learning_rate
    assert found > 1e-6

    trainer.fit(model)
    assert rates[-1] == found
    assert trainer.fit_run.history[0]["learning_rate"] == found


# ---- Transfer learning: 8 pictures of 3 classes, enough for a few steps

N_CLASSES = 3


def pictures():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 3), batch_size=4)


def weights_of(module, but=("fc",)):
    return {n: p.detach().clone() for n, p in module.named_parameters() if n.split(".")[-2] not in but}


def changed(before, module):
    return [
        name for name, value in module.named_parameters() if name in before and not torch.equal(before[name], value)
    ]


def test_s121_resnet18_has_a_last_layer_for_1000_classes():
    model = tv.models.resnet18(weights=None)
    children = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]
    assert [name for name, _ in model.named_children()] == children
    assert (model.fc.in_features, model.fc.out_features) == (512, 1000)


def train_by_hand(model, optim):
    for inputs, targets in pictures():
        optim.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optim.step()


def test_s121_end_to_end_training_in_plain_torch():
    model = tv.models.resnet18(weights=None)
    model.fc = nn.Linear(model.fc.in_features, N_CLASSES)
    optim = t.optim.SGD(model.parameters(), lr=0.001)
    before = weights_of(model)
    train_by_hand(model, optim)
    assert changed(before, model) == list(before)


def test_s122_finetuning_in_plain_torch():
    model = tv.models.resnet18(weights=None)

    for param in model.parameters():
        param.requires_grad = False

    model.fc = nn.Linear(model.fc.in_features, N_CLASSES)

    optim = t.optim.SGD(model.fc.parameters(), lr=0.001)

    before, head = weights_of(model), digest(model.fc)
    train_by_hand(model, optim)
    assert changed(before, model) == []
    assert digest(model.fc) != head


def test_s123_freeze_turns_gradients_off_and_sets_eval_mode():
    model = net()
    model.freeze()
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_s121_end_to_end_training_of_a_module():
    class ImageClassifier(LightningModule):
        def __init__(self, n_classes):
            super().__init__()
            self.model = tv.models.resnet18(weights=None)
            self.model.fc = nn.Linear(self.model.fc.in_features, n_classes)
            self.loss_fn = nn.CrossEntropyLoss()

        def configure_optimizers(self):
            return t.optim.SGD(self.model.parameters(), lr=0.001)

        def forward(self, inputs):
            return self.model(inputs)

        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            outputs = self(inputs)
            return self.loss_fn(outputs, targets)

    model = ImageClassifier(N_CLASSES)
    before = weights_of(model.model)
    Trainer(max_epochs=1).fit(model, pictures())
    assert changed(before, model.model) == list(before)


def test_s122_finetuning_of_a_module_whose_other_layers_want_no_gradient():
    class ImageClassifier(LightningModule):
        def __init__(self, n_classes):
            super().__init__()
            self.model = tv.models.resnet18(weights=None)
            for param in self.model.parameters():
                param.requires_grad = False
            self.model.fc = nn.Linear(self.model.fc.in_features, n_classes)
            self.loss_fn = nn.CrossEntropyLoss()

        def configure_optimizers(self):
            return t.optim.SGD(self.model.fc.parameters(), lr=0.001)

        def forward(self, inputs):
            return self.model(inputs)

        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            outputs = self(inputs)
            return self.loss_fn(outputs, targets)

    model = ImageClassifier(N_CLASSES)
    before, head = weights_of(model.model), digest(model.model.fc)
    Trainer(max_epochs=1).fit(model, pictures())
    assert changed(before, model.model) == []
    assert digest(model.model.fc) != head


def test_s124_finetuning_of_a_module_with_a_feature_extractor_in_eval_mode():
    class ImageClassifier(LightningModule):
        def __init__(self, n_classes):
            super().__init__()
            backbone = tv.models.resnet18(weights=None)
            n_features = backbone.fc.in_features
            layers = list(backbone.children())[:-1]
            self.feature_extractor = t.nn.Sequential(*layers)
            self.classifier = t.nn.Linear(n_features, n_classes)
            self.loss_fn = nn.CrossEntropyLoss()

        def configure_optimizers(self):
            return t.optim.SGD(self.classifier.parameters(), lr=0.001)

        def forward(self, inputs):
            self.feature_extractor.eval()
            with t.no_grad():
                repr = self.feature_extractor(inputs).flatten(1)
            return self.classifier(repr)

        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            outputs = self(inputs)
            return self.loss_fn(outputs, targets)

    model = ImageClassifier(N_CLASSES)
    features, head = digest(model.feature_extractor), digest(model.classifier)
    Trainer(max_epochs=1).fit(model, pictures())
    # statistics of BatchNorm are in the digest too
    assert digest(model.feature_extractor) == features
    assert digest(model.classifier) != head


def test_s123_a_backbone_that_is_a_module_is_frozen_by_its_own_method():
    class Backbone(LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))

        def forward(self, inputs):
            return self.layers(inputs)

    class Classifier(Net):
        def __init__(self):
            super().__init__()
            self.backbone = Backbone()
            self.backbone.freeze()

    model = Classifier()
    before = digest(model.backbone)
    Trainer(max_epochs=1).fit(model, *loaders())
    assert digest(model.backbone) == before


# ---- the page about all this


def test_the_page_names_every_test_and_every_test_is_on_the_page():
    here = Path(__file__).parent
    written = {
        name for file in here.glob("test_notes*.py") for name in re.findall(r"^def (test_s\w+)", file.read_text(), re.M)
    }
    named = set(re.findall(r"`(test_s\w+)`", (here.parent / "docs" / "notes.md").read_text()))
    assert named == written
