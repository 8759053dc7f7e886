"""Predict images with an exported model: needs onnxruntime, numpy and Pillow, and nothing else.

    python NAME.py IMAGE... [--model NAME.onnx] [--masks FOLDER]

Prints a JSON object for each image. What the model takes and what its outputs mean is in its metadata.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

__all__ = ["Model"]


class Model:
    """A model with what its metadata says.

    Args:
        path: of the .onnx file.
    """

    def __init__(self, path: str | Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        facts = self.session.get_modelmeta().custom_metadata_map
        self.facts = {name: _value(text) for name, text in facts.items()}
        self.wanted = self.facts["preprocessing"]
        self.labels = self.facts.get("labels", [])

    def predict(self, path: str | Path) -> tuple[dict[str, Any], np.ndarray[Any, Any] | None]:
        """What the model says about an image file, and for segmentation the class (height, width) of each pixel."""
        image, (width, height) = self.decoded(path)
        found = self.outputs(image)
        said: dict[str, Any] = {"path": str(path)}
        if "classes" in found:
            mask = found["classes"][0]
            counts = np.bincount(mask.ravel(), minlength=len(self.labels))
            return {**said, "shares": dict(zip(self.labels, (counts / mask.size).tolist(), strict=True))}, mask
        if "boxes" in found:
            scale = np.array([width / image.width, height / image.height] * 2)
            return {**said, "boxes": self._boxes(found, scale)}, None
        if "values" in found:
            return {**said, **dict(zip(self.facts["names"], found["values"][0].tolist(), strict=True))}, None
        if "scores" not in found:
            return {**said, **{name: values[0].tolist() for name, values in found.items()}}, None
        scores = found["scores"][0]
        if thresholds := self.facts.get("thresholds"):
            chosen = [
                name for name, score, least in zip(self.labels, scores, thresholds, strict=True) if score >= least
            ]
            said["labels"] = chosen
        else:
            said |= {"label": self.labels[int(scores.argmax())], "score": float(scores.max())}
        by_label = dict(zip(self.labels, scores.tolist(), strict=True))
        if points := self.facts.get("operating"):
            said["decision"] = _decision(points, by_label, said.get("labels", [said.get("label")]))
        return {**said, "scores": by_label}, None

    def outputs(self, image: Image.Image) -> dict[str, np.ndarray[Any, Any]]:
        """What the model gives for a decoded picture, by name, each with a first axis of length 1."""
        if self.facts["input"] == "normalised":
            images = self._normalised(image)[None]
        else:
            pixels = np.asarray(image)
            images = (pixels if pixels.ndim == 3 else pixels[..., None])[None]
        names = [one.name for one in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, {"images": images}), strict=True))

    def _boxes(self, found: dict[str, np.ndarray[Any, Any]], scale: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
        kept = []
        for box, score, label in zip(found["boxes"][0], found["scores"][0], found["labels"][0], strict=True):
            if label >= 0 and score >= self.facts["thresholds"][label]:
                kept.append({"label": self.labels[label], "score": float(score), "box": (box * scale).tolist()})
        return kept

    # ---- pictures

    def decoded(self, path: str | Path) -> tuple[Image.Image, tuple[int, int]]:
        """The upright picture in mode RGB, or L for one channel, and the (width, height) of the whole file."""
        image = Image.open(path)
        width, height = image.size
        lies = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        whole = (height, width) if lies else (width, height)
        if self.wanted["decode"] == "scaled" and self.facts["task"] != "semantic_segmentation":
            across, down = (2 * side for side in self._resized(*whole))  # of JPEG files much larger than needed
            image.draft(None, (down, across) if lies else (across, down))
        image.load()
        upright = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            upright = Image.fromarray(self._bytes(np.asarray(upright), image.mode))
        elif upright.has_transparency_data:
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright.convert("RGBA"))
        elif upright.mode == "CMYK":
            upright = upright.convert("RGB")
        return upright.convert("RGB" if self.wanted["input_size"][0] == 3 else "L"), whole

    def _bytes(self, values: np.ndarray[Any, Any], mode: str) -> np.ndarray[Any, Any]:
        """Bytes of values with more than 8 bits, by the model's range."""
        known = self.wanted.get("value_range")
        if known is None:
            raise SystemExit("the picture has more than 8 bits a channel, for which this model has no range of values")
        low, high = ((0.0, 1.0) if mode == "F" else (0.0, 65535.0)) if known == "format" else known
        scaled: np.ndarray[Any, Any] = np.rint((np.clip(values, low, high) - low) * (255 / (high - low)))
        return scaled.astype(np.uint8)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after the resize that comes before the crop or the padding."""
        down, across = (math.floor(side / self.wanted["crop_pct"]) for side in self.wanted["input_size"][1:])
        if self.wanted["crop_mode"] == "squash":
            return across, down
        if self.wanted["crop_mode"] == "center" and down == across:
            return (down, down * height // width) if width <= height else (down * width // height, down)
        ratios = (height / down, width / across)
        ratio = max(ratios) if self.wanted["crop_mode"] == "border" else min(ratios)
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def _normalised(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """The input (channels, height, width) of a model without preprocessing."""
        channels, height, width = self.wanted["input_size"]
        mean, std = (np.array(self.wanted[name], dtype=np.float32)[:, None, None] for name in ("mean", "std"))
        image = image.resize(self._resized(*image.size), Image.Resampling[self.wanted["interpolation"].upper()])
        if self.wanted["crop_mode"] == "border":
            size = (max(width, image.width), max(height, image.height))
            fill = tuple(round(255 * value) for value in self.wanted["mean"])
            padded = Image.new(image.mode, size, fill if channels > 1 else fill[0])
            padded.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
            image = padded
        left, top = (_start(side, wanted) for side, wanted in zip(image.size, (width, height), strict=True))
        pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32)
        values = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
        return (values / np.float32(255) - mean) / std


def _decision(points: dict[str, Any], scores: dict[str, float], said: list[str]) -> str:
    """Whether a prediction is accepted: the thresholds agree with it, and its score is high enough."""
    agrees = all((scores[label] >= bound) == (label in said) for label, bound in points["thresholds"].items())
    least = points["abstain_below"]
    return "accepted" if agrees and (least is None or max(scores.values()) >= least) else "unknown"


def _start(side: int, wanted: int) -> int:
    return round((side - wanted) / 2) if side >= wanted else -((wanted - side) // 2)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> None:
    """Read the command line, and print a line for each image."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--model", default=str(Path(__file__).with_suffix(".onnx")), help="the .onnx file")
    parser.add_argument("--masks", help="a folder for masks: PNG files with the numbers of classes")
    given = parser.parse_args()
    model = Model(given.model)
    for path in given.images:
        said, mask = model.predict(path)
        json.dump(said, sys.stdout, ensure_ascii=False)
        sys.stdout.write("\n")
        if mask is not None and given.masks:
            Path(given.masks).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(Path(given.masks, f"{Path(path).stem}.png"))


if __name__ == "__main__":
    main()
