"""Runs of many pictures: however one ends, the same command continues, and every picture exists exactly once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hydrarun.cli import main
from hydrarun.core.errors import RunError, UsageError, WriteError
from hydrarun.engine.ranks import launch, local_group
from hydrarun.engine.runs import batch, batch_worker
from hydrarun.engine.runs.batch_ledger import BatchLedger
from hydrarun.outputs import writer
from hydrarun.outputs.media import png
from hydrarun.outputs.provenance import hash_config
from tests.helpers import ranks, tiny
from tests.helpers.batch_runs import compose_lines, failing, prompts, read_record

BARE = "output.metadata=false"  # files of equal pixels are then equal: recipes contain times


@pytest.fixture(autouse=True)
def let_go():
    """Free the loaded model after each test; runs within one test share it."""
    yield
    launch.close_executor()


@pytest.fixture
def config(tiny_folder, tmp_path):
    """Composes the configuration of a run of these lines."""
    return partial(compose_lines, tiny_folder, tmp_path)


def files(folder: Path) -> dict[str, str]:
    """Return the hashes of the pictures of a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("[0-9]*")}


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_pictures_are_those_of_single_runs_and_so_are_their_recipes(config, tiny_folder, tmp_path):
    rows = [{"prompt": "a cat", "seed": 4}, {"prompt": "two dogs, “asleep”", "seed": 5, "width": 32}]
    made = launch.run_configuration(config(*rows), tmp_path / "many")
    assert (made["status"], len(made["batches"]), made["failed"]) == ("complete", 2, [])
    assert [(output["index"], output["line"], output["batch"]) for output in made["outputs"]] == [(0, 1, 0), (1, 2, 1)]
    for output, row in zip(made["outputs"], rows, strict=True):
        words = [f"sampling.{key}={value}" for key, value in row.items()]
        alone = launch.run_configuration(
            tiny.config(tiny_folder, *words, "sampling.num_images_per_prompt=1"), tmp_path / "one"
        )
        (single,) = alone["outputs"]
        assert output["pixels_sha256"] == single["pixels_sha256"]
        assert output["path"].rpartition("-")[2] == single["path"].rpartition("-")[2]
        recipe = png.read_png(tmp_path / "many" / output["path"])[1]
        assert hash_config(recipe["config"]) == recipe["config_hash"]
        assert output["path"].endswith(f"-{recipe['config_hash']}.png")


def test_a_batch_equals_singles_and_names_do_not_know_of_it(config, tmp_path):
    rows = [*prompts("a", "bb", "ccc"), {"prompt": "d", "height": 32}]
    singly = launch.run_configuration(config(*rows), tmp_path / "singly")
    together = launch.run_configuration(config(*rows, words=("batch_size=2",)), tmp_path / "together")
    assert [one["outputs"] for one in together["batches"]] == [[0, 1], [2], [3]]
    for one, other in zip(singly["outputs"], together["outputs"], strict=True):
        assert one["path"] == other["path"]
        pixels = [png.read_png(tmp_path / folder / one["path"])[0].astype(int) for folder in ("singly", "together")]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1  # of 255: matrices of other shapes are summed in another order


def test_times_are_sums_and_steps_one_after_the_other(config, tmp_path):
    made = launch.run_configuration(config(*prompts("a", "b", "c")), tmp_path)
    every = [one["timings"] for one in made["batches"]]
    total = made["timings"]
    assert total["steps_s"] == [step for one in every for step in one["steps_s"]]
    assert total["denoise_s"] == pytest.approx(sum(one["denoise_s"] for one in every))
    assert total["total_s"] == pytest.approx(total["load_s"] + sum(one["total_s"] for one in every))
    assert total["read_bytes"] > 0
    assert made["cache"]["blocks"]["all"] == sum(one["cache"]["blocks"]["all"] for one in made["batches"])
    assert made["memory"]["peak_host_bytes"] >= max(one["memory"]["peak_host_bytes"] for one in made["batches"])


def test_quality_is_that_of_all_pictures(config, tmp_path):
    words = ("cache=every_n", "sampling.num_inference_steps=6", "report.metrics=[psnr,ssim]")
    words = (*words, "report.noise_floor=[repeat]", f"report.twins={tmp_path / 'twins'}")
    made = launch.run_configuration(config(*prompts("a", "b", "c"), words=(*words, "batch_size=2")), tmp_path / "run")
    each = [output["quality"]["psnr"] for output in made["outputs"]]
    assert len(set(each)) == 3
    assert made["quality"]["psnr"]["mean"] == pytest.approx(np.mean(each))
    assert made["quality"]["psnr"]["worst"] == min(each) < 60
    assert made["quality"]["noise_floor"]["repeat"]["psnr"]["worst"] == 100  # the cap: the same pixels again
    assert {"psnr", "ssim", "twin", "noise_floor"} == set(made["batches"][0]["quality"])


def test_two_ranks_share_batches_of_which_the_last_is_too_small(config, tmp_path, monkeypatch):
    rows = prompts("a", "bb", "fails on rank 1", "ccc", "dddd")
    singly = launch.run_configuration(config(*rows), tmp_path / "singly")
    monkeypatch.setattr(local_group, "WORKER", "tests.helpers.stumbling_rank")
    with pytest.raises(RunError, match="2 of 5 failed; the first: stumbled"):
        launch.run_configuration(config(*rows, words=("parallel=data2",)), tmp_path / "shared")
    made = read_record(tmp_path / "shared")
    assert [one["outputs"] for one in made["batches"]] == [[0, 1], [4]]
    assert [one["index"] for one in made["failed"]] == [2, 3]
    for output in made["outputs"]:
        (alone,) = [one for one in singly["outputs"] if one["index"] == output["index"]]
        paths = (tmp_path / "singly" / alone["path"], tmp_path / "shared" / output["path"])
        one, other = (png.read_png(path)[0].astype(int) for path in paths)
        assert np.abs(one - other).max() <= 1  # of 255: ranks have other numbers of threads


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_failure_is_kept_the_others_go_on_and_the_same_command_tries_again(config, tmp_path, monkeypatch, capsys):
    rows = prompts("a", "bad", "c", "worse", "e")
    drawn = failing(monkeypatch, {"bad": [RunError("NaN")], "worse": [ZeroDivisionError("unforeseen")]})
    with pytest.raises(RunError, match="2 of 5 failed; the first: NaN\nRun the same command again to retry them"):
        launch.run_configuration(config(*rows), tmp_path)
    assert drawn == ["a", "bad", "c", "worse", "e"]
    made = read_record(tmp_path)
    assert made["status"] == "failed"
    assert [output["index"] for output in made["outputs"]] == [0, 2, 4]
    assert [(one["index"], one["error"]["type"], one["error"]["message"]) for one in made["failed"]] == [
        (1, "RunError", "NaN"),
        (3, "ZeroDivisionError", "unforeseen"),
    ]
    assert "Traceback" in capsys.readouterr().err  # of the unexpected error

    drawn.clear()
    assert launch.run_configuration(config(*rows), tmp_path)["status"] == "complete"
    assert drawn == ["bad", "worse"]
    assert "3 of 5 are there and verified, 2 to draw" in capsys.readouterr().err


def test_a_picture_that_cannot_be_one_fails_alone(config, tmp_path, monkeypatch):
    refuse = writer._refuse_constant

    def black(pixels, prompt, seed, facts):
        refuse(np.zeros_like(pixels) if prompt == "black" else pixels, prompt, seed, facts)

    monkeypatch.setattr(writer, "_refuse_constant", black)
    with pytest.raises(RunError, match="1 of 3 failed"):
        launch.run_configuration(config(*prompts("a", "black", "c"), words=("batch_size=3",)), tmp_path)
    made = read_record(tmp_path)
    assert [output["index"] for output in made["outputs"]] == [0, 2]
    assert made["failed"][0]["error"]["message"].startswith("the picture for seed 1 ('black') is all black")


def test_a_batch_of_which_nothing_is_drawn_is_one_line_too(config, tmp_path, monkeypatch):
    failing(monkeypatch, {"a": [RunError("NaN")]})
    with pytest.raises(RunError, match="1 of 1 failed; the first: NaN"):
        launch.run_configuration(config(*prompts("a")), tmp_path)


def test_retry_tries_again_after_the_others(config, tmp_path, monkeypatch):
    drawn = failing(monkeypatch, {"b": [RunError("once"), RunError("twice")]})
    assert (
        launch.run_configuration(config(*prompts("a", "b", "c"), words=("retry=2",)), tmp_path)["status"] == "complete"
    )
    assert drawn == ["a", "b", "c", "b", "b"]


def test_fail_fast_ends_at_the_first_failure(config, tmp_path, monkeypatch):
    drawn = failing(monkeypatch, {"b": [RunError("once")]})
    with pytest.raises(RunError, match="2 of 3 failed; the first: once"):
        launch.run_configuration(config(*prompts("a", "b", "c"), words=("fail_fast=true", "retry=3")), tmp_path)
    assert drawn == ["a", "b"]
    assert [one["error"] and one["error"]["message"] for one in read_record(tmp_path)["failed"]] == ["once", None]


def test_what_would_fail_for_every_picture_is_not_tried_with_each(config, tmp_path, monkeypatch):
    drawn = failing(monkeypatch, {"a": [UsageError("use another cache")]})
    with pytest.raises(UsageError, match="line 1 of input.prompts: use another cache"):
        launch.run_configuration(config(*prompts("a", "b")), tmp_path)
    assert drawn == ["a"]
    monkeypatch.setattr(batch_worker, "draw_batches", lambda *_: 1 / 0)  # as with damaged weights: no batch starts
    with pytest.raises(ZeroDivisionError):
        launch.run_configuration(config(*prompts("a", "b")), tmp_path)


def test_ctrl_c_leaves_a_run_json_of_what_is_there(config, tmp_path, monkeypatch):
    failing(monkeypatch, {"b": [KeyboardInterrupt()]})
    with pytest.raises(KeyboardInterrupt):
        launch.run_configuration(config(*prompts("a", "b", "c")), tmp_path)
    made = read_record(tmp_path)
    assert (made["status"], made["error"]["type"], len(made["outputs"])) == ("interrupted", "KeyboardInterrupt", 1)


def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(config, tmp_path, monkeypatch):
    """Neither the other pictures nor retries are tried. What is there stays, and run.json lists it."""
    write, tried = writer.write_atomically, []

    def fill(path, data):
        if path.suffix == ".png":
            tried.append(path.name)
            if len(tried) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    rows = prompts("a", "b", "c")
    monkeypatch.setattr(writer, "write_atomically", fill)
    with pytest.raises(WriteError) as raised:
        launch.run_configuration(config(*rows, words=("retry=2",)), tmp_path)
    assert len(tried) == 2
    assert str(raised.value) == (
        f"{tmp_path}: cannot write {tried[1]}: No space left on device; 1 of 3 are saved. Run the same command again to"
        f" draw the others: {tmp_path}"
    )
    made = read_record(tmp_path)
    assert (made["status"], len(made["outputs"])) == ("failed", 1)
    again = launch.run_configuration(config(*rows, words=("retry=2",)), tmp_path)
    assert (again["status"], len(again["outputs"])) == ("complete", 3)


def test_a_folder_that_is_removed_while_the_batch_runs(config, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    finished = batch_worker.make_pictures

    def remove(state):
        if state.prompts == ["b"]:
            shutil.rmtree(folder)
        return finished(state)

    monkeypatch.setattr(batch_worker, "make_pictures", remove)
    with pytest.raises(WriteError) as raised:
        launch.run_configuration(config(*prompts("a", "b", "c")), folder)
    assert str(raised.value).startswith(f"{folder}: cannot write ")
    assert "the folder was removed while the run wrote into it; 0 of 3 are saved." in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "row",
    [
        {"done": {}},
        {"done": 5},
        {"done": {"path": "../../a.png", "index": 0, "pixels_sha256": ""}},
        {"drawing": []},
        {"drawing": ["a"]},
        {"failed": {"indices": [0], "error": "no"}},
        {"drawn": {"outputs": [0], "timings": {}, "memory": {}, "cache": {}, "inputs": []}},
        {"begun": {"facts": {}, "timings": {"load_s": "soon"}, "memory": {}}},
        {"another": {}},
        {},
        {"done": {}, "failed": {}},
    ],
    ids=str,
)
def test_a_valid_line_that_is_no_row_is_damage(config, tmp_path, row):
    asked = config(*prompts("a"))
    BatchLedger(tmp_path, asked).ledger.add(row)
    with pytest.raises(UsageError, match=r"ledger\.jsonl: line 2 is damaged; delete the file, or choose another"):
        launch.run_configuration(asked, tmp_path)


# --- continuing -----------------------------------------------------------------------------------------------------


def test_nothing_is_loaded_when_everything_is_there(config, tmp_path, monkeypatch):
    rows = prompts("a", "b")
    first = launch.run_configuration(config(*rows), tmp_path)
    launch.close_executor()
    monkeypatch.setattr(launch, "find_executor", lambda config: pytest.fail("a place to run in was asked for"))
    again = launch.run_configuration(config(*rows), tmp_path)
    assert {**again, "created": ""} == {**first, "created": ""}


def test_what_is_gone_or_changed_is_drawn_again_with_its_batch_and_the_same_bytes(
    config, tmp_path, monkeypatch, capsys
):
    rows, words = prompts("a", "b", "c", "d"), ("batch_size=2", BARE)
    launch.run_configuration(config(*rows, words=words), tmp_path)
    whole = files(tmp_path)
    first, second, third, _ = sorted(whole)
    (tmp_path / first).unlink()
    (tmp_path / third).write_bytes((tmp_path / third).read_bytes()[:-1] + b"x")
    drawn, untouched = failing(monkeypatch, {}), (tmp_path / second).stat().st_mtime_ns
    launch.run_configuration(config(*rows, words=words), tmp_path)
    assert drawn == ["a", "b", "c", "d"]
    assert files(tmp_path) == whole
    assert (tmp_path / second).stat().st_mtime_ns == untouched
    assert f"drawn again, because the file is missing or changed: {first}, {third}" in capsys.readouterr().err


def test_what_took_a_process_down_with_it_is_tried_last(config, tmp_path, monkeypatch):
    asked = config(*prompts("a", "b", "c"))
    BatchLedger(tmp_path, asked).add_row("drawing", [0])  # and no other row
    drawn = failing(monkeypatch, {})
    launch.run_configuration(asked, tmp_path)
    assert drawn == ["b", "c", "a"]


def test_new_lines_are_drawn_and_old_ones_are_there(config, tmp_path, monkeypatch):
    launch.run_configuration(config(*prompts("a", "b")), tmp_path)
    drawn = failing(monkeypatch, {})
    made = launch.run_configuration(config(*prompts("a", "b", "c"), words=("batch_size=1",)), tmp_path)
    assert drawn == ["c"]
    assert [output["index"] for output in made["outputs"]] == [0, 1, 2]


def test_a_folder_of_other_settings_is_refused(config, tmp_path):
    launch.run_configuration(config(*prompts("a")), tmp_path)
    with pytest.raises(UsageError, match=r"ledger.jsonl: its pictures are of another configuration .*hydra.run.dir"):
        launch.run_configuration(config(*prompts("a"), words=("sampling.num_inference_steps=3",)), tmp_path)


def test_only_what_a_run_had_half_written_is_cleared_away(tmp_path):
    ours = {".0003-a-cat-7-0123abcd.png.99.tmp", ".0012-a-cat-7-0123abcd.x1y2.tmp", ".run.json.99.tmp"}
    theirs = {".mine.tmp", ".bashrc", "0003-a-cat-7-0123abcd.png", ".0003.tmp"}
    for name in ours | theirs:
        (tmp_path / name).touch()
    (tmp_path / ".0004-a-cat-7-0123abcd.z9.tmp" / "new").mkdir(parents=True)
    batch.remove_half_written(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == theirs


def test_the_command_goes_to_the_same_place_again(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my prompts.txt").write_text("a cat, sitting\n# no\na dog\n")
    plain = [word for word in tiny.overrides(tiny_folder) if not word.startswith("sampling.prompt=")]
    words = [*plain, "input.prompts=my prompts.txt"]
    assert main.main(words) == 0
    (place,) = (tmp_path / "outputs").iterdir()
    assert place.name.startswith("my prompts-")
    assert len(files(place)) == 2
    assert main.main(words) == 0
    assert "2 of 2 are there and verified, 0 to draw" in capsys.readouterr().err
    assert main.main([*words, "sampling.num_inference_steps=3", "--fail-fast"]) == 0  # another place
    assert len(list((tmp_path / "outputs").iterdir())) == 2
    assert main.main(["replay", str(place / "run.json"), f"hydra.run.dir={tmp_path / 'again'}"]) == 0
    assert capsys.readouterr().out.count("identical pixels") == 2


# --- kill -9 ---------------------------------------------------------------------------------------------------------

ITEMS = 16


def draw_quietly(config: dict[str, Any], folder: Path) -> None:
    """Run in a process that is killed."""
    torch.set_num_threads(1)  # as in this process: the order of sums depends on the number of threads
    with Path(os.devnull).open("w") as null, contextlib.redirect_stderr(null):
        launch.run_configuration(config, folder)


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(config, tmp_path):
    rows = [{"prompt": f"{number} cats", "seed": number, "height": 16 + 16 * (number % 2)} for number in range(ITEMS)]
    asked = config(*rows, words=("batch_size=2", BARE, "sampling.num_inference_steps=2"))
    launch.run_configuration(asked, tmp_path / "unbroken")
    whole, folder = files(tmp_path / "unbroken"), tmp_path / "broken"
    context, moments = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(ranks.PRELOAD)
    ledger, kills = folder / "ledger.jsonl", 0
    while True:
        process = context.Process(target=draw_quietly, args=(asked, folder))
        process.start()
        target = lines(ledger) + moments.randrange(8) * (kills > 0)  # the first kill comes before any row
        while process.is_alive() and lines(ledger) < target:
            process.join(0.001)
        process.join(moments.random() * 0.01)  # while loading, drawing, writing a picture or a row
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        if kills % 4 == 0:
            with ledger.open("ab") as file:
                file.write(b'{"done": {"index": 3, "pa')  # as if it was killed in the middle of a row
    assert process.exitcode == 0
    assert kills > 3  # far more on an idle machine
    assert files(folder) == whole
    assert len(whole) == ITEMS
    assert not list(folder.glob(".*.tmp"))
    made = read_record(folder)
    assert (made["status"], [output["index"] for output in made["outputs"]]) == ("complete", list(range(ITEMS)))
    done = [row["path"] for row in BatchLedger(folder, asked).select_rows("done")]
    assert set(done) == set(whole)
    shutil.rmtree(folder)
