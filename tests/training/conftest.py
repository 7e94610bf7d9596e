import json
from io import BytesIO

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from data_files import tar_bytes
from PIL import Image
from tiny_models import make_photo
from training_runs import TAGS


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """14 images with captions and tags, one of them broken."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images").mkdir()
    rows = []
    for index in range(14):
        name, one, other = f"images/{index}.png", TAGS[index % 5], TAGS[(index + 1) % 5]
        make_photo(48, 40, seed=index).save(folder / name)
        caption = f"a {one} beside a {other}"
        rows.append({"file_name": name, "tags": [one, TAGS[(index + 2) % 5]], "caption": caption})
    (folder / "images" / "3.png").write_bytes(b"no image")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def mixed_sources(photo_folder, tmp_path_factory):
    """The photo folder, and three shards of five images."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        files = {}
        for number in range(5 * shard, 5 * shard + 5):
            make_photo(44, 36, seed=100 + number).save(image := BytesIO(), "JPEG")
            files[f"{number:04d}.jpg"] = image.getvalue()
            files[f"{number:04d}.txt"] = f"a {TAGS[number % 5]} number {number}".encode()
        (folder / f"part-{shard}.tar").write_bytes(tar_bytes(files))
    return [{"path": str(photo_folder), "weight": 2}, {"path": f"{folder}/part-{{0..2}}.tar"}]


@pytest.fixture(scope="session")
def mask_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for index in range(5):
        make_photo(48, 40, seed=50 + index).save(folder / "images" / f"{index}.png")
        mask = np.zeros((40, 48), np.uint8)
        mask[:, 10 * index :] = 1 + index % 4
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    (folder / "labels.json").write_text(json.dumps({"labels": TAGS}))
    return folder
