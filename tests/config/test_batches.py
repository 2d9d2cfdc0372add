"""Batch runs: their items, the grouping into batches, and the errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from hydrarun.config import batches
from hydrarun.config.compose import compose_config
from hydrarun.core.errors import UsageError


@pytest.fixture
def file(tmp_path):
    """Writes a file of JSON lines; returns its path as an override."""

    def write(*rows: dict) -> str:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"input.prompts={path}"

    return write


def complaint(*overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        compose_config(overrides)
    return str(caught.value)


def test_items_are_all_pictures_of_all_lines_in_order(file):
    rows = [{"prompt": "a"}, {"prompt": "b", "seed": 9, "num_images_per_prompt": 1, "height": 64}]
    config = compose_config([file(*rows), "sampling.num_images_per_prompt=2", "sampling.seed=5"])
    items = batches.list_items(config)
    said = [(i.index, i.line, *(i.sampling[key] for key in ("prompt", "seed", "height"))) for i in items]
    assert said == [(0, 1, "a", 5, 128), (1, 1, "a", 6, 128), (2, 2, "b", 9, 64)]
    assert {item.sampling["num_images_per_prompt"] for item in items} == {1}
    assert {item.sampling["negative_prompt"] for item in items} == {" "}  # the model's default


def test_items_of_the_command_line_are_those_of_one_batch():
    words = ['sampling.prompt=["a", "b"]', "sampling.seed=[1, 2, 3, 4]", "batch_size=3"]
    items = batches.list_items(compose_config(words))
    assert [(i.sampling["prompt"], i.sampling["seed"]) for i in items] == [("a", 1), ("a", 2), ("b", 3), ("b", 4)]
    assert [[i.index for i in batch] for batch in batches.group_batches(items, 3)] == [[0, 1, 2], [3]]


def test_only_what_differs_in_texts_and_seed_alone_is_drawn_together(file):
    rows = [
        {"prompt": "a"},
        {"prompt": "b", "height": 64},
        {"prompt": "c", "seed": 4, "negative_prompt": "d"},
        {"prompt": "e", "num_inference_steps": 3},
        {"prompt": "f", "negative_prompt": None, "true_cfg_scale": 1.0},
        {"prompt": "g", "height": 64},
        {"prompt": "h"},
    ]
    config = compose_config([file(*rows), "batch_size=2"])
    together = batches.group_batches(batches.list_items(config), batches.max_batch_size(config))
    assert [[item.index for item in batch] for batch in together] == [[0, 2], [1, 5], [3], [4], [6]]
    first = batches.derive_batch_config(config, together[0])["sampling"]
    assert (first["prompt"], first["negative_prompt"], first["seed"]) == (["a", "c"], [" ", "d"], [0, 4])


def test_by_itself_a_file_is_drawn_one_by_one_or_one_by_each_rank(file):
    assert batches.max_batch_size(compose_config([file({"prompt": "a"})])) == 1
    assert batches.max_batch_size(compose_config([file({"prompt": "a"}), "parallel=data2"])) == 2


@pytest.mark.parametrize(
    "sampling",
    [
        {"prompt": "a", "seed": 1, "num_images_per_prompt": None},
        {"prompt": "a", "seed": 1, "num_images_per_prompt": 3},
        {"prompt": ["a", "b"], "seed": 1, "num_images_per_prompt": 3},
        {"prompt": ["a", "b"], "seed": [1, 2, 3, 4], "num_images_per_prompt": None},
        {"prompt": ["a", "b"], "seed": [1, 2, 3, 4], "num_images_per_prompt": 2},
    ],
)
def test_pictures_are_counted_without_listing_them(sampling):
    assert batches.count_pictures(sampling) == len(batches.expand_prompts({"negative_prompt": None, **sampling}))


def test_items_of_lines_are_counted_without_listing_them(file):
    rows = [{"prompt": "a"}, {"prompt": "b", "num_images_per_prompt": 3}]
    config = compose_config([file(*rows), "sampling.num_images_per_prompt=2"])
    assert batches.count_items(config) == len(batches.list_items(config)) == 5


def test_a_batch_is_a_run_of_its_own(file):
    config = compose_config([file({"prompt": "a", "seed": 3}), "retry=2", "fail_fast=true"])
    alone = batches.derive_batch_config(config, batches.list_items(config))
    plain = compose_config(["sampling.prompt=a", "sampling.seed=3", "sampling.num_images_per_prompt=1"])
    assert alone == plain


def test_a_job_is_the_same_after_its_way_through_json(file, tmp_path):
    for name in ("own.png", "of all.png"):
        Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(tmp_path / name)
    rows = [
        {"prompt": "a"},
        {"prompt": "b", "images": "own.png", "negative_prompt": "c"},
        {"prompt": "d", "true_cfg_scale": 4},
        {"prompt": "e", "true_cfg_scale": 4.0, "seed": 2**40},
    ]
    words = ["model=qwen_image_edit", f"input.images={tmp_path / 'of all.png'}", "sampling.true_cfg_scale=4.0"]
    config = compose_config([*words, file(*rows), "sampling.num_images_per_prompt=1"])
    items = batches.list_items(config)
    pending = [batches.PendingBatch(number, (item,), (item.index,)) for number, item in enumerate(items)]
    job = batches.BatchJob(tmp_path, [*pending[1:], pending[0]], 5)
    text = json.dumps(job.to_json(config))
    back = batches.BatchJob.from_json(json.loads(text), config)
    assert back == job
    as_text = [json.dumps([one.sampling for batch in each.batches for one in batch.items]) for each in (job, back)]
    assert as_text[0] == as_text[1]  # 4 stays 4, and 4.0 stays 4.0: the names of files depend on it


def test_a_job_says_only_what_the_configuration_does_not(file):
    config = compose_config([file({"prompt": "a"}, {"prompt": "b", "height": 64}), "sampling.num_images_per_prompt=1"])
    told = [item.to_json(config) for item in batches.list_items(config)]
    assert told == [
        {"index": 0, "sampling": {"prompt": "a"}, "line": 1},
        {"index": 1, "sampling": {"prompt": "b", "height": 64}, "line": 2},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "height": 0}, "sampling.height (line 2 of input.prompts): 0 is below 1."),
        (
            {"prompt": "a", "num_frames": 5},
            "sampling.num_frames (line 2 of input.prompts): model demo does not take",
        ),
        ({"prompt": "a", "height": 100}, "line 2 of input.prompts: sampling.height=100"),
        ({"prompt": "a", "seed": -1}, "sampling.seed (line 2 of input.prompts): -1 is not a whole number"),
        ({"prompt": "a", "num_frames": 10**12}, "sampling.num_frames (line 2 of input.prompts): model demo"),
        ({"prompt": "a", "width": 10**12}, "sampling.width (line 2 of input.prompts): 1000000000000 is above 16384."),
        (
            {"prompt": "a", "num_images_per_prompt": 10**12},
            "input.prompts (command line): asks for 1000000000001 pictures in one run; 100000 at most.",
        ),
        ({"prompt": "a", "images": "x.png"}, "input.images (line 2 of input.prompts): lists 1 image; model demo takes"),
    ],
)
def test_what_a_line_asks_for_is_checked_with_its_number(file, row, message):
    assert message in complaint(file({"prompt": "fine"}, row))


def test_every_input_image_is_looked_at_before_anything_runs(file, tmp_path):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [{"prompt": "a", "images": name} for name in ("good.png", "bad.png", "none.png")]
    said = complaint("model=qwen_image_edit", file(*rows)).splitlines()
    assert [line.partition(": ")[0] for line in said] == ["line 2 of input.prompts", "line 3 of input.prompts"]
    assert "bad.png" in said[0]
    assert "none.png" in said[1]


def test_rules_of_compatibility_hold_for_every_line(file):
    rows = [{"prompt": "a"}, {"prompt": "b", "true_cfg_scale": 1.0}]
    assert complaint(file(*rows), "parallel=cfg2").startswith("parallel.cfg_degree: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampling.prompt=a"], "sampling.prompt (command line) and input.prompts are both given: leave one out"),
        (["sampling.seed=[1,2]"], "sampling.seed (command line): lists several: with input.prompts give one for all"),
        (["batch_size=0"], "batch_size (command line): 0 is below 1."),
        (["retry=-1"], "retry (command line): -1 is below 0."),
        (["batch_size=1", "parallel=data2"], "there are fewer pictures than ranks to draw them."),
    ],
)
def test_what_does_not_go_with_a_file(file, words, message):
    assert message in complaint(file({"prompt": "a"}), *words)


@pytest.mark.parametrize("word", ["retry=1", "fail_fast=true"])
def test_what_a_single_batch_has_no_use_for(word):
    assert "without input.prompts or batch_size it has no effect" in complaint(word)
