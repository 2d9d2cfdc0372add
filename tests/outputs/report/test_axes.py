"""The axes of a sweep, and the layout of the grid."""

from __future__ import annotations

import pytest

from hydrarun.core.errors import RunError, UsageError
from hydrarun.outputs.report import axes
from hydrarun.outputs.report.collect import collect_points
from hydrarun.outputs.report.layout import GridLayout, arrange_grid
from tests.helpers import fake_sweep
from tests.helpers.fake_sweep import picture


def laid_out(folder, reference=None) -> GridLayout:
    return arrange_grid(collect_points(folder), reference)


def cells(layout: GridLayout) -> list[list[str | None]]:
    """Return the names of the points in the grid."""
    names = [point.name for point in layout.points]
    columns = range(len(layout.columns))
    return [[names[row.cells[column][0]] if column in row.cells else None for column in columns] for row in layout.rows]


def labels(layout: GridLayout) -> list[str]:
    return [column.label for column in layout.columns]


def test_caches_are_columns_and_seeds_are_rows(tmp_path):
    layout = laid_out(fake_sweep.grid(tmp_path))
    assert [(axis.key, axis.values, axis.drawn) for axis in layout.axes] == [
        ("cache", ["none", "teacache"], False),
        ("sampling.seed", ["1", "2"], True),
    ]
    assert labels(layout) == ["no cache", "teacache"]
    assert [(row.seed, row.others) for row in layout.rows] == [("1", []), ("2", [])]
    assert cells(layout) == [["0", "2"], ["1", "3"]]
    assert [layout.reference(row, column) for row in layout.rows for column in (0, 1)] == [0, 0, 0, 0]


def test_settings_are_labelled_so_that_each_says_what_it_is(tmp_path):
    for number, words in enumerate(
        (
            ["cache=none", "sampling.num_inference_steps=8", "vae.tiling=true"],
            ["cache=every_n", "sampling.num_inference_steps=24", "vae.tiling=false"],
        )
    ):
        fake_sweep.add(tmp_path, str(number), words, [picture(0)])
    assert labels(laid_out(tmp_path)) == ["no cache, steps 8, tiling true", "every_n, steps 24, tiling false"]
    plain, slow = axes.Axis("cache", [], False, "cache"), axes.Axis("dtype", [], False, "dtype")
    assert axes.format_label([plain, slow], {"cache": "none", "dtype": "auto"}) == "no cache, dtype auto"


def test_two_keys_that_end_alike_are_told_apart(tmp_path):
    fake_sweep.add(tmp_path, "0", ["vae.dtype=float32", "dtype=float32"], [picture(0)])
    fake_sweep.add(tmp_path, "1", ["vae.dtype=bfloat16", "dtype=bfloat16"], [picture(0)])
    assert labels(laid_out(tmp_path)) == ["vae.dtype float32, float32", "vae.dtype bfloat16, bfloat16"]


def test_points_that_are_alike_do_not_hide_each_other(tmp_path):
    for number in range(2):
        fake_sweep.add(tmp_path, str(number), ["cache=none"], [picture(0)])
    assert labels(laid_out(tmp_path)) == ["demo", "demo #2"]


def test_what_the_command_line_left_out_is_read_from_the_configuration(tmp_path):
    fake_sweep.add(tmp_path, "0", [], [picture(0)])
    fake_sweep.add(tmp_path, "1", ["cache=first_block", "sampling.seed=5"], [picture(5)])
    assert {axis.key: axis.values for axis in laid_out(tmp_path).axes} == {
        "cache": ["none", "first_block"],
        "sampling.seed": ["0", "5"],
    }


def test_without_overrides_the_configurations_are_compared(tmp_path):
    for number, words in enumerate((["cache=none"], ["cache=teacache"], ["cache=teacache", "parallel=ulysses2"])):
        folder = fake_sweep.add(tmp_path, str(number), words, [picture(0)])
        (folder / ".hydra" / "overrides.yaml").unlink()
    layout = laid_out(tmp_path)
    assert [(axis.key, axis.values) for axis in layout.axes] == [
        ("cache", ["none", "TeaCache"]),
        ("parallel", ["none", "ulysses 2"]),
    ]
    assert labels(layout) == ["no cache, no parallel", "TeaCache, no parallel", "TeaCache, ulysses 2"]


def test_a_setting_inside_a_cache_is_an_axis_of_its_own(tmp_path):
    for number, threshold in enumerate((0.1, 0.4)):
        words = ["cache=teacache", f"cache.gate.threshold={threshold}"]
        folder = fake_sweep.add(tmp_path, str(number), words, [picture(0)])
        (folder / ".hydra" / "overrides.yaml").write_text("not: a list")
    assert labels(laid_out(tmp_path)) == ["threshold 0.1", "threshold 0.4"]


def test_every_output_of_a_point_has_its_row(tmp_path):
    for number, cache in enumerate(("none", "every_n")):
        fake_sweep.add(tmp_path, str(number), [f"cache={cache}", "sampling.seed=7"], [picture(7), picture(8)])
    layout = laid_out(tmp_path)
    assert [row.seed for row in layout.rows] == ["7", "8"]
    assert cells(layout) == [["0", "1"], ["0", "1"]]


def test_sizes_are_rows_too(tmp_path):
    for number, side in enumerate((64, 96)):
        fake_sweep.add(tmp_path, str(number), [f"sampling.width={side}"], [picture(0)])
    layout = laid_out(tmp_path)
    assert [(row.seed, row.others) for row in layout.rows] == [("0", ["width 64"]), ("0", ["width 96"])]
    assert labels(layout) == ["demo"]


def test_a_point_that_drew_nothing_stands_in_its_row(tmp_path):
    fake_sweep.grid(tmp_path)
    fake_sweep.hydra(tmp_path, "4", ["cache=dbcache", "sampling.seed=1"])
    fake_sweep.add(tmp_path, "5", ["cache=dbcache", "sampling.seed=2"], error=RunError("no"))
    fake_sweep.add(tmp_path, "6", ["cache=none", "sampling.seed=9"], error=RunError("no"))
    layout = laid_out(tmp_path)
    assert cells(layout) == [["0", "2", "4"], ["1", "3", "5"], ["6", None, None]]
    assert layout.rows[2].seed == "9"
    assert layout.rows[2].prompt == fake_sweep.configuration([])["sampling"]["prompt"]
    assert layout.reference(layout.rows[2], 0) is None


def test_the_reference_is_plain_and_the_first(tmp_path):
    for number, words in enumerate(
        (["cache=teacache"], ["quantization=int8"], ["vae.tiling=true"], ["vae.tiling=false"])
    ):
        fake_sweep.add(tmp_path, str(number), words, [picture(0)])
    layout = laid_out(tmp_path)
    assert [layout.reference(layout.rows[0], column) for column in range(4)] == [2, 2, 2, 2]


def test_the_user_chooses_the_reference_by_label_or_point(tmp_path):
    fake_sweep.grid(tmp_path)
    for name in ("teacache", "2", "3"):
        layout = laid_out(tmp_path, name)
        assert [layout.reference(row, column) for row in layout.rows for column in (0, 1)] == [1, 1, 1, 1]
    with pytest.raises(UsageError) as caught:
        laid_out(tmp_path, "teacahe")
    assert str(caught.value) == (
        "report: --reference teacahe: no such setting and no such point. Did you mean 'teacache'?"
        " Settings: no cache; teacache"
    )


def test_other_models_are_not_compared(tmp_path):
    for number, model in enumerate(("demo", "qwen_image")):
        fake_sweep.add(tmp_path, str(number), [f"model={model}", "sampling.prompt=x"], [picture(0)])
    layout = laid_out(tmp_path)
    assert labels(layout) == ["demo", "qwen_image"]
    assert [layout.reference(layout.rows[0], column) for column in (0, 1)] == [0, 1]
