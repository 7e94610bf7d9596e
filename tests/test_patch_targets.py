"""Known names for cells of an image: the loss by hand, and from a backbone's classifier to a batch."""

import numpy as np
import pytest
import torch
from data_files import numbered_folder
from tiny_backbones import BACKBONES, tiny_backbone_model
from tiny_models import tiny_images, tiny_model, tiny_texts, without_noise
from torch.nn.functional import normalize

from pgseg_hf import default_tokenizer
from pgseg_hf.data.augmentation import AugmentationOptions
from pgseg_hf.data.records import Record
from pgseg_hf.data.sources import SourceSpec, open_source
from pgseg_hf.training.batches.collator import PGSegCollator
from pgseg_hf.training.batches.feature_cache import CacheOptions, cache_features
from pgseg_hf.training.batches.mixing import Draw, seeded
from pgseg_hf.training.batches.patch_names import LEAST_SHARE, CellNamer
from pgseg_hf.training.batches.preparation import Example, Preparation
from pgseg_hf.training.gradient_cache import GradientCache

PATCHES = {"contrastive_pooling": "patches", "contrastive_loss": "sigmoid"}
CLASSES = ["dog", "cat", "dog", "tree", "dog"]


def batch(model, targets):
    ids = tiny_texts(4)
    own = torch.eye(4)[[0, 1, 1]].bool()
    return {
        "input_ids": ids,
        "pixel_values": tiny_images(3, 20, 16).to(model.dtype),
        "text_targets": own,
        "patch_targets": targets,
        "return_loss": True,
    }


@pytest.mark.parametrize("grid", [(1, 1), (10, 8), (3, 2)])
@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_the_named_cells(grid):
    model = without_noise(tiny_model(**PATCHES, patch_text_weight=0.7)).double().eval()
    targets = torch.rand(3, *grid, 4, generator=torch.Generator().manual_seed(0)).double()
    targets[1] = 0
    output = model(**batch(model, targets))
    patches = normalize(output.vision_model_output.patch_embeds, dim=-1).view(3, 5, 4, -1)
    texts = normalize(model.get_text_features(tiny_texts(4)).pooler_output, dim=-1)
    log_shares = (model.logit_scale.exp() * patches @ texts.T).log_softmax(-1)
    expected = 0.0
    for row, column in np.ndindex(grid):
        # The patches that overlap the cell.
        rows, columns = (
            slice(place * size // cells, -(-(place + 1) * size // cells))
            for place, size, cells in zip((row, column), (5, 4), grid)
        )
        of_cell = log_shares[:, rows, columns].mean((1, 2))
        expected -= float((targets[:, row, column] * of_cell).sum())
    total = float(targets.sum())
    assert float(output.patch_text_loss) == pytest.approx(expected / total)
    without = model(**{**batch(model, targets), "patch_targets": None})
    assert without.patch_text_loss is None
    assert float(output.loss - without.loss) == pytest.approx(0.7 * expected / total)
    assert model(**batch(model, torch.zeros(3, 2, 2, 4))).patch_text_loss == 0


@torch.no_grad()
def test_equal_texts_are_one_text():
    model = without_noise(tiny_model(**PATCHES)).double().eval()
    targets = torch.rand(3, 2, 2, 4, generator=torch.Generator().manual_seed(0)).double()
    inputs = batch(model, targets)
    expected = model(**inputs)
    inputs["input_ids"] = inputs["input_ids"][[0, 1, 2, 3, 1]]
    inputs["text_targets"] = inputs["text_targets"][:, [0, 1, 2, 3, 1]]
    inputs["patch_targets"] = torch.cat([targets, targets[..., 1:2] * 0.25], dim=-1)
    inputs["patch_targets"][..., 1] *= 0.75
    output = model(**inputs)
    torch.testing.assert_close(output.patch_text_loss, expected.patch_text_loss)
    torch.testing.assert_close(output.contrastive_loss, expected.contrastive_loss)


def test_a_model_that_names_no_patches_says_so():
    model = tiny_model(contrastive_loss="sigmoid")
    with pytest.raises(ValueError, match="patch_targets"):
        model(**batch(model, torch.zeros(3, 2, 2, 4)))


def test_a_cached_gradient_is_the_gradient():
    targets = torch.rand(3, 5, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    model = without_noise(tiny_model(npr_variant="none", **PATCHES)).double().eval()
    inputs = batch(model, targets)
    model(**inputs).loss.backward()
    expected = {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }
    model.zero_grad()
    parts = GradientCache(model, 2).backward(inputs)
    assert float(parts["patch_text"]) > 0
    for name, weight in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(weight.grad, expected[name], rtol=1e-6, atol=1e-9)


# From the classifier to the batch


def tiny_namer(channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "convolution.weight": (6, channels, 1, 1),
        "normalization.weight": (6,),
        "normalization.bias": (6,),
        "normalization.running_mean": (6,),
        "classifier.weight": (len(CLASSES), 6),
        "classifier.bias": (len(CLASSES),),
    }
    head = {name: torch.randn(size, generator=generator).half().float() for name, size in sizes.items()}
    head |= {
        "normalization.running_var": torch.ones(6),
        "normalization.num_batches_tracked": torch.tensor(1),
    }
    return CellNamer(head, CLASSES)


def test_shares_are_summed_by_name_and_a_file_brings_them_back(tmp_path):
    namer = tiny_namer(3)
    features = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    chances = namer.logits(features).softmax(-1)
    shares = namer.shares(namer.logits(features))
    assert namer.names == ["dog", "cat", "tree"]
    torch.testing.assert_close(shares[..., 0], chances[..., [0, 2, 4]].sum(-1))
    torch.testing.assert_close(shares[..., 1:], chances[..., [1, 3]])
    namer.save(tmp_path / "classifier.safetensors")
    again = CellNamer.read(tmp_path / "classifier.safetensors")
    assert again.names == namer.names
    torch.testing.assert_close(again.shares(again.logits(features)), shares)


def test_a_cell_with_a_part_shows_half_of_the_whole_where_the_image_has_it():
    namer = tiny_namer(3)
    namer.parts = {"dog": ["tree", "cat"]}
    numbers = {name: number for number, name in enumerate(namer.names)}
    names = np.array([[[numbers["tree"], numbers["dog"]], [numbers["cat"], numbers["tree"]]]])
    shares = np.array([[[0.6, 0.25], [0.1, 0.05]]], np.float16)
    assert namer.names_of_cells(names, shares, ["cat"]).keys() == {"tree"}
    found = namer.names_of_cells(names, shares, ["dog", "sea"])
    np.testing.assert_allclose(found["tree"], [[0.3, 0]], rtol=1e-3)
    np.testing.assert_allclose(found["dog"], [[0.3, 0]], rtol=1e-3)
    names[0, 1] = numbers["dog"], numbers["tree"]
    shares[0, 1] = 0.5, 0.4
    found = namer.names_of_cells(names, shares, ["dog"])
    np.testing.assert_allclose(found["tree"], [[0.3, 0.2]], rtol=1e-3)
    np.testing.assert_allclose(found["dog"], [[0.25 + 0.3, 0.5 + 0.2]], rtol=1e-3)


@pytest.mark.parametrize("content", [b"no safetensors at all", None])
def test_files_of_something_else_are_named(tmp_path, content):
    path = tmp_path / "other"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        CellNamer.read(path)


def test_cells_of_a_view_are_named_in_the_cache(tmp_path):
    source = open_source(SourceSpec(path=numbered_folder(tmp_path / "data", 3)))
    prepare = Preparation(AugmentationOptions(image_size=32))
    model = tiny_backbone_model().eval()
    backbone = model.vision_model.embeddings.patch_embeddings
    namer = tiny_namer(backbone.channels[-1])
    options = CacheOptions(str(tmp_path / "cache"), views=2, namer=namer)
    (cached,) = cache_features([source], prepare, model, options)
    maps = backbone.backbone(torch.zeros(1, 3, 32, 32)).feature_maps
    assert BACKBONES["efficientnet_lite"][1] == 8 and maps[-1].shape[-2:] == (2, 2)
    again = cache_features([source], prepare, model, options)[0]
    for index in range(3):
        for view, names in enumerate(cached[index].view_names):
            rng = seeded(Draw.VIEW, 0, 0, index, view)
            image, crop, _ = prepare.draw(source[index], rng)
            pixels = prepare.augmentation.crop_pixels(image, crop, rng)
            shares = namer.shares(namer.logits(backbone.maps(torch.from_numpy(pixels)[None])[-1]))[0]
            shares = torch.where(shares.amax(-1, keepdim=True) > LEAST_SHARE, shares, 0)
            likely = {namer.names[at] for at in shares.flatten(0, 1).amax(0).gt(LEAST_SHARE).nonzero()}
            assert names.keys() == likely and likely, "the test needs cells with a likely name"
            for name, grid in names.items():
                expected = shares[..., namer.names.index(name)]
                np.testing.assert_allclose(grid, expected, rtol=2e-3, atol=1e-3)
                np.testing.assert_array_equal(grid, again[index].view_names[view][name])
    example = prepare(cached[0], np.random.default_rng(0))
    assert set(example.patch_texts) <= {f"a photo of a {name}." for name in namer.names}
    options.namer = tiny_namer(backbone.channels[-1], seed=1)
    with pytest.raises(ValueError, match="namer"):
        cache_features([source], prepare, model, options)


def test_a_batch_has_the_texts_of_its_cells_by_their_words_in_this_batch():
    collate = PGSegCollator(
        default_tokenizer(16), 16, layout="shared", padding="longest", synonyms={"a dog": ["a hound"]}
    )
    shown = np.array([[0.5, 0], [0, 0.25]], np.float32)
    found = set()
    for number in range(8):
        examples = [
            Example(np.zeros((3, 4, 4), np.float32), "", [f"{number} trees"], patch_texts={"a dog": shown}),
            Example(np.zeros((3, 4, 4), np.float32), "", ["a cat"]),
        ]
        made = collate(examples)
        targets = made["patch_targets"]
        assert targets.shape == (2, 2, 2, len(made["input_ids"])) and not targets[1].any()
        column = int(targets[0, 0, 0].argmax())
        np.testing.assert_array_equal(targets[0, ..., column], shown)
        assert targets.sum() == shown.sum() and not made["text_targets"][:, column].any()
        found.add(collate.tokenizer.decode(made["input_ids"][column], skip_special_tokens=True))
    assert found == {"a dog", "a hound"}
    assert "patch_targets" not in collate([Example(np.zeros((3, 4, 4), np.float32), "", ["a cat"])] * 2)
    of_one_text = {"a cat": shown, "A Cat": 2 * shown}  # to the tokenizer
    made = collate([Example(np.zeros((3, 4, 4), np.float32), "", ["a dog"], patch_texts=of_one_text)])
    np.testing.assert_array_equal(made["patch_targets"][0].amax(-1), 3 * shown)
    nothing_known = [Example(np.zeros((3, 4, 4), np.float32), "", ["a cat"], patch_texts={})] * 2
    assert not collate(nothing_known)["patch_targets"].any()


@pytest.mark.parametrize("stride", [1, 3, 9])
def test_patches_of_a_view_a_stride_apart(stride):
    features = np.arange(2 * 5 * 7).reshape(2, 5, 7).astype(np.float16)
    record = Record(b"", ["a dog"], views=[features], view_tags=None)
    prepare = Preparation(patch_stride=stride)
    seen = set()
    for seed in range(200):
        found = prepare(record, np.random.default_rng(seed)).backbone_features
        step = min(stride, 5)
        assert found.shape == (2, 5 // step, 7 // step)
        np.testing.assert_array_equal(np.diff(found, axis=1), 7 * step)
        np.testing.assert_array_equal(np.diff(found, axis=2), step)
        seen.update(found.ravel().tolist())
    assert seen == set(range(70)), "every patch is seen"
    with pytest.raises(ValueError, match="patch_stride"):
        Preparation(patch_stride=0)
