"""`image_size`, `resize` and `drop_path_rate`: backbones of another size, and checkpoints that predict with it."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from small import quiet
from timm.layers import DropPath
from torchvision.models import VisionTransformer

import flashtask
from flashtask import ImageClassificationData, ImageClassifier, Preprocessing
from flashtask.backbones.torchvision_provider import load_resampled
from flashtask.cli import run as command_line
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.tasks.head_drawing import building_without_weights


@pytest.fixture
def folders(tmp_path):
    """Two classes that differ at the sides of wide pictures, which a centre crop does not see."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for number, name in enumerate(("dark", "light")):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for index in range(4):
                pixels = generator.integers(100, 156, (60, 180, 3), dtype=np.uint8)
                pixels[:, :50] = 255 * number
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "data"


def small(backbone="timm/test_resnet", **options):
    with building_without_weights():
        return ImageClassifier(backbone, 2, **options)


def test_a_vision_transformer_of_another_size_is_timms_own_with_resampled_embeddings(tmp_path):
    torch.manual_seed(0)
    original = timm.create_model("test_vit", num_classes=0)
    save_file(original.state_dict(), tmp_path / "vit.safetensors")
    options = {"backbone_options": {"weights": str(tmp_path / "vit.safetensors")}}
    model = ImageClassifier("timm/test_vit", 2, image_size=(96, 128), **options).eval()
    theirs = timm.create_model(
        "test_vit",
        pretrained=True,
        num_classes=0,
        img_size=(96, 128),
        pretrained_cfg_overlay={"file": str(tmp_path / "vit.safetensors"), "num_classes": 0},
    ).eval()
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        assert torch.equal(model.backbone(images), theirs(images))
    assert model.preprocessing.input_size == (3, 96, 128)


def test_a_vision_transformer_of_torchvision_gets_its_embeddings_resampled():
    small_one = {"patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 32, "num_classes": 3}
    state = VisionTransformer(image_size=64, **small_one).state_dict()
    larger = VisionTransformer(image_size=96, **small_one)
    load_resampled(larger, state)
    grid = state["encoder.pos_embedding"][:, 1:].permute(0, 2, 1).reshape(1, 32, 4, 4)
    expected = torch.nn.functional.interpolate(grid, size=6, mode="bicubic", align_corners=True)
    found = larger.encoder.pos_embedding[:, 1:].permute(0, 2, 1).reshape(1, 32, 6, 6)
    torch.testing.assert_close(found, expected)
    assert torch.equal(larger.conv_proj.weight, state["conv_proj.weight"])


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("backbone", "asked", "used"),
    [
        ("timm/test_vit", 50, (64, 64)),
        ("timm/test_vit", (64, 90), (64, 96)),
        ("timm/test_resnet", 50, (50, 50)),
        ("timm/levit_128s", 150, (160, 160)),
        ("torchvision/resnet18", (40, 60), (40, 60)),
    ],
)
def test_a_size_is_rounded_up_to_what_the_backbone_takes(backbone, asked, used):
    model = small(backbone, image_size=asked)
    assert model.preprocessing.input_size[1:] == used
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, *used)).shape == (1, 2)


@pytest.mark.long
def test_the_fit_says_what_was_rounded_and_the_recipe_keeps_what_was_asked(tmp_path, folders, capsys):
    model = small("timm/test_vit", image_size=50)
    data = ImageClassificationData.from_folders(folders / "train")
    trainer = quiet(tmp_path, enable_model_summary=True)
    trainer.finetune(model, datamodule=data)
    assert "image_size: 50 x 50 is rounded up to 64 x 64" in capsys.readouterr().err
    content = flashtask.read_checkpoint(trainer.output_dir / "last.ckpt")
    assert content["recipe"]["model"]["image_size"] == 50
    assert content["hyper_parameters"]["image_size"] == (64, 64)
    assert flashtask.load(trainer.output_dir).preprocessing.input_size == (3, 64, 64)


def test_a_backbone_of_one_size_and_other_mistakes_are_refused():
    fixed = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.Linear(3 * 7 * 7, 4))
    with pytest.raises(UsageError, match="cannot be run on images of"):
        small(fixed, image_size=150)
    for wrong in (0, "a", (1, 2, 3), 2.5):
        with pytest.raises(UsageError, match="image_size must be pixels"):
            small(image_size=wrong)
    with pytest.raises(UsageError, match="img_size are the same"):
        small("timm/test_vit", image_size=64, backbone_options={"img_size": 64})
    with pytest.raises(UnknownNameError, match="no way to resize named 'sqash'") as caught:
        small(resize="sqash")
    assert "'squash'" in caught.value.fix


@pytest.mark.parametrize(("resize", "mode"), [("crop", "center"), ("pad", "border"), ("squash", "squash")])
def test_resize_is_one_of_the_crop_modes_and_only_crop_leaves_something_out(folders, resize, mode):
    model = small(image_size=64, resize=resize)
    assert model.preprocessing.crop_mode == mode
    image = Image.open(folders / "val" / "light" / "0.png")
    seen = flashtask.data.transforms.eval_transform(model.preprocessing)(image)
    brightest = seen.amax().item()
    whole = (1 - min(model.preprocessing.mean)) / min(model.preprocessing.std)
    assert (brightest > 0.9 * whole) == (resize != "crop")


@pytest.mark.long
def test_a_checkpoint_predicts_at_its_size_through_every_verb(tmp_path, folders, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ["--backbone", "timm/test_resnet", "--no-pretrained", "--quiet", "--epochs", "1"]
    sizes = ["--image-size", "160", "--resize", "squash", "--metrics", "f1_macro,mcc"]
    assert command_line(["finetune", "data", *base, *sizes, "--output-dir", "run"]) == 0
    model = flashtask.load("run")
    assert (model.preprocessing.input_size, model.preprocessing.crop_mode) == ((3, 160, 160), "squash")
    paths = sorted((folders / "val").glob("*/*.png"))
    found = {str(one.path): one.score for one in model.predict([str(path) for path in paths])}
    capsys.readouterr()
    assert command_line(["predict", "run", *map(str, paths), "--format", "json"]) == 0
    for row in json.loads(capsys.readouterr().out):
        assert row["score"] == pytest.approx(found[row["path"]], abs=1e-6)
    data = ImageClassificationData.from_folders(val_folder=folders / "val", predict_folder=folders / "val")
    (by_trainer,) = quiet(tmp_path).validate(model, datamodule=data)
    outputs = torch.cat(quiet(tmp_path).predict(model, datamodule=data))
    assert outputs.amax(dim=1).tolist() == pytest.approx([found[str(path)] for path in paths], abs=1e-6)
    assert command_line(["validate", "run", "data", "--json"]) == 0
    by_command = json.loads(capsys.readouterr().out)
    assert by_command == pytest.approx(by_trainer, abs=1e-6)
    with open("run/metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    for name in ("val_loss", "val_f1_macro", "val_mcc"):
        assert float(row[name]) == pytest.approx(by_command[name], abs=1e-5)
    folder = model.save_pretrained(tmp_path / "folder")
    again = flashtask.load(folder).predict(str(paths[0]))
    assert again.score == pytest.approx(found[str(paths[0])], abs=1e-6)


def test_two_different_sizes_contradict_each_other(tmp_path, folders):
    data = ImageClassificationData.from_folders(folders / "train", preprocessing=Preprocessing(input_size=64))
    with pytest.raises(UsageError, match="image_size of the model means"):
        quiet(tmp_path).finetune(small(image_size=96), datamodule=data)
    quiet(tmp_path).finetune(small(image_size=64), datamodule=data)


def test_drop_path_rate_is_that_of_timm():
    def rates(model):
        return [part.drop_prob for part in model.modules() if isinstance(part, DropPath)]

    expected = rates(timm.create_model("test_vit", drop_path_rate=0.3))
    assert rates(small("timm/test_vit", drop_path_rate=0.3)) == expected
    assert len(expected) > 0
    model = small("torchvision/efficientnet_b0", drop_path_rate=0.5)
    assert max(getattr(part, "p", 0) for part in model.backbone.modules() if "Stochastic" in type(part).__name__) > 0.4
    with pytest.raises(UsageError, match="drop_path_rate must be from 0 to below 1"):
        small(drop_path_rate=1)
    with pytest.raises(UsageError, match="cannot be built with these options"):
        small("timm/vgg11", drop_path_rate=0.1)
