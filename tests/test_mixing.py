"""MixUp and CutMix: draws from (seed, epoch, batch), the loss by hand, and what they cannot be combined with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import colour_folders, digest, quiet

from flashtask import Callback, ImageClassificationData, ImageClassifier
from flashtask.core.errors import UsageError
from flashtask.tasks.head_drawing import building_without_weights
from flashtask.tasks.mixing import Mixing, mixed_images


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return colour_folders(tmp_path_factory.mktemp("mixing") / "train", each=9, classes=("blue", "green"), size=32)


def model(**options):
    torch.manual_seed(0)
    with building_without_weights():
        return ImageClassifier("timm/test_resnet", 2, image_size=32, backbone_learning_rate=0.01, **options)


def data(root, **options):
    return ImageClassificationData.from_folders(root, batch_size=8, augment="none", **options)


def trainer(tmp_path, **options):
    return quiet(tmp_path, seed=5, logger=False, precision="32", memory_format="contiguous", **options)


def test_the_shares_are_those_of_the_beta_distribution_and_depend_on_the_place_alone():
    mixing = Mixing(mixup_alpha=0.4)
    kept = [mixing.draw(0, epoch, batch, (8, 8))[0] for epoch in range(20) for batch in range(50)]
    assert np.mean(kept) == pytest.approx(0.5, abs=0.04)
    assert np.var(kept) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)
    assert mixing.draw(0, 3, 7, (8, 8)) == mixing.draw(0, 3, 7, (8, 8))
    assert len({mixing.draw(*place, (8, 8))[0] for place in ((0, 0, 1), (0, 1, 0), (1, 0, 0))}) == 3


def test_a_rectangle_has_the_share_that_the_loss_counts():
    images = torch.stack([torch.zeros(3, 20, 30), torch.ones(3, 20, 30)])
    areas = []
    for batch in range(200):
        kept, box = Mixing(cutmix_alpha=1.0).draw(1, 0, batch, (20, 30))
        mixed = mixed_images(images, kept, box)
        assert mixed[1].mean().item() == pytest.approx(kept, abs=1e-6)
        assert mixed[0].mean().item() == pytest.approx(1 - kept, abs=1e-6)
        assert set(mixed.unique().tolist()) <= {0.0, 1.0}
        areas.append(1 - kept)
    assert 0.2 < np.mean(areas) < 0.5  # of a half, less what lies beyond the edges
    both = [Mixing(0.2, 1.0).draw(0, 0, batch, (20, 30))[1] != (0, 0, 0, 0) for batch in range(400)]
    assert np.mean(both) == pytest.approx(0.5, abs=0.08)


class Batches(Callback):
    """Every batch of training, and the loss that its step gave."""

    def __init__(self):
        self.seen, self.losses = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx, batch[0].clone(), batch[1].clone()))

    def on_before_backward(self, trainer, module, loss):
        self.losses.append(loss.item())


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("alphas", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 1, "cutmix_alpha": 1}])
def test_training_equals_a_loop_by_hand_with_the_same_draws(tmp_path, root, alphas):
    options = {"label_smoothing": 0.1, "class_weights": [1.0, 3.0], "optimizer": "sgd", "weight_decay": 0.0}
    options |= {"learning_rate": 0.05, "lr_scheduler": "constant"}
    trained, watching = model(**options, **alphas), Batches()
    trainer(tmp_path, max_epochs=2, callbacks=[watching]).fit(trained, datamodule=data(root))
    # By hand: soft targets are the mixture of both, which for cross-entropy without class weights would be the same.
    by_hand = model(**options)
    by_hand.head.load_state_dict(_first_head(tmp_path, root, options))
    groups = [{"params": by_hand.head.parameters(), "lr": 0.05}, {"params": by_hand.backbone.parameters(), "lr": 0.01}]
    optimizer = torch.optim.SGD(groups)
    loss_fn = torch.nn.CrossEntropyLoss(torch.tensor([1.0, 3.0]), label_smoothing=0.1)
    by_hand.train()
    for (epoch, number, images, targets), found in zip(watching.seen, watching.losses, strict=True):
        kept, (top, bottom, left, right) = Mixing(**alphas).draw(5, epoch, number, (32, 32))
        order = [len(images) - 1, *range(len(images) - 1)]
        if (top, bottom, left, right) == (0, 0, 0, 0):
            mixed = kept * images + (1 - kept) * images[order]
        else:
            mixed = images.clone()
            mixed[:, :, top:bottom, left:right] = images[order][:, :, top:bottom, left:right]
        outputs = by_hand(mixed)
        loss = kept * loss_fn(outputs, targets) + (1 - kept) * loss_fn(outputs, targets[order])
        assert loss.item() == pytest.approx(found, rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(watching.seen) == 6


def _first_head(tmp_path, root, options):
    """The head as a fit draws it from the seed."""
    heads = []

    class Takes(Callback):
        def on_train_start(self, trainer, module):
            heads.append({name: value.clone() for name, value in module.head.state_dict().items()})

    trainer(tmp_path, max_steps=1, callbacks=[Takes()]).fit(model(**options), datamodule=data(root))
    return heads[0]


class Stops(Callback):
    """Ends the fit in the middle of the second epoch, as a signal would."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            trainer.save_checkpoint(trainer.default_root_dir / "killed.ckpt")
            trainer.current_fit.leave()


def test_a_run_that_was_stopped_goes_on_with_the_same_mixtures(tmp_path, root):
    alphas = {"mixup_alpha": 0.5, "cutmix_alpha": 0.5}
    whole, resumed = model(**alphas), model(**alphas)
    trainer(tmp_path, max_epochs=2).fit(whole, datamodule=data(root))
    trainer(tmp_path, max_epochs=2, callbacks=[Stops()]).fit(model(**alphas), datamodule=data(root))
    trainer(tmp_path, max_epochs=2).fit(resumed, datamodule=data(root), ckpt_path=tmp_path / "killed.ckpt")
    assert digest(resumed) == digest(whole)


def test_a_frozen_backbone_is_run_in_every_epoch_and_a_line_says_why(tmp_path, root, capsys):
    trainer(tmp_path, enable_model_summary=True).finetune(model(mixup_alpha=0.2), datamodule=data(root))
    said = capsys.readouterr().err
    assert "features are computed again in each epoch: mixup_alpha=0.2 mixes the images of each batch" in said


def test_mixing_is_refused_where_it_has_no_meaning(tmp_path, root):
    with pytest.raises(UsageError, match="mixup_alpha must be a number of 0 or more"):
        model(mixup_alpha=-1)
    with building_without_weights():
        solved = ImageClassifier("timm/test_resnet", 2, head="prototype", mixup_alpha=0.2)
    with pytest.raises(UsageError, match="is solved, not trained"):
        trainer(tmp_path).finetune(solved, datamodule=data(root))
