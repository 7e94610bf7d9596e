"""Reading images of every mode that cameras, browsers and scanners write, and refusing files that are not images."""

import base64
import functools
import http.server
import io
import logging
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from pgseg_hf.images import (
    find_images,
    load_image,
    resized_size,
    to_rgb,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def quadrants(mode: str = "RGB") -> Image.Image:
    """Red top left, green top right, blue below, 30 wide and 20 high, so that every rotation is visible."""
    image = Image.new("RGB", (30, 20), BLUE)
    image.paste(RED, (0, 0, 15, 10))
    image.paste(GREEN, (15, 0, 30, 10))
    return image.convert(mode)


def nearest_name(pixel: tuple[int, int, int]) -> str:
    names = {"red": RED, "green": GREEN, "blue": BLUE, "white": WHITE}
    return min(names, key=lambda name: sum(abs(a - b) for a, b in zip(pixel, names[name])))


def shows_quadrants(image: Image.Image) -> bool:
    corners = [nearest_name(image.getpixel(place)) for place in ((4, 4), (25, 4), (4, 15))]
    return corners == ["red", "green", "blue"]


@pytest.mark.parametrize(
    "image_format", ["PNG", "BMP", "TIFF", "PPM", "JPEG", "WEBP", "GIF", "JPEG2000", "AVIF"]
)
def test_reads_every_listed_format(image_format):
    Image.init()
    if image_format not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {image_format}")
    image = load_image(encoded(quadrants(), image_format))
    assert (image.mode, image.size) == ("RGB", (30, 20))
    assert shows_quadrants(image)


def test_all_kinds_of_source_give_the_same_image(tmp_path):
    data = encoded(quadrants())
    path = tmp_path / "image.png"
    path.write_bytes(data)
    used_stream = io.BytesIO(data)
    used_stream.read(5)
    sources = [path, str(path), data, bytearray(data), io.BytesIO(data), used_stream, quadrants()]
    sources.append("data:image/png;base64," + base64.b64encode(data).decode())
    for source in sources:
        assert load_image(source).tobytes() == quadrants().tobytes(), source
    with path.open("rb") as stream:
        assert load_image(stream).tobytes() == quadrants().tobytes()
        assert not stream.closed


def test_reads_from_an_address(tmp_path):
    (tmp_path / "image.png").write_bytes(encoded(quadrants()))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert load_image(f"{address}/image.png").tobytes() == quadrants().tobytes()
        (tmp_path / "drei Bären.png").write_bytes(encoded(quadrants()))
        assert load_image(f"{address}/drei Bären.png").tobytes() == quadrants().tobytes()
        (tmp_path / "page.html").write_text("<!DOCTYPE html><img src=image.png>")
        for name, message in (
            ("absent.png", "cannot be fetched: .*404"),
            ("page.html", "is a web page, not an image"),
        ):
            with pytest.raises(ValueError, match=rf"{name}' {message}"):
                load_image(f"{address}/{name}")
        server.shutdown()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://bucket/a.png", "has the scheme s3, expected http or https"),
        ("http://[a.png", "cannot be fetched"),
        (Path("https://example.org/a.png"), "a URL must be a string"),
        ("no/such/file.png", "no/such/file.png"),
        (Path(__file__).parent, "directory"),
        (io.StringIO("text"), "binary mode"),
        ("data:image/png;base64,???", "not valid base64"),
        (5, "int: 5"),
        (None, "NoneType"),
        (["a.png"], "list"),
    ],
)
def test_sources_that_cannot_be_read(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source)


def test_a_photo_with_a_second_view_is_not_an_animation(caplog):
    data = encoded(quadrants(), "MPO", save_all=True, append_images=[quadrants()])
    assert nearest_name(load_image(data).getpixel((4, 4))) == "red"
    assert not caplog.records


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_undone(orientation, image_format):
    stored = {  # how a camera stores the upright image under each orientation
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    image = quadrants() if stored is None else quadrants().transpose(stored)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(image, image_format, exif=exif, **({"quality": 95} if image_format == "JPEG" else {}))

    upright = load_image(data)
    assert upright.size == (30, 20)
    assert shows_quadrants(upright)
    assert to_rgb(upright).size == (30, 20), "reading twice must not rotate twice"


def test_damaged_exif_does_not_make_a_photo_unreadable():
    data = encoded(quadrants(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_image(data).size == (30, 20)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_alpha_is_laid_over_white(mode):
    rgba = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    rgba.putpixel((2, 0), (0, 0, 0, 51))
    if mode == "PA":
        image = rgba.convert("RGB").quantize(4).convert("PA")
        image.putalpha(rgba.getchannel("A"))
    elif mode == "La":
        image = rgba.convert("LA").convert("La")
    else:
        image = rgba.convert(mode)
    assert image.mode == mode
    black, white, tint = (to_rgb(image).getpixel((x, 0)) for x in range(3))
    assert black == (0, 0, 0)
    assert white == WHITE
    assert tint == pytest.approx((204, 204, 204), abs=1)


def test_transparency_of_palette_grey_and_rgb_files():
    palette = quadrants().quantize(8)
    for image_format in ("PNG", "GIF"):
        image = load_image(encoded(palette, image_format, transparency=palette.getpixel((4, 4))))
        assert [nearest_name(image.getpixel(place)) for place in ((4, 4), (25, 4))] == ["white", "green"]
    assert load_image(encoded(quadrants(), transparency=RED)).getpixel((4, 4)) == WHITE
    assert load_image(encoded(Image.new("L", (4, 4), 7), transparency=7)).getpixel((0, 0)) == WHITE
    assert load_image(encoded(Image.new("L", (4, 4), 7), transparency=8)).getpixel((0, 0)) == (7, 7, 7)
    sixteen_bit = Image.fromarray(np.array([[1000, 30000]], dtype=np.uint16))
    assert np.asarray(load_image(encoded(sixteen_bit, transparency=1000)))[0, :, 0].tolist() == [255, 117]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_colour_modes(mode):
    image = to_rgb(quadrants(mode) if mode != "P" else quadrants().quantize(8))
    assert (image.mode, image.size) == ("RGB", (30, 20))
    if mode in ("P", "CMYK", "YCbCr", "HSV"):
        assert shows_quadrants(image)
    else:
        red, green, blue = image.getpixel((4, 4))
        assert red == green == blue


def test_cmyk_jpeg():
    image = load_image(encoded(quadrants("CMYK"), "JPEG", quality=95))
    assert shows_quadrants(image)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(image_format):
    values = np.array([[0, 128, 129, 200, 257, 20000, 32768, 65535]], dtype=np.uint16)
    image = load_image(encoded(Image.fromarray(values), image_format))
    expected = np.rint(values / 65535 * 255)
    np.testing.assert_array_equal(np.asarray(image), np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L"])
def test_every_sixteen_bit_mode(mode):
    if mode == "I":
        image = Image.fromarray(np.array([[0, 65535, 25700]], dtype=np.int32))
    else:
        dtype = ">u2" if mode == "I;16B" else "<u2"
        data = np.array([0, 65535, 25700], dtype=dtype).tobytes()
        image = Image.frombytes(mode, (3, 1), data)
    assert image.mode == mode
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 255, 100]


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        ([-1, 5], np.int32, "from -1 to 5"),
        ([0, 65536], np.int32, "from 0 to 65536"),
        ([0, np.nan], np.float32, "NaN"),
        ([0, np.inf], np.float32, "infinite"),
        ([0, 0.5], np.float32, "from 0 to 0.5"),
    ],
)
def test_values_without_a_range_are_refused(values, dtype, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(Image.fromarray(np.array([values], dtype=dtype)))


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animated_files_give_their_first_frame_and_a_warning(image_format, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pgseg_hf"), "propagate", True)
    frames = [Image.new("RGB", (30, 20), colour) for colour in (RED, GREEN, BLUE)]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.WARNING):
        image = load_image(data)
    assert nearest_name(image.getpixel((5, 5))) == "red"
    assert len(caplog.records) == 1
    assert "animated" in caplog.records[0].message

    caplog.clear()
    assert to_rgb(image).tobytes() == image.tobytes()
    image.resize((3, 3))
    assert not caplog.records, "the image is a plain one now"


def test_an_open_animation_gives_its_current_frame(caplog):
    frames = [Image.new("RGB", (30, 20), colour) for colour in (RED, GREEN, BLUE)]
    with Image.open(
        io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    ) as animation:
        animation.seek(1)
        assert nearest_name(to_rgb(animation).getpixel((5, 5))) == "green"
        assert animation.tell() == 1


def broken_files():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    for image_format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        data = encoded(image, image_format)
        yield f"{image_format} cut in half", data[: len(data) // 2]
        yield f"{image_format} header only", data[:12]
    png = encoded(image)
    yield "PNG with wrong bytes inside", png[:60] + bytes(200) + png[260:]
    yield "empty", b""
    yield "one byte", b"P"
    yield "text", b"this is not an image"
    yield "HTML error page", b"<!DOCTYPE html><html>404</html>"
    yield "SVG", b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    yield "EPS", encoded(quadrants(), "EPS")


@pytest.mark.parametrize(
    ("what", "data"), list(broken_files()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_broken_files_raise_a_value_error_that_names_the_file(what, data, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        load_image(path)
    with pytest.raises(ValueError, match=f"{len(data)} bytes"):
        load_image(data)
    path.unlink()  # nothing keeps the file open


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=64),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"BM", b"P6"]),
)
def test_arbitrary_bytes_never_raise_anything_but_value_error(tail, head):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert load_image(head + tail).mode == "RGB"
        except ValueError as error:
            assert "bytes" in str(error)


def test_to_rgb_takes_only_pil_images_with_pixels():
    with pytest.raises(ValueError, match="ndarray"):
        to_rgb(np.zeros((4, 4, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="0 x 5"):
        to_rgb(Image.new("RGB", (0, 5)))


def test_pillows_global_limit_neither_applies_nor_changes(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(encoded(quadrants())).size == (30, 20)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_own_limit_names_the_size_and_comes_before_decoding():
    data = encoded(quadrants())
    with pytest.raises(ValueError, match=r"30 x 20 = 600 pixels.*599"):
        load_image(data, max_pixels=599)
    header_of_a_huge_png = data[:16] + (60_000).to_bytes(4, "big") * 2 + data[24:]
    checksum = zlib.crc32(header_of_a_huge_png[12:29]).to_bytes(4, "big")
    with pytest.raises(ValueError, match="3,600,000,000"):
        load_image(header_of_a_huge_png[:29] + checksum + header_of_a_huge_png[33:])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "HSV"]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.randoms(use_true_random=False),
)
def test_to_rgb_keeps_the_size_and_changes_nothing_the_second_time(mode, size, random):
    bands = {"1": 1, "L": 1, "P": 1, "RGB": 3, "RGBA": 4, "LA": 2, "CMYK": 4, "I;16": 2, "HSV": 3}[mode]
    image = Image.frombytes("L" if mode == "1" else mode, size, random.randbytes(size[0] * size[1] * bands))
    once = to_rgb(image.convert("1") if mode == "1" else image)
    assert (once.mode, once.size) == ("RGB", size)
    assert to_rgb(once) is once


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (448, 448, (448, 448)),
        (375, 500, (448, 597)),
        (500, 375, (597, 448)),
        (1, 1, (448, 448)),
        (1, 5000, (16, 2048)),
        (5000, 1, (2048, 16)),
        (100, 1000, (205, 2048)),
        (10_000, 10_000, (448, 448)),
    ],
)
def test_resized_size(height, width, expected):
    assert resized_size(height, width) == expected


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 1000), st.integers(1, 3000))
def test_resized_size_keeps_its_bounds_and_the_aspect_ratio(height, width, shortest, longest):
    new_height, new_width = resized_size(height, width, shortest, longest)
    assert max(new_height, new_width) <= longest
    assert min(new_height, new_width) <= shortest
    assert min(new_height, new_width) == shortest or max(new_height, new_width) == longest
    factor = min(shortest / min(height, width), longest / max(height, width))
    least = min(16, shortest, longest)
    assert new_height == least or abs(new_height - height * factor) <= 0.5 + 1e-6
    assert new_width == least or abs(new_width - width * factor) <= 0.5 + 1e-6
    assert min(new_height, new_width) >= least


def test_resized_size_refuses_nonsense():
    with pytest.raises(ValueError, match="width must be at least 1"):
        resized_size(5, 0)
    with pytest.raises(ValueError, match="shortest_edge must be at least 1"):
        resized_size(5, 5, shortest_edge=-3)
    with pytest.raises(ValueError, match="longest_edge"):
        resized_size(1, 5000, shortest_edge=448, longest_edge=None)


def test_images_of_a_folder_without_hidden_ones(tmp_path):
    for name in ("b.png", "sub/a.JPG", "notes.txt", ".hidden.png", ".thumbnails/a.png", "sub/.git/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / "b.png", tmp_path / "sub" / "a.JPG"]
