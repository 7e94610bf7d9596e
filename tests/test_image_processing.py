"""The image processors compared with a reference that uses only Pillow and NumPy."""

import copy
import io
import logging
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from transformers import AutoImageProcessor
from transformers.utils import is_torchvision_available

from pgseg_hf.image_processing_pgseg import PGSegImageProcessor
from pgseg_hf.image_processing_pil_pgseg import PGSegImageProcessorPil

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

both_backends = pytest.mark.parametrize("processor_class", [PGSegImageProcessorPil, PGSegImageProcessor])


def photo(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth random colours, so that resizing has an effect but does not reach any backend's limits."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def oracle(image: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
    """[3, H, W]: resized with Pillow, scaled to [0, 1], normalised; `size` is (width, height)."""
    if size is None:
        factor = min(448 / min(image.size), 2048 / max(image.size))
        size = tuple(max(16, int(side * factor + 0.5)) for side in image.size)
    resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR), dtype=np.float64)
    return ((resized / 255 - MEAN) / STD).transpose(2, 0, 1)


def assert_close(pixel_values, expected, exact: bool = True) -> None:
    """Equal up to float32 rounding for Pillow; within 1/255 on average for other backends, as documented."""
    values = np.asarray(pixel_values, dtype=np.float64)
    assert values.shape == expected.shape
    difference = np.abs(values - expected) * STD[:, None, None]
    if exact:
        assert difference.max() < 1e-5
    else:
        assert difference.mean() < 1 / 255


@both_backends
@pytest.mark.parametrize(
    "size", [(60, 40), (40, 60), (900, 500), (448, 448), (301, 77), (1, 1), (1, 700), (700, 1)]
)
def test_default_result(processor_class, size):
    image = photo(*size)
    features = processor_class()(image, return_tensors="pt")
    assert list(features) == ["pixel_values"]
    assert features["pixel_values"].dtype == torch.float32
    is_pil = issubclass(processor_class, PGSegImageProcessorPil)
    assert_close(features["pixel_values"][0], oracle(image), exact=is_pil)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 70), st.integers(1, 120), st.integers(0, 99))
def test_any_size_follows_the_rule(width, height, shortest, longest, seed):
    image = photo(width, height, seed=seed)
    size = {"shortest_edge": shortest, "longest_edge": longest}
    factor = min(shortest / min(width, height), longest / max(width, height))
    new_size = tuple(max(min(16, shortest, longest), int(side * factor + 0.5)) for side in (width, height))
    pixel_values = PGSegImageProcessorPil(size=size)(image, return_tensors="np")["pixel_values"][0]
    assert_close(pixel_values, oracle(image, new_size))


@both_backends
@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ({"shortest_edge": 32}, (32, 48)),
        (32, (32, 48)),
        ({"shortest_edge": 32, "longest_edge": 40}, (27, 40)),
        ({"height": 30, "width": 20}, (30, 20)),
        ((30, 20), (30, 20)),
    ],
)
def test_sizes_at_the_call_and_in_the_constructor(processor_class, size, shape):
    image = photo(60, 40)
    for processor, options in ((processor_class(size=size), {}), (processor_class(), {"size": size})):
        assert processor(image, return_tensors="pt", **options)["pixel_values"].shape == (1, 3, *shape)


@both_backends
@pytest.mark.parametrize(
    "size",
    [
        {"longest_edge": 40},
        {"height": 0, "width": 5},
        {"shortest_edge": -4},
        {"edge": 3},
        {"shortest_edge": 448},
    ],
)
def test_impossible_sizes_are_refused(processor_class, size):
    """The last size would give 448 x 2,240,000 pixels for this image."""
    with pytest.raises(ValueError):
        processor_class()(photo(5000, 1), size=size)


@both_backends
def test_center_crop_on_request(processor_class):
    image = photo(60, 40)
    processor = processor_class(
        size={"shortest_edge": 20}, do_center_crop=True, crop_size={"height": 12, "width": 16}
    )
    expected = oracle(image, (30, 20))[:, 4:16, 7:23]
    is_pil = issubclass(processor_class, PGSegImageProcessorPil)
    assert_close(processor(image, return_tensors="pt")["pixel_values"][0], expected, exact=is_pil)


@both_backends
def test_steps_can_be_left_out(processor_class):
    image = photo(6, 4)
    processor = processor_class(do_resize=False, do_normalize=False)
    scaled = processor(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(scaled, np.asarray(image).transpose(2, 0, 1) / 255, atol=1e-6)
    raw = processor(image, do_rescale=False, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(raw, np.asarray(image).transpose(2, 0, 1))


@both_backends
def test_all_kinds_of_input_agree(processor_class, tmp_path):
    image = photo(60, 40)
    path = tmp_path / "photo.png"
    image.save(path)
    stream = io.BytesIO(path.read_bytes())
    array = np.asarray(image)
    processor = processor_class(size={"height": 20, "width": 30})
    expected = processor(image, return_tensors="pt")["pixel_values"]
    batch = [str(path), path, stream.getvalue(), stream, array, array.transpose(2, 0, 1), torch.tensor(array)]
    batch += [torch.tensor(array).permute(2, 0, 1), array.astype(np.int64), torch.tensor(array).int()]
    for source in batch:
        assert torch.equal(processor(source, return_tensors="pt")["pixel_values"], expected), type(source)
    together = processor(batch, return_tensors="pt")["pixel_values"]
    assert torch.equal(together, expected.expand(len(batch), -1, -1, -1))
    stacked = processor(np.stack([array, array]), return_tensors="pt")["pixel_values"]
    assert torch.equal(stacked, expected.expand(2, -1, -1, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_pixels_are_not_rounded(dtype):
    values = torch.rand(3, 8, 10, dtype=torch.float64).mul(255).to(dtype)
    processor = PGSegImageProcessorPil(do_resize=False)
    pixel_values = processor(values, return_tensors="np")["pixel_values"][0]
    expected = (values.double().numpy() / 255 - MEAN[:, None, None]) / STD[:, None, None]
    assert np.abs(pixel_values - expected).max() < (1e-5 if dtype in (torch.float32, torch.float64) else 1e-2)

    ramp = np.repeat(np.linspace(0, 1, 64, dtype=np.float32)[None, None], 3, axis=0).repeat(8, axis=1)
    options = {"do_rescale": False, "do_normalize": False, "size": {"height": 4, "width": 32}}
    resized = PGSegImageProcessorPil()(ramp, return_tensors="np", **options)["pixel_values"][0]
    np.testing.assert_allclose(resized[0, 0, 1:-1], ramp[0, 0].reshape(32, 2).mean(1)[1:-1], atol=1e-6)


def test_floats_up_to_one_that_will_be_divided_again_are_reported(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pgseg_hf"), "propagate", True)
    ones = np.ones((3, 5, 7), dtype=np.float32)
    with caplog.at_level(logging.WARNING):
        PGSegImageProcessorPil()(ones)
    assert "do_rescale=False" in caplog.text


@both_backends
def test_photos_are_turned_upright_and_alpha_is_white(processor_class):
    processor = processor_class(do_resize=False, do_normalize=False)
    turned = photo(6, 4)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stream = io.BytesIO()
    turned.save(stream, "PNG", exif=exif)
    expected = np.asarray(turned.transpose(Image.Transpose.ROTATE_270)).transpose(2, 0, 1) / 255
    for source in (stream.getvalue(), Image.open(stream)):
        np.testing.assert_allclose(
            processor(source, return_tensors="np")["pixel_values"][0], expected, atol=1e-6
        )

    clear = Image.new("RGBA", (3, 2), (10, 20, 30, 0))
    for source in (clear, np.asarray(clear), torch.tensor(np.asarray(clear)).permute(2, 0, 1)):
        assert processor(source, return_tensors="np")["pixel_values"].min() == pytest.approx(1)


@both_backends
@pytest.mark.parametrize("shape", [(1, 50, 3), (50, 1, 3), (3, 6, 4), (3, 1, 50), (1, 50, 4)])
def test_channels_are_found_in_thin_images(processor_class, shape):
    values = np.full(shape, 51, dtype=np.uint8)
    channels_first = shape[0] == 3
    height, width = shape[1:] if channels_first else shape[:2]
    processor = processor_class(do_resize=False, do_normalize=False)
    for source in (values, torch.tensor(values)):
        pixel_values = processor(source, return_tensors="np")["pixel_values"]
        assert pixel_values.shape == (1, 3, height, width)
        over_white = 255 - (255 - 51) * 51 / 255
        assert np.allclose(pixel_values * 255, over_white if shape == (1, 50, 4) else 51, atol=1)


@both_backends
def test_greyscale_and_sixteen_bit(processor_class):
    processor = processor_class(do_resize=False, do_normalize=False)
    grey = np.array([[0, 100], [200, 255]], dtype=np.uint8)
    expected = np.repeat(grey[None] / 255, 3, axis=0)
    deep = grey.astype(np.uint16) * 257
    for source in (grey, torch.tensor(grey), Image.fromarray(grey), deep, Image.fromarray(deep)):
        np.testing.assert_allclose(
            processor(source, return_tensors="np")["pixel_values"][0], expected, atol=1e-6
        )


@both_backends
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_pixels_are_refused(processor_class, bad):
    array = np.full((3, 5, 7), 100.0, dtype=np.float32)
    array[1, 2, 3] = bad
    for source in (array, torch.tensor(array), torch.tensor(array).half(), [np.zeros((3, 5, 7)), array]):
        with pytest.raises(ValueError, match="1 NaN or infinite"):
            processor_class()(source, return_tensors="pt")
    with pytest.raises(ValueError, match="NaN"):
        processor_class()(Image.fromarray(array[1]))


@both_backends
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.full((3, 4, 5), 256), "from 256 to 256"),
        (np.full((3, 4, 5), -1, dtype=np.int16), "from -1 to -1"),
        (torch.full((3, 4, 5), 300), "from 300 to 300"),
        (np.zeros((3, 4, 5), dtype=bool), "bool"),
        (np.zeros((3, 4, 5), dtype=complex), "complex"),
        (np.zeros((3, 0, 5), dtype=np.uint8), "no pixels"),
        (np.zeros((4, 5), dtype=np.float32), "2-D"),
        ([], "no images"),
        (7, "int"),
        ("no/such/file.png", "no/such/file.png"),
        (b"", "0 bytes"),
    ],
    ids=str,
)
def test_bad_input_is_named(processor_class, source, message):
    with pytest.raises(ValueError, match=message):
        processor_class()(source, return_tensors="pt")


@both_backends
def test_images_of_different_sizes_need_one_size_or_no_batch(processor_class):
    images = [photo(60, 40), photo(40, 40)]
    processor = processor_class(size={"shortest_edge": 20})
    with pytest.raises(ValueError, match=r"\(20, 30\), \(20, 20\).*size=\{'height'.*one by one"):
        processor(images, return_tensors="pt")
    separate = processor(images)["pixel_values"]
    assert [tuple(image.shape) for image in separate] == [(3, 20, 30), (3, 20, 20)]
    batch = processor(images, size={"height": 16, "width": 24}, return_tensors="pt")["pixel_values"]
    assert batch.shape == (2, 3, 16, 24)


@both_backends
def test_input_is_not_changed(processor_class):
    array = np.asarray(photo(8, 6)).astype(np.float32)
    tensor, before = torch.tensor(array), array.copy()
    processor_class()([array, tensor], return_tensors="pt")
    np.testing.assert_array_equal(array, before)
    np.testing.assert_array_equal(tensor.numpy(), before)


@both_backends
def test_save_load_copy_and_pickle(processor_class, tmp_path):
    processor = processor_class(size={"height": 20, "width": 30}, image_mean=[0.5, 0.5, 0.5])
    processor.save_pretrained(tmp_path)
    expected = processor(photo(60, 40), return_tensors="pt")["pixel_values"]
    automatic = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(
        automatic, PGSegImageProcessor if is_torchvision_available() else PGSegImageProcessorPil
    )
    pillow = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(pillow) is PGSegImageProcessorPil
    for other in (
        processor_class.from_pretrained(tmp_path), copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))
    ):  # fmt: skip
        assert other.to_dict() == processor.to_dict()
        assert torch.equal(other(photo(60, 40), return_tensors="pt")["pixel_values"], expected)
    assert_close(
        pillow(photo(60, 40), return_tensors="pt")["pixel_values"][0],
        expected[0].double().numpy(),
        exact=False,
    )
    assert processor.to_dict()["image_processor_type"] == "PGSegImageProcessor"


def test_both_backends_agree_within_one_level_on_average():
    if not is_torchvision_available():
        assert issubclass(PGSegImageProcessor, PGSegImageProcessorPil)
        assert PGSegImageProcessor().backend == "pil"
        return
    for size in ((640, 427), (200, 300), (31, 900)):
        image = photo(*size)
        pillow, torchvision = (
            processor_class(do_normalize=False)(image, return_tensors="pt")["pixel_values"]
            for processor_class in (PGSegImageProcessorPil, PGSegImageProcessor)
        )
        assert (pillow - torchvision).abs().mean() < 1 / 255
