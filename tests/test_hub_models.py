"""Whole models from a hub on the loopback: flashtask's own and plain timm's, and runs that begin from them."""

from __future__ import annotations

import json

import hub_server
import pytest
import timm
import torch
import yaml
from hub_server import HubServer
from safetensors.torch import save
from small import colour_folders
from timm.data import ImageNetInfo

import flashtask
from flashtask import ImageClassificationData, ImageClassifier, ImageEmbedder, Task, Trainer, read_checkpoint
from flashtask.cli import run
from flashtask.core.errors import HubError, IntegrityError, UsageError
from flashtask.core.hub.address import HubAddress
from flashtask.core.hub.upload import upload_folder
from flashtask.tasks.pretrained.plain_timm import timm_content

# The client's own way to send a file, as its own HTTP library sees it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that this process asks."""
    with HubServer() as server:
        hub_server.use(monkeypatch, server, tmp_path / "home")
        yield server


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def images(size):
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(3))


def outputs(module, size=(3, 64, 64)):
    with torch.no_grad():
        return module.eval()(images(size))


def task_folder(folder, labels=("blue", "red"), backbone="test_resnet"):
    torch.manual_seed(5)
    task = ImageClassifier(backbone, labels=list(labels), pretrained=False)
    torch.nn.init.normal_(task.head[0].weight)
    return task, task.save_pretrained(folder)


def timm_files(architecture, num_classes=5, weights="model.safetensors", **config):
    """(model, files) of a plain timm repository with random weights."""
    arguments = config.get("model_args", {})
    torch.manual_seed(11)
    model = timm.create_model(architecture, num_classes=num_classes, **arguments).eval()
    noted = {
        "num_classes": num_classes,
        "input_size": [3, 64, 64],
        "mean": [0.4] * 3,
        "std": [0.3] * 3,
        "crop_pct": 0.9,
    }
    noted |= {"interpolation": "bicubic", "classifier": model.pretrained_cfg["classifier"]}
    noted |= {"first_conv": model.pretrained_cfg["first_conv"], **config.pop("pretrained_cfg", {})}
    content = {"architecture": architecture, "num_classes": num_classes, "pretrained_cfg": noted, **config}
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if weights.endswith(".bin"):
        import io

        stream = io.BytesIO()
        torch.save(state, stream)
        data = stream.getvalue()
    else:
        data = save(state)
    return model, {"config.json": json.dumps(content).encode(), weights: data}


# ---- flashtask's own repositories


@pytest.mark.long
def test_a_model_comes_from_the_hub_and_says_which_commit_it_was(hub, tmp_path):
    task, folder = task_folder(tmp_path / "model")
    commit = hub.add("org/name", files_of(folder))
    found = ImageClassifier.from_pretrained("org/name")
    assert found.pretrained_from == {"repository": "org/name", "commit": commit}
    assert found.labels == ("blue", "red")
    torch.testing.assert_close(outputs(found), outputs(task), rtol=0, atol=0)
    for address in ("hf://org/name", "hf-hub:org/name", f"hf://org/name@{commit}", "hf://org/name@main"):
        assert flashtask.load(address).pretrained_from == found.pretrained_from


@pytest.mark.long
def test_a_revision_is_pinned_whatever_the_branch_becomes(hub, tmp_path):
    _, first = task_folder(tmp_path / "first")
    _, second = task_folder(tmp_path / "second", labels=("a", "b", "c"))
    old = hub.add("org/name", files_of(first))
    new = hub.commit("org/name", files_of(second), "main")
    assert ImageClassifier.from_pretrained("org/name").pretrained_from["commit"] == new
    assert ImageClassifier.from_pretrained("org/name", revision=old).labels == ("blue", "red")
    assert Task.from_pretrained(f"org/name@{old}").labels == ("blue", "red")
    with pytest.raises(UsageError, match="two revisions"):
        ImageClassifier.from_pretrained(f"org/name@{old}", revision="main")


@pytest.mark.long
def test_the_second_time_nothing_is_asked_of_the_hub_when_offline(hub, tmp_path, monkeypatch):
    task, folder = task_folder(tmp_path / "model")
    hub.add("org/name", files_of(folder))
    flashtask.load("hf://org/name")
    before = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.testing.assert_close(outputs(flashtask.load("hf://org/name")), outputs(task), rtol=0, atol=0)
    assert len(hub.requests) == before


def test_nothing_takes_the_place_of_a_model_that_cannot_be_had(hub, tmp_path):
    _, folder = task_folder(tmp_path / "model")
    with pytest.raises(HubError, match="org/nothing"):
        ImageClassifier.from_pretrained("org/nothing")
    files = files_of(folder)
    hub.add("org/no-weights", {"config.json": files["config.json"]})
    with pytest.raises(HubError, match="pytorch_model"):
        ImageClassifier.from_pretrained("org/no-weights")
    hub.add("org/no-config", {"model.safetensors": files["model.safetensors"]})
    with pytest.raises(HubError, match=r"config\.json"):
        ImageClassifier.from_pretrained("org/no-config")
    hub.mode = "gated"
    with pytest.raises(HubError, match="gated"):
        flashtask.load("hf://org/no-weights")


def test_bytes_that_are_not_the_promised_ones_are_refused(hub, tmp_path):
    _, folder = task_folder(tmp_path / "model")
    hub.add("org/name", files_of(folder))
    hub.mode = "same_size"
    with pytest.raises(IntegrityError):
        flashtask.load("hf://org/name")


def test_a_folder_of_that_name_comes_before_the_hub(hub, tmp_path, monkeypatch):
    task_folder(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert "path" in ImageClassifier.from_pretrained("org/name").pretrained_from
    assert hub.requests == []


# ---- plain timm


@pytest.mark.long
@pytest.mark.parametrize(
    ("architecture", "arguments", "weights"),
    [
        ("test_resnet", {}, "model.safetensors"),
        ("test_resnet", {}, "pytorch_model.bin"),
        pytest.param("resnet18", {}, "model.safetensors", marks=pytest.mark.long),
        pytest.param("vit_tiny_patch16_224", {"img_size": 64}, "model.safetensors", marks=pytest.mark.long),
        pytest.param("deit_tiny_distilled_patch16_224", {"img_size": 64}, "model.safetensors", marks=pytest.mark.long),
        pytest.param("convnext_atto", {}, "model.safetensors", marks=pytest.mark.long),
        pytest.param("mobilenetv3_small_050", {}, "model.safetensors", marks=pytest.mark.long),
        pytest.param("dla34", {}, "model.safetensors", marks=pytest.mark.long),
    ],
)
def test_a_plain_timm_repository_is_a_classifier_with_timms_own_logits(hub, architecture, arguments, weights):
    extra = {"model_args": arguments} if arguments else {}
    names = ["ant", "bee", "cow", "dog", "elk"]
    model, files = timm_files(architecture, weights=weights, label_names=names, **extra)
    if architecture.startswith("deit"):  # two classifiers that differ are no one head: see below
        with torch.no_grad():
            for parameter, other in zip(model.head_dist.parameters(), model.head.parameters(), strict=True):
                parameter.copy_(other)
        files["model.safetensors"] = save(model.state_dict())
    commit = hub.add("org/plain", files)
    task = ImageClassifier.from_pretrained("org/plain")
    exact = not architecture.startswith(("dla", "deit"))
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(outputs(task), outputs(model), **tolerance)
    assert task.labels == ("ant", "bee", "cow", "dog", "elk")
    assert task.preprocessing.input_size == (3, 64, 64)
    assert (task.preprocessing.mean, task.preprocessing.crop_pct) == ((0.4,) * 3, 0.9)
    assert task.pretrained_from == {"repository": "org/plain", "commit": commit}
    if weights.endswith(".safetensors"):  # a pickled file is read by a new process each time
        assert isinstance(flashtask.load("hf://org/plain"), ImageClassifier)


@pytest.mark.long
def test_classifiers_that_are_no_one_linear_layer_are_refused_with_a_way_out(hub):
    _, files = timm_files("deit_tiny_distilled_patch16_224", model_args={"img_size": 64})
    hub.add("org/plain", files)
    with pytest.raises(UsageError, match="not one linear layer") as caught:
        ImageClassifier.from_pretrained("org/plain")
    assert "head, head_dist" in caught.value.why
    assert "backbone=" in caught.value.fix


@pytest.mark.long
def test_labels_of_a_plain_repository_are_its_own_or_imagenets_or_numbers(tmp_path):
    def labels(**config):
        num_classes = config.pop("num_classes", 3)
        _, files = timm_files("test_resnet", num_classes, **config)
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        return timm_content(tmp_path)["labels"]

    assert labels(label_names=["x", "y", "z"]) == ["x", "y", "z"]
    assert labels(label_names={"0": "x", "2": "z"}) == ["x", "1", "z"]
    assert labels(label_descriptions={"n1": "one", "n2": "two", "n3": "three"}) == ["n1", "n2", "n3"]
    assert labels() == ["0", "1", "2"]
    found = labels(num_classes=1000, pretrained_cfg={"tag": "a1_in1k"})
    described = ImageNetInfo().label_descriptions()
    assert len(set(found)) == 1000
    assert found[281] == described[281] == "tabby, tabby cat"
    assert found[134].startswith("crane (n")
    # A thousand classes of one's own are not ImageNet's.
    assert labels(num_classes=1000)[281] == "281"


def test_a_plain_backbone_and_an_embedder_of_a_classifier_say_what_to_write(hub):
    _, files = timm_files("test_resnet", 0)
    hub.add("org/backbone", files)
    with pytest.raises(UsageError, match="without a classifier"):
        ImageClassifier.from_pretrained("org/backbone")
    _, files = timm_files("test_resnet")
    hub.add("org/plain", files)
    with pytest.raises(UsageError, match="'image_classification', not 'image_embedding'"):
        ImageEmbedder.from_pretrained("org/plain")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "source",
    [
        *("url", "file", "hf_hub_id", "state_dict"),
        *(pytest.param(key, marks=pytest.mark.long) for key in ("hf_hub_filename", "source", "custom_load")),
    ],
)
def test_a_config_cannot_send_timm_elsewhere_for_the_weights(hub, tmp_path, source):
    bait = tmp_path / "other.pth"
    values = {"source": "url", "custom_load": "hf", "state_dict": {"a": 1}}
    value = values.get(source, str(bait))
    model, files = timm_files("test_resnet", pretrained_cfg={source: value})
    hub.add("org/plain", files)
    before = len(hub.requests)
    try:
        task = ImageClassifier.from_pretrained("org/plain")
    except IntegrityError:
        return
    torch.testing.assert_close(outputs(task), outputs(model), rtol=0, atol=0)
    asked = [path for _, path in hub.requests[before:] if "org/plain" not in path]
    assert all(path.startswith(("/lfs/", "/api/agent-harnesses")) for path in asked)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "resnet18"},
        {"num_classes": 4},
        pytest.param({"model_args": {"in_chans": 1}}, marks=pytest.mark.long),
        {"auto_map": {"AutoModel": "model.Model"}},
        pytest.param({"architecture": "os.system"}, marks=pytest.mark.long),
        pytest.param({"architecture": "vit_giant_patch14_224"}, marks=pytest.mark.long),
        {"pretrained_cfg": {"num_classes": 5, "input_size": [3, 16000, 16000]}},
    ],
)
def test_a_plain_repository_that_contradicts_itself_or_asks_for_code_is_refused(hub, change):
    _, files = timm_files("test_resnet")
    content = {**json.loads(files["config.json"]), **change}
    hub.add("org/plain", {**files, "config.json": json.dumps(content).encode()})
    with pytest.raises(IntegrityError):
        flashtask.load("hf://org/plain")


@pytest.mark.long
def test_a_plain_model_goes_back_to_the_hub_with_a_card(hub, tmp_path, monkeypatch):
    model, files = timm_files("test_resnet")
    commit = hub.add("org/plain", files)
    folder = flashtask.load("hf://org/plain").save_pretrained(tmp_path / "model")
    assert f"began from `org/plain` on the hub, commit `{commit}`" in (folder / "README.md").read_text()
    front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert front["base_model"] == "org/plain"
    hub.tokens["hf_right"] = "*"
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    made = upload_folder(folder, HubAddress("tester/again"))
    torch.testing.assert_close(outputs(flashtask.load(f"hf://tester/again@{made.commit}")), outputs(model))


# ---- runs that begin from the hub


@pytest.fixture
def colours(tmp_path):
    return colour_folders(tmp_path / "colours", each=6)


def data_of(colours):
    return ImageClassificationData.from_folders(colours, val_split=4, batch_size=4, num_workers=0)


def rows(folder):
    lines = (folder / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    wanted = [names.index(name) for name in ("epoch", "train_loss", "val_loss", "val_accuracy")]
    return [[line.split(",")[index] for index in wanted] for line in lines[1:]]


OPTIONS = ["--epochs", "1", "--strategy", "no_freeze", "--lr", "0.01", "--batch-size", "4", "--num-workers", "0"]
OPTIONS += ["--seed", "4", "--quiet"]


@pytest.mark.long
def test_a_checkpoint_that_is_trained_from_the_hub_names_repository_and_commit(hub, tmp_path, colours):
    _, folder = task_folder(tmp_path / "model")
    commit = hub.add("org/name", files_of(folder))
    task = ImageClassifier.from_pretrained("org/name", learning_rate=0.01)
    trainer = Trainer(max_epochs=1, output_dir=tmp_path / "run", enable_progress_bar=False)
    trainer.finetune(task, data_of(colours), strategy="no_freeze")
    content = read_checkpoint(tmp_path / "run" / "best.ckpt")
    assert content["pretrained_from"] == {"repository": "org/name", "commit": commit}
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["model"]["from"] == f"hf://org/name@{commit}"
    assert "from_sha256" not in recipe["model"]


@pytest.mark.long
def test_finetune_from_the_hub_pins_the_commit_and_its_recipe_runs_the_same(hub, tmp_path, colours):
    _, folder = task_folder(tmp_path / "model")
    commit = hub.add("org/name", files_of(folder))
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(["finetune", str(colours), "--from", "hf://org/name", *OPTIONS, "--output-dir", str(first)]) == 0
    _, other = task_folder(tmp_path / "other", labels=("a", "b", "c"))
    hub.commit("org/name", files_of(other), "main")  # the branch moves on
    assert run(["finetune", str(first / "recipe.yaml"), "--output-dir", str(second), "--quiet"]) == 0
    assert rows(second) == rows(first)
    for run_folder in (first, second):
        content = read_checkpoint(run_folder / "last.ckpt")
        assert content["pretrained_from"] == {"repository": "org/name", "commit": commit}
    # The trained head was kept: a fresh one gives other losses.
    fresh = tmp_path / "fresh"
    recipe = yaml.safe_load((first / "recipe.yaml").read_text())
    recipe["model"]["head"] = "linear"
    (tmp_path / "fresh.yaml").write_text(yaml.safe_dump(recipe))
    assert run(["finetune", str(tmp_path / "fresh.yaml"), "--output-dir", str(fresh), "--quiet"]) == 0
    assert rows(fresh) != rows(first)


@pytest.mark.long
def test_a_run_from_the_hub_is_resumed_with_the_branch_that_was_asked_for(hub, tmp_path, colours, capsys):
    _, folder = task_folder(tmp_path / "model")
    hub.add("org/name", files_of(folder))
    place = str(tmp_path / "run")
    whole, options = str(tmp_path / "whole"), OPTIONS[2:]
    asked = ["finetune", str(colours), "--from", "hf://org/name@main", *options]
    assert run([*asked, "--epochs", "2", "--output-dir", whole]) == 0
    assert run([*asked, "--epochs", "1", "--output-dir", place]) == 0
    assert run([*asked, "--epochs", "2", "--output-dir", place, "--resume"]) == 0
    assert rows(tmp_path / "run")[-1][0] == rows(tmp_path / "whole")[-1][0]
    capsys.readouterr()
    hub.add("org/other", files_of(folder))
    other = ["finetune", str(colours), "--from", "hf://org/other", *options, "--epochs", "3"]
    assert run([*other, "--output-dir", place, "--resume"]) == 2
    assert "model.from" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_on_other_classes_keeps_the_rows_of_those_that_remain(hub, tmp_path):
    task, folder = task_folder(tmp_path / "model")
    hub.add("org/name", files_of(folder))
    colours = colour_folders(tmp_path / "three", each=6, classes=("blue", "green", "red"))
    place = tmp_path / "run"
    options = [*OPTIONS, "--lr", "1e-12", "--backbone-lr", "1e-12", "--output-dir", str(place)]
    assert run(["finetune", str(colours), "--from", "hf://org/name", *options]) == 0
    found = flashtask.load(place / "last.ckpt")
    assert found.labels == ("blue", "green", "red")
    torch.testing.assert_close(found.head[0].weight[[0, 2]], task.head[0].weight, rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_finetune_from_a_folder_or_a_checkpoint_pins_what_is_in_it(kind, tmp_path, colours, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    task, _ = task_folder(tmp_path / "model")
    source = "model"
    if kind == "file":
        trainer = Trainer(max_steps=1, output_dir="before", enable_progress_bar=False)
        trainer.finetune(task, data_of(colours), strategy="no_freeze")
        source = "before/best.ckpt"
    assert run(["finetune", str(colours), "--from", source, *OPTIONS, "--output-dir", "one"]) == 0
    recipe = yaml.safe_load((tmp_path / "one" / "recipe.yaml").read_text())
    assert recipe["model"]["from"] == str(tmp_path / source)
    assert len(recipe["model"]["from_sha256"]) == 64
    assert run(["finetune", "one/recipe.yaml", "--quiet", "--output-dir", "two"]) == 0
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
    capsys.readouterr()
    changed = tmp_path / source
    if kind == "folder":
        task_folder(tmp_path / "model", labels=("red", "blue", "green"))
    else:
        changed.write_bytes((tmp_path / "one" / "best.ckpt").read_bytes())
    assert run(["finetune", "one/recipe.yaml", "--quiet", "--output-dir", "three"]) == 76
    assert "not the file that the recipe started from" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()


def test_from_is_checked_before_anything_is_loaded(tmp_path, colours, capsys):
    for extra, code, message in (
        (["--from", "hf://org"], 2, "not the name of a hub repository"),
        (["--from", str(tmp_path / "nothing.ckpt")], 66, "nothing.ckpt"),
        (["--from", str(colours), "--backbone", "resnet18"], 2, "--backbone: backbone is part of the model"),
        (["--set", "model.from_sha256=abc"], 2, "from_sha256 is set, but from is not"),
    ):
        assert run(["finetune", str(colours), *extra, "--output-dir", str(tmp_path / "run")]) == code
        assert message in capsys.readouterr().err


@pytest.mark.long
def test_predict_takes_an_address_and_a_folder(hub, tmp_path, colours, capsys):
    _, folder = task_folder(tmp_path / "model")
    hub.add("org/name", files_of(folder))
    image = str(next(colours.rglob("*.png")))
    assert run(["predict", str(folder), image, "--format", "csv"]) == 0
    from_folder = capsys.readouterr().out
    assert run(["predict", "hf://org/name", image, "--format", "csv"]) == 0
    assert capsys.readouterr().out == from_folder != ""
    measured = []
    for source in (str(folder), "hf://org/name"):
        assert run(["validate", source, str(colours), "--json", "--num-workers", "0"]) == 0
        measured.append(capsys.readouterr().out)
    assert measured[0] == measured[1]
    assert "val_accuracy" in measured[0]
