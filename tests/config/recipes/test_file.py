"""Files and metadata of recipes: a recipe names only files in its own folder, and evidence is not written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from hydrarun.cli import main
from hydrarun.config.compose import compose_config
from hydrarun.config.recipes import catalogue, file, search
from hydrarun.config.recipes.metadata import CHANGED, FORMAT, Evidence, compute_digest
from hydrarun.config.recipes.yaml_loader import parse_sections
from hydrarun.core.errors import UsageError
from hydrarun.core.strict_yaml import dump_yaml

EVIDENCE = f"format: {FORMAT}, status: verified, digest: ''"

# name: (content, part of the error message). The recipe's folder holds in.png, out.png (a link to a file above), linked
# (a link to the folder above), weights/ (with a link out of the folder) and lines.jsonl (with a path out of it)
ELSEWHERE = {
    "an image above": ("input: {images: ../secret.png}", "input.images: '../secret.png' climbs by '..'"),
    "an image by a detour": ("input: {images: [in.png, a/../../secret.png]}", "climbs by '..'"),
    "an absolute path": ("input: {images: [/etc/passwd]}", "input.images: '/etc/passwd' is an absolute path"),
    "a home folder": ("input: {images: ~/.ssh/id}", "'~/.ssh/id' is in a home folder"),
    "another's home": ("input: {images: ~root/x.png}", "'~root/x.png' is in a home folder"),
    "a link": ("input: {images: out.png}", "'out.png' is a link that leaves the recipe's folder"),
    "through a link": ("input: {images: linked/secret.png}", "'linked/secret.png' is a link that leaves"),
    "prompts": ("input: {prompts: ../prompts.txt}", "input.prompts: '../prompts.txt' climbs"),
    "prompts whose images lie above": ("input: {prompts: lines.jsonl}", "lines.jsonl line 2: "),
    "prompts by a table": ("input: {prompts: [{prompt: x, images: /etc/x.png}]}", "input.prompts: is not the path of"),
    "weights above": ("model: {path: ../weights}", "model.path: '../weights' climbs by '..'"),
    "weights that look like the hub's": ("model: {path: ../x}", "climbs by '..'"),
    "weights by an absolute path": ("model: {path: /data/x}", "model.path: '/data/x' is an absolute path"),
    "weights in a home folder": ("model: {path: ~/x}", "model.path: '~/x' is in a home folder"),
    "weights by a link": ("model: {path: linked}", "model.path: 'linked' is a link that leaves"),
    "weights with a link inside": ("model: {path: weights}", "model.path: 'weights/vae' is a link that leaves"),
    "the hub's, and a folder here": ("model: {path: someone/else}", "a folder of that name is here"),
    "control characters": ('input: {images: "a\\e[2J.png"}', "holds control characters"),
    "control characters in a name": ('model: {name: "\\e[2J"}', "model.name: '\\x1b[2J' holds control characters"),
    "control characters in a line": ("input: {prompts: odd.jsonl}", "odd.jsonl line 1: ?[2J: unknown field"),
    "control characters in weights": ('model: {path: "package:\\e[2J"}', "holds control characters"),
}  # fmt: skip

METADATA = {
    "about without a description": ("about: {author: me}", "about.description: is missing."),
    "about with another key": ("about: {descripton: x}", "about.descripton: unknown key. Did you mean 'description'?"),
    "about with a number": ("about: {description: 5}", "about.description: 5 is not text."),
    "about as text": ("about: quick", "about: is not a mapping."),
    "a status typed by hand": ("evidence: {status: verified}", "evidence is not typed by hand, `hydrarun recipe"),
    "a status that is none": (f"evidence: {{{EVIDENCE.replace('verified', 'perfect')}}}", "'perfect' is not one of"),
    "another format": (f"evidence: {{{EVIDENCE.replace('1', '2')}}}", "evidence.format: 2; this version"),
    "evidence with another key": (f"evidence: {{{EVIDENCE}, measurd: 1}}", "Did you mean 'measured'?"),
    "half a measurement": (f"evidence: {{{EVIDENCE}, measured: {{date: x}}}}", "evidence.measured.config_hash: is mis"),
    "evidence with mixed keys": (
        f"evidence: {{{EVIDENCE}, verified: {{date: x, hardware: {{a: x, 2: y}}, versions: {{}}, outputs: [], "
        "found: []}}",
        "evidence: holds something that is not a plain value",
    ),
    "an output that is none": (
        f"evidence: {{{EVIDENCE}, verified: {{date: x, hardware: {{}}, versions: {{}}, outputs: [5], found: []}}}}",
        "evidence.verified.outputs[0]: is not a mapping",
    ),
    "code in about": ("about: {description: x, _target_: os.system}", "about._target_: unknown key."),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Change into a new folder; return its folder `received/` for the recipe, with the files that `ELSEWHERE` uses."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "received"
    (own / "weights").mkdir(parents=True)
    (tmp_path / "someone" / "else").mkdir(parents=True)
    for name in ("secret.png", "received/in.png"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    (own / "out.png").symlink_to("../secret.png")
    (own / "odd.jsonl").write_text('{"\\u001b[2J": 1}\n{"prompt": 5}\n')
    (own / "lines.jsonl").write_text(
        '{"prompt": "a", "images": "in.png"}\n{"prompt": "a", "images": "../secret.png"}\n'
    )
    (own / "linked").symlink_to("..")
    (own / "weights" / "vae").symlink_to("/etc")
    return own


def write(folder: Path, content: str) -> str:
    (folder / "r.yaml").write_text(content, encoding="utf-8")
    return "recipe=received/r.yaml"


@pytest.mark.parametrize("name", [*ELSEWHERE, *METADATA])
def test_it_is_refused_in_one_line_that_says_why(name, folder, capsys):
    content, words = {**ELSEWHERE, **METADATA}[name]
    override = write(folder, content)
    for argv in ([override], ["recipe", "run", "received/r.yaml", "--yes"], ["recipe", "verify", "received/r.yaml"]):
        assert main.main(argv) == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) == 1
        assert "\x1b" not in error
    assert not (folder.parent / "outputs").exists()


def test_what_it_names_is_taken_from_its_own_folder(folder):
    """Not from the current folder."""
    override = write(folder, "defaults: [override /model: qwen_image_edit]\ninput: {images: [./in.png]}\n")
    given = compose_config([override, "sampling.prompt=x"])["input"]["images"]
    assert given == [str(folder / "in.png")]
    with pytest.raises(UsageError, match=f"input.images: {folder}/absent.png: no such file"):
        compose_config(
            [
                write(folder, "defaults: [override /model: qwen_image_edit]\ninput: {images: absent.png}\n"),
                "sampling.prompt=x",
            ]
        )


def test_weights_are_the_hubs_the_packages_or_a_folder_beside_it(folder, tiny_folder):
    for path in ("Qwen/Qwen-Image", "package:demo"):
        assert (
            compose_config([write(folder, f"model: {{path: {path!r}}}"), "sampling.height=64"])["model"]["path"] == path
        )
    (folder / "mine").symlink_to("weights2")
    (folder / "weights2").mkdir()
    for file_ in tiny_folder.rglob("*.json"):
        copy = folder / "weights2" / file_.relative_to(tiny_folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file_.read_bytes())
    for path in ("weights2", "./weights2", "mine"):  # a link that stays inside
        size = "sampling: {prompt: x, width: 64, height: 64}"
        content = f"defaults: [override /model: qwen_image]\nmodel: {{path: {path}}}\n{size}"
        assert Path(compose_config([write(folder, content)])["model"]["path"]).resolve() == folder / "weights2"


def test_a_folder_whose_name_looks_like_an_interpolation(tmp_path):
    own = tmp_path / "${oc.env:HOME}"
    own.mkdir()
    Image.new("RGB", (64, 64), "red").save(own / "in.png")
    (own / "r.yaml").write_text("defaults: [override /model: qwen_image_edit]\ninput: {images: in.png}\n")
    assert search.read_recipe(own / "r.yaml", "r").content["input"]["images"] == str(own / "in.png").replace("$", "\\$")


def test_neither_about_nor_evidence_reaches_the_configuration(folder):
    text = f"about: {{description: x}}\nsampling: {{seed: 4}}\nevidence: {{{EVIDENCE}}}\n"
    assert compose_config([write(folder, text)]) == compose_config(["sampling.seed=4"])


def test_a_status_counts_while_the_digest_fits(folder):
    """The digest reveals accidental changes. It does not prevent forgery: only running `verify` again detects that."""
    write(folder, "# mine\nsampling: {seed: 4}\n")
    recipe = search.load_recipe("received/r.yaml")
    assert recipe.status == "unverified"
    file.write_evidence(recipe, Evidence(FORMAT, "verified", ""))
    text = (folder / "r.yaml").read_text()
    assert search.load_recipe("received/r.yaml").status == "verified"
    for old, new in (
        ("seed: 4", "seed: 5"),
        ("status: verified", "status: broken"),
        ("seed: 4}", "seed: 4}\ndevice: cpu"),
    ):
        (folder / "r.yaml").write_text(text.replace(old, new))
        assert search.load_recipe("received/r.yaml").status == CHANGED
    (folder / "r.yaml").write_text("about: {description: better words}\n" + text.replace("# mine", "# yours"))
    assert search.load_recipe("received/r.yaml").status == "verified"


def test_what_a_stranger_wrote_cannot_rewrite_the_terminal(folder, capsys, monkeypatch):
    monkeypatch.setattr("hydrarun.cli.commands.run.run_overrides", lambda overrides, flags: 0)
    write(folder, 'about: {description: "a\\e[2Jb", author: "c\\rd"}\nsampling: {prompt: "e\\e[2Jf"}\n')
    assert main.main(["recipe", "run", "received/r.yaml", "--yes"]) == 0
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert "a?[2Jb" in shown
    write(folder, "about: {description: 'two\n\n  lines'}\n")
    assert main.main(["recipe", "run", "received/r.yaml", "--yes"]) == 0
    assert capsys.readouterr().err.splitlines()[0].endswith("r.yaml: two lines")
    entry = catalogue.CatalogueEntry("x", "unverified", description="a\x1b[2J")
    assert entry.cells()[1] == "a?[2J"


def test_the_digest_is_of_all_but_about_and_itself():
    content = {"sampling": {"seed": 1}, "evidence": {"status": "verified", "digest": "x"}}
    same = {"about": {"description": "y"}, "evidence": {"digest": "z", "status": "verified"}, "sampling": {"seed": 1}}
    assert compute_digest(content) == compute_digest(same)
    assert compute_digest(content) != compute_digest(json.loads(json.dumps(content).replace("1", "2")))


# --- rewriting -------------------------------------------------------------------------------------------------------

TEXTS = {
    "none yet": ("sampling: {seed: 1}\n", "sampling: {seed: 1}\n\n", ""),
    "no line end": ("sampling: {seed: 1}", "sampling: {seed: 1}\n\n", ""),
    "empty": ("", "", ""),
    "at the end": ("sampling: {seed: 1}  # why\n\nevidence:\n  old: 1\n", "sampling: {seed: 1}  # why\n\n", ""),
    "between": ("a: 1\nevidence:\n  old:\n  - 1\n\n# of b\nb: 2\n", "a: 1\n", "\n# of b\nb: 2\n"),
    "first": ("evidence: {old: [1,\n  2]} # x\nb: 2\n", "", " # x\nb: 2\n"),
    "windows": ("a: 1 # ü\r\nevidence:\r\n  old: 1\r\nb: 2\r\n", "a: 1 # ü\r\n", "b: 2\r\n"),
    "with its mark": (f"a: 1\n{file.MARK}\nevidence:\n  old: 1\n", "a: 1\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_all_but_the_evidence_is_left_byte_for_byte(name, tmp_path):
    text, before, after = TEXTS[name]
    recipe = file.Recipe(tmp_path / "r.yaml", *parse_sections(text.encode()), {}, None, None)
    evidence = Evidence(FORMAT, "unverified", "")
    assert (
        file.replace_evidence(recipe, evidence)
        == before + file.format_evidence(file.sign_evidence(recipe, evidence)) + after
    )


def test_texts_that_look_like_numbers_stay_texts(tmp_path):
    for text in ("1e3", "2020-01-01", "0x1F", "yes", "null", "1_000", "a: b", "ü\n b", "\x1b", "- x", "# y", ".5e3"):
        assert parse_sections(dump_yaml({"sampling": {"prompt": text}}).encode())[1] == {"sampling": {"prompt": text}}
