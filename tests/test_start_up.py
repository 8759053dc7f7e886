"""What is imported when: a name of flashtask costs little more than torch, a prediction no more than it needs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from small import colour_folders

HEAVY = {
    *("torchvision", "timm", "torchmetrics", "scipy", "sympy", "pandas", "matplotlib", "huggingface_hub", "pydantic"),
    *("rich", "networkx", "tensorboard", "wandb", "mlflow", "skimage", "IPython"),
}


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a new process holds after some code."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.long
def test_a_metric_is_known_as_one_also_when_it_came_later():
    code = (
        "from flashtask.core.metrics import is_metric\n"
        "assert not is_metric(3)\n"
        "from torchmetrics import MeanMetric\n"
        "assert is_metric(MeanMetric()) and not is_metric(MeanMetric)\n"
    )
    assert "torchmetrics" in loaded_by(code)


def test_the_public_classes_load_nothing_heavy_but_torch_and_a_run_needs_no_torchmetrics(tmp_path):
    folder = colour_folders(tmp_path / "images", each=4)
    code = (
        "import sys\n"
        "from flashtask import ImageClassificationData, ImageClassifier, ImageEmbedder, Task, Trainer, load\n"
        "import flashtask.tasks.prediction\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        f"assert 'torch' in loaded and not loaded & {HEAVY!r}\n"
        "Trainer()\n"
        "assert 'torch.distributed.fsdp' not in sys.modules\n"
        "from PIL import Image\n"
        "model = ImageClassifier('timm/test_resnet', labels=('blue', 'red'), pretrained=False)\n"
        "assert model.predict(Image.new('RGB', (64, 64))).label in ('blue', 'red')\n"
        "assert not {'pandas', 'rich'} & set(sys.modules)\n"
        f"data = ImageClassificationData.from_folders({str(folder)!r}, val_split=0.5, num_workers=0)\n"
        "model = ImageClassifier('timm/test_resnet', pretrained=False)\n"
        f"trainer = Trainer(max_epochs=1, output_dir={str(tmp_path / 'run')!r})\n"
        "trainer.finetune(model, datamodule=data, strategy='freeze')\n"
        "assert 'val_accuracy' in trainer.fit_run.history[0]\n"
    )
    assert loaded_by(code) & {"torchmetrics", "scipy", "matplotlib"} == set()
