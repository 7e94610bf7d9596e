"""Colours, overlays, legends and mask files."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from pgseg_hf.features import StageFeatures
from pgseg_hf.modeling_vision import PGSegVisionOutput
from pgseg_hf.visualization import colours as colour_map
from pgseg_hf.visualization import (
    draw_contours,
    draw_groups,
    find_contours,
    group_palette,
    heat_map,
    indexed_png,
    label_colours,
    overlay,
    palette,
    prototype_maps,
    side_by_side,
)
from pgseg_hf.visualization.heat import CHOSEN, INK, NOTHING, PAPER, ramp

GREY = (120, 120, 120)


def plain_image(width: int, height: int, colour: tuple[int, int, int] = GREY) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def halves(width: int = 40, height: int = 60) -> np.ndarray:
    """A map whose upper half is 0 and lower half 1."""
    label_map = np.zeros((height, width), dtype=np.int64)
    label_map[height // 2 :] = 1
    return label_map


def shown_colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in image.getcolors(image.width * image.height)}


@pytest.fixture
def drawn_text(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that a test draws, in order."""
    texts: list[str] = []
    original = ImageDraw.ImageDraw.text

    def spy(self, xy, text, *args, **kwargs):
        texts.append(text)
        return original(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    return texts


class TestPalette:
    def test_a_thousand_colours_are_distinct_bytes(self):
        colours = palette(1000)
        assert colours.dtype == np.uint8 and colours.shape == (1000, 3)
        assert len(np.unique(colours, axis=0)) == 1000

    @given(st.integers(0, 1500), st.integers(0, 1500))
    def test_a_longer_palette_starts_with_the_shorter(self, one, other):
        short, long = sorted((one, other))
        np.testing.assert_array_equal(palette(long)[:short], palette(short))

    def test_the_sequence_does_not_change(self):
        # Images of different releases show a label in the same colour.
        assert palette(1)[0].tolist() == [230, 159, 0]
        assert palette(12)[8:].tolist() == [[119, 255, 255], [0, 0, 187], [170, 34, 0], [51, 51, 255]]

    @pytest.mark.parametrize("matrix", ["normal", "_PROTANOPIA", "_DEUTERANOPIA"])
    def test_the_first_eight_stay_apart_for_each_kind_of_eyes(self, matrix):
        linear = colour_map.linear_light(palette(8))
        if matrix != "normal":
            linear = np.clip(linear @ np.array(getattr(colour_map, matrix)).T, 0, 1)
        lab = colour_map.oklab(linear)
        distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[~np.eye(8, dtype=bool)]
        assert distance.min() > 0.07  # about 3.5 times the just noticeable difference of 0.02

    def test_colours_repeat_and_negative_counts_are_refused(self):
        np.testing.assert_array_equal(palette(2048)[1024:], palette(1024))
        with pytest.raises(ValueError, match="-1"):
            palette(-1)

    def test_chosen_colours_are_given_to_no_other_label(self):
        labels = [f"label {number}" for number in range(12)]
        np.testing.assert_array_equal(label_colours(labels), palette(12))
        np.testing.assert_array_equal(label_colours(labels, {"absent": "#e69f00"}), palette(12))
        chosen = {labels[3]: "#e69f00", labels[9]: "#ff0000"}  # the first of the palette, and none of it
        colours = label_colours(labels, chosen)
        assert colours[3].tolist() == [230, 159, 0] and colours[9].tolist() == [255, 0, 0]
        assert len(np.unique(colours, axis=0)) == 12, "the first label gave way, and one that is nearly red"
        same = [index for index in range(12) if index not in (0, 3, 6, 9)]
        np.testing.assert_array_equal(colours[same], palette(12)[same])
        everything = dict.fromkeys(labels, "#ff0000")
        assert (label_colours(labels, everything) == [255, 0, 0]).all()

    def test_groups_have_colours_that_no_label_has(self):
        groups = group_palette(64)
        assert len(np.unique(groups, axis=0)) == 64 and (group_palette(70)[64:] == groups[:6]).all()
        lab, labels = (colour_map.oklab(colour_map.linear_light(each)) for each in (groups[:16], palette(8)))
        assert np.linalg.norm(lab[:, None] - labels[None], axis=-1).min() > 0.07
        between = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[~np.eye(16, dtype=bool)]
        assert between.min() > 0.04


class TestOverlay:
    def test_chosen_colours(self):
        chosen = {"b": "#0000ff"}
        colours = label_colours(["a", "b"], chosen)
        for label_map, background in ((halves(), False), (halves() + 1, True)):
            drawn = overlay(
                *(plain_image(40, 60), label_map, ["a", "b"], background),
                **{"alpha": 1, "legend": False, "contours": False, "colours": chosen},
            )
            np.testing.assert_array_equal(np.asarray(drawn), colours[halves()])
            mask = indexed_png(label_map, 2, background, colours)
            np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), colours[halves()])
        assert (0, 0, 255) in shown_colours(
            draw_contours(plain_image(40, 60), halves(), ["a", "b"], colours=chosen)
        )

    @pytest.mark.parametrize("background", [False, True])
    def test_alpha(self, background):
        photo = Image.effect_noise((40, 60), 80).convert("RGB")
        labels, values = ["a", "b", "c"], halves() * 2 + background * np.array([0, 1])[halves()]
        plain, pure = (
            np.asarray(overlay(photo, values, labels, background, alpha, legend=False, contours=False))
            for alpha in (0, 1)
        )
        np.testing.assert_array_equal(plain, np.asarray(photo))
        # A label has its colour with a background and without; the background has none.
        assert (pure[30:] == palette(3)[2]).all()
        np.testing.assert_array_equal(
            pure[:30], plain[:30] if background else np.full_like(plain[:30], palette(1)[0])
        )

    def test_the_image_fades_to_a_lighter_grey_under_its_colour(self):
        drawn = overlay(plain_image(9, 9), np.zeros((9, 9), int), ["a"], alpha=0.5, legend=False)
        # 120 becomes 80 + 0.65 * 120 = 158, half of it is mixed in, then half of the colour.
        np.testing.assert_allclose(drawn.getpixel((4, 4)), (139 + palette(1)[0].astype(int)) / 2, atol=1)

    @pytest.mark.parametrize(("rows", "background"), [(1, False), (7, True), (500, True)])
    def test_strips_change_nothing(self, rows, background, monkeypatch):
        """Of an image whose lines are two pixels wide."""
        photo = Image.effect_noise((800, 760), 80).convert("RGB")
        label_map = np.kron(np.arange(35).reshape(5, 7) % 3, np.ones((152, 115), dtype=int))[:, :800]
        whole = overlay(photo, label_map, ["a", "b", "c"], background, legend=False)
        monkeypatch.setattr("pgseg_hf.visualization.maps._STRIP_PIXELS", rows * 800)
        strips = overlay(photo, label_map, ["a", "b", "c"], background, legend=False)
        np.testing.assert_array_equal(np.asarray(strips), np.asarray(whole))

    def test_the_legend_lists_only_what_is_there_the_largest_first(self, drawn_text):
        label_map = np.zeros((100, 100), dtype=np.uint8)
        label_map[:70], label_map[0, 0] = 3, 1
        drawn = overlay(plain_image(100, 100), label_map, ["tree", "cat", "dog", "sky"])
        assert drawn_text == ["sky", "70.0 %", "tree", "30.0 %", "cat", "<0.1 %"]
        swatches = {tuple(colour) for colour in palette(4)[[0, 3]].tolist()}
        assert swatches <= shown_colours(drawn.crop((100, 0, *drawn.size)))
        overlay(plain_image(30, 30), np.zeros((30, 30), dtype=int), ["a"], background=True)
        assert drawn_text[-1] == "nothing found"

    def test_many_labels_end_in_a_sum(self, drawn_text):
        label_map = np.arange(1000).reshape(50, 20) % 1000
        drawn = overlay(plain_image(20, 50), label_map, [f"label {i}" for i in range(1000)])
        texts = drawn_text[::2]
        shown = len(texts) - 1
        assert texts[-1] == f"{1000 - shown} more"
        assert drawn_text[-1] == f"{(1000 - shown) / 10:.1f} %"
        assert drawn.height < 400

    def test_the_legend_stands_beside_a_tall_and_under_a_wide_image(self):
        tall = overlay(plain_image(100, 300), np.zeros((300, 100), dtype=int), ["a"])
        wide = overlay(plain_image(300, 100), np.zeros((100, 300), dtype=int), ["a"])
        assert tall.width > 100 and tall.height == 300
        assert wide.width == 300 and wide.height > 100

    @pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1)])
    def test_any_size(self, size):
        drawn = overlay(plain_image(*size), np.zeros(size[::-1], dtype=np.int32), ["a", "b"])
        assert drawn.mode == "RGB" and drawn.width >= size[0] and drawn.height >= size[1]

    @pytest.mark.parametrize(
        ("label", "expected"),
        [
            ("Käse\nund\tBröt\x00chen", "Kase und Brot chen"),
            ("  wide   gaps ", "wide gaps"),
            ("smørrebrød", "smorrebrod"),
            ("cat 🐱", "label 1: cat"),
            ("猫", "label 1"),
            ("", "label 1"),
            ("\ud800lone", "label 1: lone"),
            ("½ \u202eabc", "1⁄2 abc"),
        ],
    )
    def test_labels_are_drawn_in_letters_that_the_font_has(self, label, expected, drawn_text):
        overlay(plain_image(30, 30), np.zeros((30, 30), dtype=int), [label])
        assert drawn_text[0] == expected

    def test_labels_stay_distinct(self, drawn_text):
        long = [f"{'word ' * 200}{colour}" for colour in ("red", "blue")]
        labels = ["日本 car", "dog", "中国 car", "côte", "coté", "猫", *long]
        drawn = overlay(plain_image(60, 60), np.arange(3600).reshape(60, 60) % 8, labels)
        expected = ["label 1: car", "dog", "label 3: car", "label 4: cote", "label 5: cote", "label 6"]
        assert drawn_text[:12:2] == expected
        assert [text[:12] for text in drawn_text[12::2]] == ["label 7: wor", "label 8: wor"]
        assert all(text.endswith("…") for text in drawn_text[12::2]) and drawn.width < 700

    @pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "CMYK", "I;16"])
    def test_any_mode_and_tensors(self, mode):
        wide = Image.fromarray(np.full((6, 5), 40_000, dtype=np.uint16))
        source = wide if mode == "I;16" else Image.new(mode, (5, 6))
        drawn = overlay(source, torch.zeros(6, 5, dtype=int), ["a"], background=True, legend=False)
        grey = {"1": 0, "LA": 255, "P": 0, "RGBA": 255, "CMYK": 255, "I;16": 156}[mode]
        assert shown_colours(drawn) == {(grey,) * 3} and source.mode == mode

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"label_map": np.zeros((40, 60), dtype=int)}, "60 x 40.*40 x 60"),
            ({"label_map": np.full((60, 40), 2)}, "value 2"),
            ({"label_map": np.full((60, 40), 3), "background": True}, "value 3"),
            ({"label_map": np.full((60, 40), -1)}, "-1"),
            ({"label_map": np.zeros((60, 40))}, "float64"),
            ({"label_map": np.zeros((1, 60, 40), dtype=int)}, r"\(1, 60, 40\)"),
            ({"label_map": np.zeros((0, 40), dtype=int)}, r"\(0, 40\)"),
            ({"labels": []}, "labels are"),
            ({"labels": "cat"}, "'cat'"),
            ({"labels": ["cat", 7]}, "7"),
            ({"alpha": 1.5}, "1.5"),
            ({"alpha": math.nan}, "nan"),
            ({"image": np.zeros((60, 40, 3))}, "ndarray"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, change, message):
        arguments = {"image": plain_image(40, 60), "label_map": halves(), "labels": ["a", "b"]} | change
        with pytest.raises(ValueError, match=message):
            overlay(**arguments)


class TestGroupMap:
    def test_a_coarse_grid_is_stretched_over_the_image(self):
        drawn = draw_groups(plain_image(90, 60), [[0, 1, 2], [2, 1, 0]], alpha=1, legend=False)
        pixels = np.asarray(drawn)
        colours = group_palette(3)
        for (y, x), group in {(10, 10): 0, (10, 45): 1, (10, 80): 2, (50, 10): 2, (50, 80): 0}.items():
            assert (pixels[y, x] == colours[group]).all()

    def test_groups_are_counted_from_one(self, drawn_text):
        draw_groups(plain_image(30, 30), [[7]], num_groups=8)
        assert drawn_text == ["group 8", "100.0 %"]
        with pytest.raises(ValueError, match="value 8"):
            draw_groups(plain_image(30, 30), [[8]], num_groups=8)


class TestContours:
    @pytest.mark.parametrize("width", [1, 2, 3, 5])
    def test_the_width_is_kept(self, width):
        lines = find_contours(halves(4, 30), width)
        rows = np.flatnonzero(lines.all(axis=1))
        assert len(rows) == width == lines.sum() // 4
        assert abs(rows.mean() - 14.5) <= 0.5  # the border lies between rows 14 and 15

    def test_no_border_and_no_width(self):
        assert not find_contours(np.ones((5, 5), dtype=int), 3).any()
        with pytest.raises(ValueError, match="got 0"):
            find_contours(halves(), 0)


class TestDrawnContours:
    def test_each_side_of_a_border_has_its_own_colour_and_the_rest_stays(self):
        drawn = np.asarray(draw_contours(plain_image(40, 60), halves(), ["a", "b"], legend=False))
        rows = [tuple(row) for row in drawn[:, 20].tolist()]
        first, second = (tuple(colour) for colour in palette(2).tolist())
        assert rows[:25] == [GREY] * 25 and rows[36:] == [GREY] * 24
        assert rows[28] == first and rows[31] == second
        assert drawn[29, 20].min() > 180  # the line between them

    @pytest.mark.parametrize(("side", "width"), [(300, 1), (1000, 2), (1600, 3)])
    def test_borders_are_wider_in_larger_images(self, side, width):
        image, label_map = plain_image(side, side), halves(side, side)
        drawn = np.asarray(draw_contours(image, label_map, ["a", "b"], legend=False))
        coloured = [(drawn[:, 9] == colour).all(axis=1).sum() for colour in palette(2)]
        assert coloured == [2 * width] * 2

    def test_the_background_has_no_colour(self, drawn_text):
        drawn = draw_contours(plain_image(40, 60), halves(), ["a"], background=True)
        colours = {tuple(colour) for colour in np.asarray(drawn)[:28, :40].reshape(-1, 3).tolist()}
        assert colours == {GREY} and tuple(palette(1)[0].tolist()) in shown_colours(drawn)
        assert drawn_text == ["a", "50.0 %"]


class TestPrototypeMaps:
    def output(self, **changes):
        """Four patches, 2 x 2, in three groups; two prototypes of patches, then two of groups."""
        first = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3]])
        second = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.3, 0.7]])
        of_patches = torch.tensor([[1.0, 0, 0, 0.1], [0, 1.0, 0.2, 0], [0, 0, 0.8, 0.9]])
        nothing = torch.zeros(1)
        values = {
            "grouping": torch.zeros(1, 3, 2, 2),
            "attentions": (of_patches[None], torch.ones(1, 3, 3)),
            "npr": tuple(
                StageFeatures(nothing, nothing, shares[None], nothing) for shares in (first, second)
            ),
        }
        return PGSegVisionOutput(**(values | changes))

    def test_a_later_stages_prototypes_reach_the_patches_through_their_groups(self):
        one, two = prototype_maps(self.output())
        assert one.tolist() == [[0, 1], [1, 0]]
        # Patch 2 shares 0.2 in group 1 and 0.8 in group 2: 0.44 of prototype 0, 0.56 of prototype 1.
        assert two.tolist() == [[1, 0], [1, 1]]

    def test_a_model_without_prototypes_is_refused(self):
        with pytest.raises(ValueError, match="no prototypes"):
            prototype_maps(self.output(npr=()))
        with pytest.raises(ValueError, match="output_attentions=True"):
            prototype_maps(self.output(attentions=None))


class TestHeatMap:
    VALUES = ((0.0, 1.0, 0.5), (0.25, math.nan, 1.0))

    def test_numbers_stand_in_their_cells(self, drawn_text):
        heat_map(self.VALUES, ["cat", "dog"], ["1", "2", "3"])
        assert drawn_text == ["1", "2", "3", "cat", "dog", "0.00", "1.00", "0.50", "0.25", "1.00"]

    def test_the_ground_is_darker_where_there_is_more(self):
        grounds = [ramp(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
        lightness = colour_map.oklab(colour_map.linear_light(np.array(grounds, dtype=np.uint8)))[:, 0]
        assert (np.diff(lightness) < -0.05).all()
        shown = shown_colours(heat_map(self.VALUES, ["cat", "dog"], ["1", "2", "3"]))
        assert {grounds[0], grounds[1], grounds[2], grounds[4], NOTHING} <= shown

    def test_numbers_are_light_on_dark_cells(self, monkeypatch):
        inks = {}
        text = ImageDraw.ImageDraw.text
        monkeypatch.setattr(
            ImageDraw.ImageDraw,
            "text",
            lambda self, xy, words, **how: inks.update({words: how["fill"]}) or text(self, xy, words, **how),
        )
        heat_map([[0.0, 0.5, 0.6, 1.0]], ["row"], list("abcd"))
        assert [inks[number] for number in ("0.00", "0.50", "0.60", "1.00")] == [INK, INK, PAPER, PAPER]

    def test_names_have_their_colours_and_choices_a_frame(self):
        drawn = heat_map(self.VALUES, ["cat", "dog"], ["1", "2", "3"], [1, -1, 0], palette(2), palette(6)[3:])
        assert {
            tuple(colour) for colour in [*palette(2).tolist(), *palette(6)[3:].tolist()]
        } <= shown_colours(drawn)
        assert CHOSEN in shown_colours(drawn)
        plain = heat_map(self.VALUES, ["cat", "dog"], ["1", "2", "3"], [-1, -1, -1])
        assert CHOSEN not in shown_colours(plain)

    def test_a_tensor_of_half_precision_and_odd_names(self, drawn_text):
        heat_map(torch.ones(2, 1, dtype=torch.bfloat16), ["猫", "long " * 50], [""])
        assert drawn_text[:2] == ["1", "row 1"] and drawn_text[2].endswith("…")
        for values in ([[math.nan]], [[-2.0, -2.0]]):
            assert heat_map(values, ["a"], ["1", "2"][: len(values[0])]).mode == "RGB"

    @pytest.mark.parametrize(
        "change",
        [{"values": [[1.0]]}, {"rows": ["a"]}, {"columns": []}, {"chosen": [0]}, {"row_colours": palette(3)}],
    )
    def test_what_does_not_fit_is_refused(self, change):
        arguments = {"values": self.VALUES, "rows": ["a", "b"], "columns": ["1", "2", "3"]} | change
        with pytest.raises(ValueError, match="expected"):
            heat_map(**arguments)


class TestSideBySide:
    def test_images_keep_their_pixels_and_order(self):
        red, blue = plain_image(10, 20, (255, 0, 0)), plain_image(30, 10, (0, 0, 255))
        row = side_by_side([red, blue])
        assert row.height == 20
        assert row.getpixel((0, 0)) == (255, 0, 0) and row.getpixel((row.width - 1, 0)) == (0, 0, 255)
        assert row.getpixel((row.width - 1, 19)) == (255, 255, 255)

    def test_titles_stand_above(self, drawn_text):
        row = side_by_side([plain_image(100, 50), plain_image(100, 50)], ["photo", "猫"])
        assert drawn_text == ["photo", "image 2"]
        assert row.height > 50 and row.getpixel((0, row.height - 1)) == GREY

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match="1 images, got 2"):
            side_by_side([plain_image(5, 5)], ["a", "b"])
        with pytest.raises(ValueError, match="got none"):
            side_by_side([])
