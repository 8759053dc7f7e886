"""From a folder of images to a file that anyone can load: `python examples/three_lines.py DATA [BACKBONE]`.

DATA holds `train/` and `val/`, each with one folder per class.
"""

from __future__ import annotations

import sys

from flashtask import ImageClassificationData, ImageClassifier, Trainer


def main(folder: str, backbone: str = "efficientnet_lite0", epochs: int = 10, **options: object) -> None:
    """Fine-tune a head on a frozen backbone, and save the best epoch."""
    data = ImageClassificationData.from_folders(train_folder=f"{folder}/train", val_folder=f"{folder}/val")
    model = ImageClassifier(backbone=backbone, **options)
    trainer = Trainer(max_epochs=epochs)
    trainer.finetune(model, datamodule=data, strategy="freeze")
    trainer.save_checkpoint("classifier.ckpt")


if __name__ == "__main__":
    main(*sys.argv[1:])
