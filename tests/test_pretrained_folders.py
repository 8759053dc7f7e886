"""Tasks as folders in timm's layout: written, read again, and read by plain timm."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from small import colour_folders

import flashtask
from flashtask import (
    HEADS,
    ImageClassificationData,
    ImageClassifier,
    ImageEmbedder,
    Preprocessing,
    Task,
    Trainer,
    read_checkpoint,
)
from flashtask.core.atomic_folders import atomic_folder
from flashtask.core.errors import (
    IntegrityError,
    MissingInputError,
    OutputError,
    StorageError,
    UnknownNameError,
    UsageError,
)
from flashtask.core.foreign_config import CODE_KEYS

LABELS = ["cat", "dog", "eel"]
#: timm's architectures whose classifiers stand in as many ways: a layer, two of them, in a head, a convolution.
ARCHITECTURES = {
    "resnet18": {},
    "efficientnet_lite0": {},
    "vit_tiny_patch16_224": {"img_size": 32},
    "deit_tiny_distilled_patch16_224": {"img_size": 32},
    "convnext_atto": {},
    "mobilenetv3_small_050": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2},
    "dla34": {},
}
#: They differ in where their last layer is, and in how many there are.
DIFFERENT = ("resnet18", "deit_tiny_distilled_patch16_224")
#: They pool before the last layers, so any size will do.
SMALL = Preprocessing(input_size=64)


def classifier(backbone="test_resnet", head="linear", **options):
    """A classifier with random weights, the running statistics of its norms included."""
    torch.manual_seed(7)
    task = ImageClassifier(backbone, labels=LABELS, head=head, pretrained=False, **options).eval()
    torch.nn.init.normal_(next(task.head.parameters()), std=0.1)  # not what any seed draws
    for name, buffer in task.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    if not (options.get("backbone_options") or {}).get("img_size"):
        task.preprocessing = SMALL
    return task


def outputs(module, size=(3, 64, 64)):
    with torch.no_grad():
        return module.eval()(torch.randn(2, *size, generator=torch.Generator().manual_seed(3)))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def change(folder, **keys):
    """Other values in config.json; in its part `flashtask`, where the key is there."""
    config = config_of(folder)
    for key, value in keys.items():
        (config["flashtask"] if key in config["flashtask"] or key.startswith("new_") else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return classifier().save_pretrained(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    """A folder of a small classifier, which a test may change."""
    return shutil.copytree(saved, tmp_path / "model")


# ---- plain timm


@pytest.mark.long
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name in DIFFERENT else pytest.mark.long) for name in ARCHITECTURES],
)
def test_plain_timm_gives_the_logits_of_a_linear_head(architecture, tmp_path):
    task = classifier(f"timm/{architecture}", backbone_options=ARCHITECTURES[architecture])
    folder = task.save_pretrained(tmp_path / "model")
    assert config_of(folder)["flashtask"]["weights"]["timm"] == "whole"
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True)
    size = task.preprocessing.input_size
    expected = outputs(task, size)
    assert expected.shape == (2, 3)
    torch.testing.assert_close(outputs(plain, size), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(ImageClassifier.from_pretrained(folder), size), expected, rtol=0, atol=0)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["resnet18", "test_vit", "convnext_atto"])
def test_transformers_reads_the_same_folder_and_gives_the_same_scores(architecture, tmp_path):
    transformers = pytest.importorskip("transformers")
    task = ImageClassifier(architecture, labels=LABELS, pretrained=False)
    task.save_pretrained(tmp_path / "model")
    found = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    assert found.config.label2id == {label: number for number, label in enumerate(LABELS)}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8))
    inputs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")(picture)
    with torch.no_grad():
        scores = found(**inputs).logits.softmax(1)[0].tolist()
    expected = task.predict(picture).probabilities
    assert scores == pytest.approx([expected[label] for label in LABELS], abs=1e-5)
    several = ImageClassifier(architecture, labels=LABELS, multi_label=True, pretrained=False)
    several.save_pretrained(tmp_path / "several")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "several")
    assert config.problem_type == "multi_label_classification"


def test_timm_sees_labels_preprocessing_and_its_own_keys(folder):
    config = config_of(folder)
    assert (config["architecture"], config["num_classes"], config["label_names"]) == ("test_resnet", 3, LABELS)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert tuple(plain.pretrained_cfg["input_size"]) == (3, 64, 64)
    assert tuple(plain.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)
    assert plain.pretrained_cfg["interpolation"] == "bilinear"
    assert plain.pretrained_cfg["label_names"] == LABELS
    assert load_file(folder / "model.safetensors").keys() == plain.state_dict().keys()


def test_other_channels_and_a_head_without_bias_are_read_by_timm(tmp_path):
    task = classifier("timm/test_resnet", in_chans=1, head_options={"bias": False, "dropout": 0.5})
    task.preprocessing = Preprocessing((1, 64, 64), (0.5,), (0.2,))
    folder = task.save_pretrained(tmp_path / "model")
    expected = outputs(task, (1, 64, 64))
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True)
    torch.testing.assert_close(outputs(plain, (1, 64, 64)), expected, rtol=1e-5, atol=1e-5)
    again = ImageClassifier.from_pretrained(folder)
    assert again.head.state_dict().keys() == task.head.state_dict().keys()
    torch.testing.assert_close(outputs(again, (1, 64, 64)), expected, rtol=0, atol=0)


def test_another_head_stands_beside_and_timm_reads_the_backbone(tmp_path):
    task = classifier("timm/test_resnet", "mlp", head_options={"hidden_sizes": [8]})
    folder = task.save_pretrained(tmp_path / "model")
    assert (folder / "head.safetensors").is_file()
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    torch.testing.assert_close(outputs(plain), outputs(task.backbone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs(ImageClassifier.from_pretrained(folder)), outputs(task), rtol=0, atol=0)
    assert config_of(folder)["flashtask"]["weights"] == {"timm": "backbone", "head": "head.safetensors"}


def test_an_embedder_is_a_backbone_to_timm(tmp_path):
    torch.manual_seed(0)
    task = ImageEmbedder("timm/test_resnet", pretrained=False).eval()
    folder = task.save_pretrained(tmp_path / "model")
    assert not (folder / "head.safetensors").exists()
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True)
    torch.testing.assert_close(outputs(plain), outputs(task), rtol=1e-5, atol=1e-5)
    assert isinstance(flashtask.load(folder), ImageEmbedder)
    assert "image-feature-extraction" in (folder / "README.md").read_text()


def test_a_torchvision_backbone_is_for_flashtask_alone_and_says_so(tmp_path):
    task = classifier("torchvision/squeezenet1_1")
    folder = task.save_pretrained(tmp_path / "model")
    config = config_of(folder)
    assert config["architecture"] == "torchvision/squeezenet1_1"
    assert config["flashtask"]["weights"] == {"timm": "none"}
    assert "flashtask alone reads it" in (folder / "README.md").read_text()
    torch.testing.assert_close(outputs(ImageClassifier.from_pretrained(folder)), outputs(task), rtol=0, atol=0)


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return self.layer(images).mean((2, 3))


def test_a_backbone_of_the_users_own_is_asked_for_by_name(tmp_path):
    with pytest.warns(UserWarning, match="cannot be stored"):
        task = classifier(Own())
    folder = task.save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="argument 'backbone'") as caught:
        ImageClassifier.from_pretrained(folder)
    assert "from_pretrained" in caught.value.fix
    with pytest.warns(UserWarning, match="cannot be stored"):
        again = ImageClassifier.from_pretrained(folder, backbone=Own())
    torch.testing.assert_close(outputs(again), outputs(task), rtol=0, atol=0)


def test_a_module_that_timm_built_is_read_without_any_code(tmp_path):
    with pytest.warns(UserWarning, match="cannot be stored"):
        task = classifier(timm.create_model("test_resnet", num_classes=0))
    folder = task.save_pretrained(tmp_path / "model")
    again = ImageClassifier.from_pretrained(folder)
    assert again.hparams["backbone"] == "timm/test_resnet"
    torch.testing.assert_close(outputs(again), outputs(task), rtol=0, atol=0)


def test_a_head_that_timm_would_read_wrongly_is_not_given_to_it(tmp_path):
    class Squared(torch.nn.Module):
        """Only the numbers show that it is no linear layer."""

        def __init__(self, num_features, num_outputs):
            super().__init__()
            self.layer = torch.nn.Linear(num_features, num_outputs)

        def forward(self, features):
            return self.layer(features) ** 2

    HEADS.register("squared", Squared)
    try:
        task = classifier(head="squared")
        folder = task.save_pretrained(tmp_path / "model")
        assert config_of(folder)["flashtask"]["weights"]["timm"] == "backbone"
        torch.testing.assert_close(outputs(flashtask.load(folder)), outputs(task), rtol=0, atol=0)
    finally:
        HEADS.remove("squared")
    with pytest.raises(UnknownNameError, match="squared"):
        flashtask.load(folder)


# ---- writing


def test_saving_changes_neither_the_model_nor_the_random_numbers(tmp_path):
    task = classifier()
    task.train()
    before, modes = {k: v.clone() for k, v in task.state_dict().items()}, [m.training for m in task.modules()]
    state = torch.get_rng_state()
    task.save_pretrained(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in task.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_a_folder_of_ours_is_replaced_and_an_empty_one_is_taken(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    classifier().save_pretrained(tmp_path / "empty")
    classifier(head="mlp").save_pretrained(folder)
    assert (folder / "head.safetensors").exists()
    classifier().save_pretrained(folder)
    assert not (folder / "head.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model"]


def test_a_folder_that_holds_anything_else_is_left_alone(folder):
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputError, match=r"notes\.txt"):
        classifier(head="mlp").save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    file = folder / "README.md"
    with pytest.raises(OutputError, match="a file of that name"):
        classifier().save_pretrained(file)


def test_a_failed_write_leaves_what_was_there(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flashtask.tasks.pretrained.saving.save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        classifier(head="mlp").save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_error_inside_leaves_no_folder(tmp_path):
    def interrupted():
        with atomic_folder(tmp_path / "new", ["a"]) as place:
            (place / "a").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_task_without_a_head_or_a_name_is_not_saved(tmp_path):
    with pytest.raises(UsageError, match="no head yet"):
        ImageClassifier("test_resnet", pretrained=False).save_pretrained(tmp_path / "model")

    class Unnamed(Task):
        pass

    with pytest.raises(UsageError, match="no registry name"):
        Unnamed("test_resnet", num_outputs=2, pretrained=False).save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# ---- reading


def test_everything_that_a_checkpoint_says_comes_back(folder):
    again = ImageClassifier.from_pretrained(folder)
    assert again.labels == tuple(LABELS)
    assert again.preprocessing == classifier().preprocessing
    assert not again.training
    assert again.hparams["learning_rate"] == classifier().hparams["learning_rate"]
    assert Task.from_pretrained(folder).labels == tuple(LABELS)
    assert flashtask.load(str(folder)).labels == tuple(LABELS)


def test_arguments_for_further_training_are_taken_and_those_of_the_weights_refused(folder):
    again = ImageClassifier.from_pretrained(folder, learning_rate=0.5, optimizer="sgd")
    assert (again.learning_rate, again.hparams["optimizer"]) == (0.5, "sgd")
    with pytest.raises(UsageError, match="backbone is part of the model"):
        ImageClassifier.from_pretrained(folder, backbone="resnet18")
    with pytest.raises(UsageError, match="learning_rte"):
        ImageClassifier.from_pretrained(folder, learning_rte=0.5)


def test_another_task_is_an_error_with_the_right_name(folder, tmp_path):
    embedder = ImageEmbedder("test_resnet", pretrained=False).save_pretrained(tmp_path / "embedder")
    with pytest.raises(UsageError, match="'image_embedding', not 'image_classification'") as caught:
        ImageClassifier.from_pretrained(embedder)
    assert "ImageEmbedder.from_pretrained" in caught.value.fix
    with pytest.raises(UsageError, match="'image_classification', not 'image_embedding'"):
        ImageEmbedder.from_pretrained(folder)


def test_map_location_says_where_the_weights_are(folder):
    assert ImageClassifier.from_pretrained(folder, map_location="meta").device.type == "meta"
    assert flashtask.load(folder, map_location="meta").device.type == "meta"


def test_a_class_of_the_users_for_the_same_task_is_what_it_gives(folder):
    class Mine(ImageClassifier):
        pass

    assert type(Mine.from_pretrained(folder)) is Mine


def test_other_labels_keep_the_rows_of_those_that_remain(folder):
    known = ImageClassifier.from_pretrained(folder)
    again = ImageClassifier.from_pretrained(folder, labels=["eel", "fox", "cat"])
    assert again.labels == ("eel", "fox", "cat")
    old, new = known.head[0].weight, again.head[0].weight
    assert torch.equal(new[0], old[2])
    assert torch.equal(new[2], old[0])
    assert not torch.equal(new[1], old[1])


@pytest.mark.long
def test_another_head_is_drawn_anew_on_the_trained_backbone(folder):
    known = ImageClassifier.from_pretrained(folder)
    again = ImageClassifier.from_pretrained(folder, head="mlp", labels=["a", "b"])
    assert again.labels == ("a", "b")
    assert type(again.head).__name__ == "MLPHead"
    assert outputs(again).shape == (2, 2)
    torch.testing.assert_close(outputs(again.backbone), outputs(known.backbone), rtol=0, atol=0)
    assert ImageClassifier.from_pretrained(folder, head="mlp").labels is None
    assert ImageClassifier.from_pretrained(folder, num_classes=7).head[0].out_features == 7


def test_paths_that_hold_no_model_say_what_to_give(folder, tmp_path):
    with pytest.raises(MissingInputError, match="mdoel") as caught:
        flashtask.load(tmp_path / "mdoel")
    assert "model" in caught.value.fix
    with pytest.raises(MissingInputError) as caught:
        flashtask.load("someone/something")
    assert "hf://someone/something" in caught.value.fix
    with pytest.raises(UsageError, match="not on the hub"):
        ImageClassifier.from_pretrained(folder, revision="main")


# ---- hostile and damaged files


@pytest.mark.parametrize("key", sorted(CODE_KEYS))
def test_a_config_that_asks_for_code_is_refused(folder, key):
    change(folder, more={"deep": [{key: "os.system"}]})
    with pytest.raises(IntegrityError, match=f"code to be run.*{key}"):
        flashtask.load(folder)


def test_names_in_a_config_are_names_of_the_registry_and_nothing_else(folder):
    for task in ("os.system", "flashtask.tasks.task:Task", "../image_classification"):
        change(folder, task=task)
        with pytest.raises(UnknownNameError):
            flashtask.load(folder)
    change(folder, task="image_classification", hyper_parameters={"backbone": "os:system", "num_classes": 3})
    with pytest.raises((UnknownNameError, IntegrityError)):
        flashtask.load(folder)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"format": 2}, "format 2, and this flashtask reads 1"),
        ({"format": True}, "no format number"),
        ({"new_key": 1}, "an unknown key 'new_key'"),
        ({"labels": ["a", "a", "b"]}, "not different names"),
        ({"labels": [1, 2, 3]}, "not different names"),
        ({"hyper_parameters": []}, "hyper_parameters is a list"),
        ({"preprocessing": {"input_size": [3, 10**9, 10**9]}}, "preprocessing cannot be used"),
        ({"preprocessing": {"input_size": "large"}}, "preprocessing cannot be used"),
        ({"weights": {"timm": "elsewhere"}}, "where the weights are"),
        ({"weights": {"timm": "whole", "classifiers": [], "head_prefix": "0."}}, "where the weights are"),
        ({"weights": {"timm": "whole", "classifiers": ["nothing"], "head_prefix": "0."}}, "no classifier nothing"),
        ({"weights": {"timm": "none"}}, "do not fit|far larger than its weights"),
        ({"weights": {"timm": "backbone", "head": None}}, "do not fit"),
    ],
)
def test_a_config_that_is_wrong_is_refused_with_the_file(folder, keys, message):
    change(folder, **keys)
    with pytest.raises(IntegrityError, match=message) as caught:
        flashtask.load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"flashtask": {"format": NaN}}', '{"a": 1, "a": 2}', "[" * 100_000, '{"a":' * 60 + "1" + "}" * 60],
    ids=["empty", "list", "cut", "nan", "twice", "deep", "deeper"],
)
def test_a_config_that_is_no_plain_json_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"config\.json"):
        flashtask.load(folder)


def test_a_config_of_any_size_is_not_read(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(IntegrityError, match="larger than 8,388,608 bytes"):
        flashtask.load(folder)


def test_weights_that_are_damaged_or_missing_are_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        flashtask.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingInputError, match=r"model\.safetensors"):
        flashtask.load(folder)


@pytest.mark.long
def test_classifiers_that_differ_are_no_longer_one_head(tmp_path):
    task = classifier("timm/deit_tiny_distilled_patch16_224", backbone_options={"img_size": 32})
    folder = task.save_pretrained(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["head_dist.bias"] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(IntegrityError, match="head, head_dist differ"):
        flashtask.load(folder)


# ---- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs: (its folder, the data)."""
    root = tmp_path_factory.mktemp("run")
    colours = colour_folders(root / "private place" / "colours", each=6)
    data = ImageClassificationData.from_folders(colours, val_split=4, batch_size=4, num_workers=0)
    return train(ImageClassifier("test_resnet", pretrained=False), data, root / "first"), colours


def train(task, data, folder, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=2, output_dir=folder, seed=3, **quiet, **options)
    trainer.finetune(task, data, strategy="no_freeze")
    return folder


def data_of(colours):
    return ImageClassificationData.from_folders(colours, val_split=4, batch_size=4, num_workers=0)


@pytest.mark.long
def test_the_card_is_written_from_the_run(run, tmp_path):
    task = flashtask.load(run[0] / "best.ckpt")
    folder = task.save_pretrained(tmp_path / "model", licence="mit")
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "timm"
    assert front["pipeline_tag"] == "image-classification"
    assert (front["license"], front["metrics"]) == ("mit", ["accuracy"])
    metrics = read_checkpoint(run[0] / "best.ckpt")["metrics"]
    assert f"| val_accuracy | {metrics['val_accuracy']:.4g} |" in text
    assert "| blue | 4 | 2 |\n| red | 4 | 2 |\n| all | 8 | 4 |" in text
    assert "`val_split: 4`" in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["trainer"]["max_epochs"] == 2
    assert recipe["data"]["from_folders"]["train_folder"] == ".../private place/colours"
    assert "Training began from random weights" in text
    assert f"torch {torch.__version__}" in text
    for name in ("README.md", "config.json"):  # a folder is given away: nothing in it names a place on this disk
        assert str(run[0].parent) not in (folder / name).read_text()


def test_a_card_does_not_say_what_is_not_known(tmp_path):
    text = (classifier().save_pretrained(tmp_path / "model") / "README.md").read_text()
    assert "not known what these weights were trained on" in text
    assert "No measurements are known" in text
    assert "No licence has been given" in text
    assert "license" not in yaml.safe_load(text.split("---\n")[1])


def test_a_label_cannot_write_the_card(tmp_path):
    task = ImageClassifier("test_resnet", labels=["a|b\n# Big", "`c`<script>"], pretrained=False)
    text = (task.save_pretrained(tmp_path / "model") / "README.md").read_text()
    assert "\n# Big" not in text
    assert "<script>" not in text


@pytest.mark.long
def test_the_card_of_a_live_model_is_that_of_its_best_epoch(run, tmp_path):
    task = ImageClassifier("test_resnet", pretrained=False)
    train(task, data_of(run[1]), tmp_path / "run")
    task.save_pretrained(tmp_path / "live")
    flashtask.load(tmp_path / "run" / "best.ckpt").save_pretrained(tmp_path / "loaded")
    assert (tmp_path / "live" / "README.md").read_text() == (tmp_path / "loaded" / "README.md").read_text()
    live, loaded = config_of(tmp_path / "live"), config_of(tmp_path / "loaded")
    assert live["flashtask"]["provenance"] == loaded["flashtask"]["provenance"]


@pytest.mark.long
def test_a_folder_keeps_its_provenance_when_it_is_saved_again(run, tmp_path):
    first = flashtask.load(run[0] / "best.ckpt").save_pretrained(tmp_path / "first")
    second = flashtask.load(first).save_pretrained(tmp_path / "second")
    assert config_of(second)["flashtask"] == config_of(first)["flashtask"]
    assert (second / "README.md").read_text() == (first / "README.md").read_text()


@pytest.mark.long
def test_a_run_from_a_folder_says_so_and_its_recipe_pins_the_weights(run, tmp_path):
    folder = flashtask.load(run[0] / "best.ckpt").save_pretrained(tmp_path / "model")
    task = ImageClassifier.from_pretrained(folder, learning_rate=0.003)
    origin = task.pretrained_from
    assert origin["path"] == str(folder)
    again = train(task, data_of(run[1]), tmp_path / "again")
    assert read_checkpoint(again / "last.ckpt")["pretrained_from"] == origin
    recipe = yaml.safe_load((again / "recipe.yaml").read_text())
    assert recipe["model"]["from"] == str(folder)
    assert recipe["model"]["from_sha256"] == origin["sha256"]
    assert recipe["model"]["learning_rate"] == 0.003
    assert not {"backbone", "head", "pretrained", "labels"} & set(recipe["model"])
    card = (task.save_pretrained(tmp_path / "card") / "README.md").read_text()
    assert f"`.../{os.path.basename(tmp_path)}/model` (sha256 `{origin['sha256']}`)" in card


@pytest.mark.long
def test_a_model_that_went_through_a_folder_is_trained_on_to_the_same_bits(run, tmp_path):
    folder = flashtask.load(run[0] / "best.ckpt").save_pretrained(tmp_path / "model")
    digests = []
    for number, source in enumerate((folder, run[0] / "best.ckpt")):
        task = ImageClassifier.from_pretrained(source, learning_rate=0.003)
        train(task, data_of(run[1]), tmp_path / str(number))
        digests.append([value.clone() for value in task.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*digests, strict=True))


@pytest.mark.long
def test_adapters_are_merged_in_what_is_given_away(run, tmp_path):
    task = ImageClassifier("test_vit", pretrained=False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=1, output_dir=tmp_path / "run", **quiet)
    trainer.finetune(task, data_of(run[1]), strategy="lora:2")
    names = [name for name in task.state_dict() if "lora" in name]
    assert names
    folder = task.save_pretrained(tmp_path / "model")
    assert not any("lora" in name for name in load_file(folder / "model.safetensors"))
    size = task.preprocessing.input_size
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True)
    torch.testing.assert_close(outputs(plain, size), outputs(task, size), rtol=1e-4, atol=1e-5)
    assert [name for name in task.state_dict() if "lora" in name] == names


@pytest.mark.long
def test_a_folder_survives_a_move(run, tmp_path):
    folder = flashtask.load(run[0] / "best.ckpt").save_pretrained(tmp_path / "model")
    moved = shutil.move(folder, tmp_path / "elsewhere")
    image = next(run[1].rglob("*.png"))
    expected = flashtask.load(run[0] / "best.ckpt").predict(image)
    found = flashtask.load(moved).predict(image)
    assert found.labels == expected.labels
    assert found.scores == pytest.approx(expected.scores, rel=1e-5)
