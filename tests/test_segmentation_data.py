"""What is read as a mask: numbers, palettes, colours, black and white, arrays, tables, COCO; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_semantic_segmentation import squares
from torchvision.tv_tensors import Mask

from flashtask import SemanticSegmentationData
from flashtask.cli import run
from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.data.masks import rle_counts, rle_mask
from flashtask.data.semantic_segmentation import IGNORED, MaskReader
from flashtask.data.transforms import eval_transform, train_transform


def pairs(folder: Path, masks: list[Image.Image], kind: str = "png") -> Path:
    """Images with these masks."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number, mask in enumerate(masks):
        noise = np.random.default_rng(number).integers(0, 255, (*mask.size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{number}.png")
        mask.save(folder / "masks" / f"{number}.{kind}")
    return folder


def halves(left: object, right: object) -> Image.Image:
    values = np.zeros((8, 10, *np.shape(left)), np.uint8)
    values[:, :5], values[:, 5:] = left, right
    return Image.fromarray(values)


def reader_of(folder: Path, **options) -> MaskReader:
    return MaskReader.from_dict(SemanticSegmentationData.from_folders(folder, **options).targets)


def first_mask(data: SemanticSegmentationData) -> np.ndarray:
    data.preprocessing = Preprocessing(input_size=(8, 10), crop_pct=1.0, crop_mode="border")
    data.setup("fit")
    _, target = next(iter(data.train_dataloader()))
    return target["mask"].numpy()


def test_numbers_black_and_white_palettes_and_colours_are_understood(tmp_path):
    numbers = reader_of(pairs(tmp_path / "numbers", [halves(0, 3), halves(3, 255)]))
    assert (numbers.labels, numbers.values, numbers.ignored) == (("0", "3"), (0, 3), 255)
    white = reader_of(pairs(tmp_path / "white", [halves(0, 255)]), labels=["back", "cell"])
    assert (white.labels, white.values, white.ignored) == (("back", "cell"), (0, 255), None)
    coloured = halves(0, 1).convert("P")
    coloured.putpalette([0, 0, 0, 255, 0, 16])
    assert reader_of(pairs(tmp_path / "palette", [coloured])).colours == ("#000000", "#ff0010")
    colours = reader_of(pairs(tmp_path / "colours", [halves((0, 0, 0), (128, 0, 0)), halves((0, 0, 0), (0, 0, 0))]))
    assert (colours.labels, colours.is_colour) == (("#000000", "#800000"), True)
    assert colours.class_map(str(tmp_path / "colours" / "masks" / "0.png"))[0].tolist() == [0] * 5 + [1] * 5
    assert colours.class_map(str(tmp_path / "colours" / "masks" / "1.png")).max() == 0
    assert "2 classes of pixels, from masks: back (0), cell (255)" in white.describe()


def test_masks_of_numbers_become_positions_of_classes(tmp_path):
    data = SemanticSegmentationData.from_folders(
        pairs(tmp_path / "a", [halves(7, 255)] * 2 + [halves(2, 7)]), augment="none"
    )
    assert sorted(map(tuple, first_mask(data)[:, 0].tolist())) == [
        (0,) * 5 + (1,) * 5,
        (1,) * 5 + (IGNORED,) * 5,
        (1,) * 5 + (IGNORED,) * 5,
    ]


def test_everything_that_is_wrong_is_named_at_once(tmp_path, capsys):
    folder = squares(tmp_path / "data", 6)
    (folder / "masks" / "0.png").unlink()
    Image.new("L", (5, 5)).save(folder / "masks" / "1.png")
    with Image.open(folder / "masks" / "2.png") as mask:
        values = np.array(mask)
    values[0, 0] = 9
    Image.fromarray(values).save(folder / "masks" / "2.png")
    (folder / "masks" / "3.png").write_bytes(b"no image")
    words = ["--task", "semantic_segmentation", "--output-dir", str(tmp_path / "run"), "--no-pretrained"]
    assert run(["finetune", str(folder), *words]) == 65
    said = capsys.readouterr().err
    for part in ("image without a mask", "mask of another size", "bad mask", "'0.png'", "5 x 5", "3.png"):
        assert part.strip("'") in said
    Image.open(folder / "masks" / "4.png").save(folder / "masks" / "0.png")
    with pytest.raises(BadDataError, match="mask with an unknown value") as caught:
        SemanticSegmentationData.from_folders(folder)
    assert "its mask has 9" in caught.value.why


def test_masks_of_objects_and_photographs_are_refused(tmp_path):
    many = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20))
    with pytest.raises(BadDataError, match="bad mask") as caught:
        SemanticSegmentationData.from_folders(pairs(tmp_path / "many", [many]))
    assert "400 different values" in caught.value.why
    with pytest.raises(BadDataError, match="bad mask") as caught:
        SemanticSegmentationData.from_folders(pairs(tmp_path / "jpeg", [halves(0, 1)], "jpg"))
    assert "JPEG" in caught.value.why


def test_new_masks_are_read_as_those_of_the_model(tmp_path):
    trained = SemanticSegmentationData.from_folders(pairs(tmp_path / "a", [halves(0, 4)])).targets
    other = SemanticSegmentationData.from_folders(val_folder=pairs(tmp_path / "b", [halves(0, 5), halves(0, 4)]))
    with pytest.raises(BadDataError, match="mask with an unknown value: 1"):
        other.use_targets(trained)


def test_parts_may_be_folders_inside_images_and_masks(tmp_path):
    for part in ("train", "val"):
        made = pairs(tmp_path / part, [halves(0, 1)] * 3)
        for kind in ("images", "masks"):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            (made / kind).rename(tmp_path / "data" / kind / part)
    data = SemanticSegmentationData.from_folders(tmp_path / "data", val_split=0.2)
    assert data.sizes() == {"train": 3, "val": 3}
    assert data.recipe()["from_folders"]["train_target_folder"] == str(tmp_path / "data" / "masks" / "train")


def by_csv(files, masks, images, **options):
    table = files[0].parents[1] / "pairs.csv"
    table.write_text("image,mask\nimages/0.png,masks/0.png\nimages/1.png,masks/1.png\n")
    return SemanticSegmentationData.from_csv("image", "mask", table, **options)


def arrays_of(files):
    found = []
    for file in files:
        with Image.open(file) as image:
            found.append(np.array(image))
    return found


def pictures_of(files):
    return list(map(Image.fromarray, arrays_of(files)))


def tensors_of(files):
    return [torch.from_numpy(array).movedim(-1, 0) for array in arrays_of(files)]


#: Constructor -> data of two images with masks: their files, and the files of the masks.
CONSTRUCTORS = {
    "from_csv": by_csv,
    "from_data_frame": lambda files, masks, images, **options: SemanticSegmentationData.from_data_frame(
        "image", "mask", {"image": list(map(str, files)), "mask": list(map(str, masks))}, **options
    ),
    "from_files": lambda files, masks, images, **options: SemanticSegmentationData.from_files(files, masks, **options),
    "from_files, arrays": lambda files, masks, images, **options: SemanticSegmentationData.from_files(
        files, arrays_of(masks), **options
    ),
    "from_numpy": lambda files, masks, images, **options: SemanticSegmentationData.from_numpy(
        arrays_of(files), np.stack(arrays_of(masks)), **options
    ),
    "from_tensors": lambda files, masks, images, **options: SemanticSegmentationData.from_tensors(
        tensors_of(files), torch.from_numpy(np.stack(arrays_of(masks))), **options
    ),
    "from_images": lambda files, masks, images, **options: SemanticSegmentationData.from_images(
        images, pictures_of(masks), **options
    ),
    "from_datasets": lambda files, masks, images, **options: SemanticSegmentationData.from_datasets(
        list(zip(images, arrays_of(masks), strict=True)), **options
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_constructor_gives_the_same_masks(tmp_path, name):
    folder = pairs(tmp_path / "data", [halves(0, 1), halves(1, 0)])
    options = {"augment": "none", "batch_size": 2}
    expected = first_mask(SemanticSegmentationData.from_folders(folder, **options))
    files, masks = ([folder / kind / f"{number}.png" for number in range(2)] for kind in ("images", "masks"))
    made = CONSTRUCTORS[name](files, masks, pictures_of(files), labels=["no", "yes"], **options)
    assert (first_mask(made) == expected).all()
    assert made.targets["labels"] == ["no", "yes"]


def test_what_is_no_mask_is_refused():
    with pytest.raises(UsageError, match="array"):
        SemanticSegmentationData.from_numpy([np.zeros((8, 8, 3), np.uint8)] * 2, [1.5, "no"])


def test_run_lengths_are_those_of_coco():
    coco = pytest.importorskip("pycocotools.mask")
    draws = np.random.default_rng(0)
    for shape, share in (((7, 5), 0.5), ((40, 60), 0.1), ((3, 3), 0.0), ((3, 3), 1.1), ((200, 300), 0.9)):
        region = draws.random(shape) < share
        expected = coco.encode(np.asfortranarray(region.astype(np.uint8)))["counts"].decode()
        assert rle_counts(region) == expected
        assert (rle_mask(expected, shape[::-1]) == region).all()


def test_coco_files_are_read(tmp_path):
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    circle = np.stack([30 + 20 * np.cos(angles), 25 + 20 * np.sin(angles)], axis=1).ravel().tolist()
    (tmp_path / "images").mkdir()
    Image.new("RGB", (60, 50)).save(tmp_path / "images" / "1.png")
    region = np.zeros((50, 60), bool)
    region[20:30, 25:35] = True
    annotations = [
        {
            "image_id": 1,
            "category_id": 9,
            "area": 100,
            "segmentation": {"size": [50, 60], "counts": rle_counts(region)},
        },
        {"image_id": 1, "category_id": 4, "area": 1257, "segmentation": [circle]},
    ]
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 60, "height": 50}],
        "annotations": annotations,
        "categories": [{"id": 9, "name": "nucleus"}, {"id": 4, "name": "cell"}],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    data = SemanticSegmentationData.from_coco(tmp_path / "images", tmp_path / "all.json")
    assert data.targets["labels"] == ["background", "cell", "nucleus"]
    found = MaskReader.from_dict(data.targets).class_map(str(data._table.targets[0]))
    assert (found == 2).sum() == 100
    assert (found[region] == 2).all()
    rows, columns = np.mgrid[:50, :60] + 0.5
    circular = (columns - 30) ** 2 + (rows - 25) ** 2 < 400
    assert ((found > 0) & circular).sum() / ((found > 0) | circular).sum() > 0.97
    annotations[0]["category_id"], annotations[1]["image_id"] = 5, 7
    (tmp_path / "all.json").write_text(json.dumps(content))
    with pytest.raises(BadDataError, match=r"unknown (category|image)"):
        SemanticSegmentationData.from_coco(tmp_path / "images", tmp_path / "all.json")


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (100, 30)])
def test_padding_and_flips_move_masks_with_images_to_the_pixel(shape):
    """The red of a pixel is its class."""
    values = np.kron(np.random.default_rng(0).integers(0, 5, [side // 10 for side in shape]), np.ones((10, 10), int))
    values = values[: shape[0], : shape[1]].astype(np.uint8)
    image = Image.fromarray(np.repeat(40 * values[..., None], 3, axis=2))
    same = max(values.shape)
    plain = Preprocessing((same, same), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0, crop_mode="border")
    pixels, mask = eval_transform(plain).joint(image, Mask(torch.from_numpy(values)), IGNORED)
    seen = (pixels[0] * 255 / 40).round().long()
    is_inside = mask != IGNORED
    assert int(is_inside.sum()) == values.size
    assert (seen[is_inside] == mask[is_inside]).all()
    changed = train_transform(plain, [{"RandomHorizontalFlip": {"p": 1.0}}, {"RandomVerticalFlip": {"p": 1.0}}]).trained
    pixels, moved = changed.joint(image, Mask(torch.from_numpy(values)), IGNORED)
    assert (moved == mask.flip(0, 1)).all() or values.shape[0] % 2 or values.shape[1] % 2
    is_inside = moved != IGNORED
    assert ((pixels[0] * 255 / 40).round().long()[is_inside] == moved[is_inside]).all()


def test_show_batch_draws_the_classes(tmp_path):
    data = SemanticSegmentationData.from_root(squares(tmp_path / "data", 6), val_split=2)
    shown = data.show_batch(num_samples=2, output=tmp_path / "batch.png")
    assert (tmp_path / "batch.png").is_file()
    assert any("red" in line for lines in shown.lines for line in lines)
    assert "ground" in repr(data)


def test_problems_of_every_table_are_in_one_error(tmp_path):
    for name in ("train", "val"):
        (tmp_path / f"{name}.csv").write_text(f"image,mask\n{name}.png,{name}_mask.png\n")
    with pytest.raises(BadDataError) as caught:
        SemanticSegmentationData.from_csv("image", "mask", tmp_path / "train.csv", tmp_path / "val.csv")
    for name in ("train.csv, line 2", "val.csv, line 2"):
        assert name in str(caught.value)
