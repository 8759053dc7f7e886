"""`flashtask push` and `flashtask pull` against a hub on the loopback, by the real client."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import hub_server
import numpy as np
import pytest
import timm
import torch
import yaml
from hub_server import HubServer
from small import colour_folders

import flashtask
from flashtask import ImageClassifier
from flashtask.cli import run

# The client's own way to send a file, as its own HTTP library sees it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that knows one token, which this process has."""
    with HubServer() as server:
        server.tokens["hf_right"] = "*"
        hub_server.use(monkeypatch, server, tmp_path / "home")
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        yield server


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of one epoch."""
    root = tmp_path_factory.mktemp("push")
    colours = colour_folders(root / "colours", each=4)
    options = "--backbone test_resnet --no-pretrained --strategy no_freeze --epochs 1 --batch-size 4 --num-workers 0"
    place = root / "run"
    assert run(["finetune", str(colours), *options.split(), "--quiet", "--output-dir", str(place)]) == 0
    return place


def pushed(hub, name, branch="main"):
    repository = hub.repositories[name]
    return repository.commits[repository.branches[branch]]


def weights_of(task):
    return torch.cat([value.flatten().float() for value in task.state_dict().values()])


# ---- push


@pytest.mark.long
@pytest.mark.parametrize("what", ["run", "checkpoint", "folder"])
def test_push_makes_a_repository_that_flashtask_and_timm_can_read(what, hub, trained, tmp_path, capsys):
    model = {"run": trained, "checkpoint": trained / "best.ckpt", "folder": tmp_path / "model"}[what]
    task = flashtask.load(trained / "best.ckpt")
    if what == "folder":
        task.save_pretrained(model)
    assert run(["push", str(model), "tester/colours", "--message", "first"]) == 0
    out = capsys.readouterr().out
    commit = hub.repositories["tester/colours"].branches["main"]
    assert f"commit: {commit}" in out
    assert f"{hub.url}/tester/colours/tree/{commit}" in out
    assert set(FILES) <= set(pushed(hub, "tester/colours"))
    found = flashtask.load(f"hf://tester/colours@{commit}")
    assert torch.equal(weights_of(found), weights_of(task))
    plain = timm.create_model("hf-hub:tester/colours", pretrained=True)
    assert plain.num_classes == 2
    card = pushed(hub, "tester/colours")["README.md"].decode()
    assert 'ImageClassifier.from_pretrained("tester/colours")' in card
    assert "| val_accuracy |" in card


@pytest.mark.long
def test_push_to_a_branch_of_a_private_repository(hub, trained, capsys):
    command = ["push", str(trained), "tester/secret", "--private", "--revision", "trial", "--licence", "mit"]
    assert run(command) == 0
    assert hub.repositories["tester/secret"].private
    assert set(FILES) <= set(pushed(hub, "tester/secret", "trial"))
    assert "model.safetensors" not in pushed(hub, "tester/secret")
    front = yaml.safe_load(pushed(hub, "tester/secret", "trial")["README.md"].decode().split("---\n")[1])
    assert front["license"] == "mit"
    assert run(command) == 0  # what is there already is no error


def test_a_private_push_never_goes_to_a_repository_that_everybody_sees(hub, trained, capsys):
    commit = hub.add("tester/public", {"README.md": b"# hello"})
    assert run(["push", str(trained), "tester/public", "--private"]) == 69
    assert "tester/public is public" in capsys.readouterr().err
    assert hub.repositories["tester/public"].branches == {"main": commit}


@pytest.mark.long
def test_push_replaces_what_was_there(hub, trained, tmp_path):
    assert run(["push", str(trained), "tester/colours"]) == 0
    other = ImageClassifier("test_resnet", labels=["a", "b", "c"], pretrained=False)
    other.save_pretrained(tmp_path / "other")
    assert run(["push", str(tmp_path / "other"), "tester/colours"]) == 0
    assert flashtask.load("hf://tester/colours").labels == ("a", "b", "c")
    assert len(hub.repositories["tester/colours"].commits) == 3  # an empty one, and two with a model


@pytest.mark.long
def test_push_with_an_onnx_file_that_gives_the_scores_of_the_model(hub, trained, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    assert run(["push", str(trained), "tester/both", "--onnx"]) == 0
    files = pushed(hub, "tester/both")
    assert {*FILES, "model.onnx"} == set(files) - {".gitattributes"}
    pixels = np.random.default_rng(0).integers(0, 255, (70, 50, 3), dtype=np.uint8)
    found = runtime.InferenceSession(files["model.onnx"]).run(["scores"], {"images": pixels[None]})[0][0]
    task = flashtask.load("hf://tester/both")
    assert found == pytest.approx([task.predict(pixels).probabilities[label] for label in task.labels], abs=1e-5)
    assert "`model.onnx` is the whole model" in files["README.md"].decode()
    task.save_pretrained(tmp_path / "model", onnx=True)
    assert run(["push", str(tmp_path / "model"), "tester/both", "--onnx"]) == 0
    task.save_pretrained(tmp_path / "model")
    assert run(["push", str(tmp_path / "model"), "tester/both", "--onnx"]) == 2


@pytest.mark.long
def test_a_space_is_an_app_that_needs_no_flashtask(hub, trained, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    command = ["push", str(trained), "tester/colours", "--space", "--licence", "mit"]
    assert run([*command, "--message", "app"]) == 0
    commit = hub.repositories["spaces/tester/colours"].branches["main"]
    assert f"{hub.url}/spaces/tester/colours/tree/{commit}" in capsys.readouterr().out
    files = pushed(hub, "spaces/tester/colours")
    assert set(files) - {".gitattributes"} == {"README.md", "app.py", "model.onnx", "model.py", "requirements.txt"}
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert (front["sdk"], front["app_file"], front["license"]) == ("gradio", "app.py", "mit")
    assert b"flashtask" not in files["requirements.txt"]
    assert "tester/colours" not in hub.repositories

    assert run([*command, "--write", str(tmp_path / "space")]) == 0
    image = next((trained.parent / "colours" / "red").iterdir())
    said = flashtask.load(trained / "best.ckpt").predict(str(image))
    if importlib.util.find_spec("gradio") is None:  # then what the app asks of it is kept, and its function called
        (tmp_path / "gradio.py").write_text(
            "class Part:\n    def __init__(self, **given): self.__dict__.update(given)\n"
            "Interface = Image = Label = JSON = AnnotatedImage = Part\nclass Error(Exception): pass\n"
        )
    program = (
        f"import json, sys; sys.path[:0] = [{str(tmp_path / 'space')!r}, {str(tmp_path)!r}]; import app\n"
        f"print(json.dumps([app.demo.title, *app.demo.fn({str(image)!r})]))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    title, scores, whole = json.loads(done.stdout)
    assert (title, whole["label"]) == ("colours", said.label)
    assert scores == pytest.approx(said.probabilities, abs=1e-5)


def test_options_of_a_space_that_contradict_each_other_are_refused(hub, trained, capsys):
    assert run(["push", str(trained), "tester/colours", "--write", "x"]) == 2
    assert "--write is for the files of a Space" in capsys.readouterr().err
    assert run(["push", str(trained), "tester/colours", "--space", "--onnx"]) == 2
    assert hub.requests == []


def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(hub, trained, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert run(["push", str(trained), "tester/colours", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for name in FILES:
        assert name in out
    assert "nothing was pushed" in out
    assert hub.requests == []


def test_a_push_without_a_token_says_how_to_log_in(hub, trained, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert run(["push", str(trained), "tester/colours"]) == 69
    err = capsys.readouterr().err
    assert "you are not logged in" in err
    assert "hf auth login" in err
    assert hub.requests == []


@pytest.mark.long
def test_a_wrong_token_and_a_forbidden_name_are_told(hub, trained, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    assert run(["push", str(trained), "tester/colours"]) == 69
    err = capsys.readouterr().err
    assert "status 401" in err
    assert "hf auth login" in err
    assert "hf_wrong_secret" not in err
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    hub.mode = "http_403"
    assert run(["push", str(trained), "somebody/else"]) == 69
    err = capsys.readouterr().err
    assert "status 403" in err
    assert "ask somebody for write access" in err
    assert hub.repositories == {}


def test_a_push_without_a_hub_or_offline_says_that_nothing_was_committed(hub, trained, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert run(["push", str(trained), "tester/colours"]) == 69
    err = capsys.readouterr().err
    assert "127.0.0.1:9" in err
    assert "nothing was committed" in err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(["push", str(trained), "tester/colours"]) == 69
    assert "unset HF_HUB_OFFLINE" in capsys.readouterr().err


def test_push_refuses_what_is_no_model(hub, trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes((trained / "best.ckpt").read_bytes()[:-9])
    extra = flashtask.load(trained / "best.ckpt").save_pretrained(tmp_path / "extra")
    (extra / "train.py").write_text("print('mine')")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": 2}))
    for model, code, message in (
        (tmp_path / "nothing", 66, "nothing"),
        (tmp_path / "empty", 66, "there is no model in"),
        (damaged, 76, "damaged.ckpt"),
        (extra, 2, "train.py"),
        (plain, 2, "not written by flashtask"),
    ):
        assert run(["push", str(model), "tester/colours"]) == code
        assert message in capsys.readouterr().err
    assert "tester/colours" not in hub.repositories


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("colours", [], "not the name of a hub repository"),
        ("a/b/c", [], "not the name of a hub repository"),
        ("tester/colours@" + "a" * 40, [], "a commit, to which nothing can be added"),
        ("tester/colours@one", ["--revision", "two"], "two branches"),
    ],
)
def test_names_that_cannot_be_pushed_to_are_usage_errors(name, options, message, trained, capsys):
    assert run(["push", str(trained), name, *options]) == 2
    assert message in capsys.readouterr().err


def test_push_from_python_gives_the_address(hub, trained):
    address = flashtask.load(trained / "best.ckpt").push_to_hub("tester/colours", message="from Python")
    assert address == f"hf://tester/colours@{hub.repositories['tester/colours'].branches['main']}"
    assert flashtask.load(address).labels == ("blue", "red")


# ---- pull


@pytest.mark.long
def test_pull_writes_the_folder_that_was_pushed(hub, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["push", str(trained), "tester/colours"]) == 0
    commit = hub.repositories["tester/colours"].branches["main"]
    capsys.readouterr()
    assert run(["pull", "hf://tester/colours"]) == 0
    assert f"pulled: tester/colours@{commit}" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "colours").iterdir()) == FILES
    assert not any(path.is_symlink() for path in (tmp_path / "colours").iterdir())
    assert torch.equal(weights_of(flashtask.load("colours")), weights_of(flashtask.load(trained / "best.ckpt")))
    assert run(["pull", f"tester/colours@{commit}", "elsewhere"]) == 0
    assert run(["pull", "tester/colours", "elsewhere"]) == 0  # a model of ours is replaced


def test_pull_touches_no_folder_that_holds_other_things(hub, trained, tmp_path, capsys):
    assert run(["push", str(trained), "tester/colours"]) == 0
    place = tmp_path / "place"
    place.mkdir()
    (place / "thesis.tex").write_text("mine")
    before = len(hub.requests)
    assert run(["pull", "tester/colours", str(place)]) == 73
    assert "thesis.tex" in capsys.readouterr().err
    assert [path.name for path in place.iterdir()] == ["thesis.tex"]
    assert len(hub.requests) == before


def test_pull_of_what_is_not_there_or_hostile_writes_nothing(hub, trained, tmp_path, capsys):
    files = {
        "config.json": json.dumps({"architecture": "resnet18", "auto_map": {}}).encode(),
        "model.safetensors": b"x",
    }
    hub.add("tester/hostile", files)
    for name, code, message in (
        ("tester/nothing", 69, "no repository tester/nothing"),
        ("tester/hostile", 76, "auto_map"),
        ("tester/hostile@nowhere", 69, "no revision 'nowhere'"),
        ("tester", 2, "not the name of a hub repository"),
    ):
        assert run(["pull", name, str(tmp_path / "place")]) == code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "place").exists()


def test_help_and_a_wrong_name_load_neither_torch_nor_the_hubs_client():
    code = (
        "import sys\nfrom flashtask.cli import run\n"
        "assert run(['push', '--help']) == 0\nassert run(['pull', 'nothing']) == 2\n"
        "assert not {'torch', 'timm', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
