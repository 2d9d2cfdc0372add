"""A built wheel works from any folder when it is installed without access to the checkout."""

import os
import re
import site
import subprocess
import sys
import venv
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

from hydrarun.core.version import __version__
from hydrarun.outputs.media import png
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.full

SHIPPED = ("conf", "recipes", "weights")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (built,) = folder.glob("hydrarun-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of a virtual environment with the wheel; the dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--disable-pip-version-check", wheel], check=True)
    # after the installation, so that pip does not see a hydrarun that is installed here. Nested .pth files are not
    # read, so an editable install of the checkout stays invisible.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "bin"


@pytest.fixture
def run(installed, tmp_path):
    """Run a command of the environment in an empty folder and return its output."""

    def call(command: str, *arguments: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [installed / command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


@pytest.mark.parametrize("folder", SHIPPED)
def test_every_shipped_file_is_in_the_wheel(wheel, folder):
    files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    sizes = {entry.filename: entry.file_size for entry in zipfile.ZipFile(wheel).infolist()}
    assert files
    for file in files:
        assert sizes[f"hydrarun/{file.relative_to(ROOT).as_posix()}"] == file.stat().st_size


def test_the_package_s_own_data_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    found = (path for kind in ("yaml", "html", "css", "js") for path in (ROOT / "hydrarun").rglob(f"*.{kind}"))
    files = [path.relative_to(ROOT).as_posix() for path in found]
    assert "hydrarun/engine/plan/devices.yaml" in files
    assert "hydrarun/models/shapes/qwen_image.yaml" in files
    assert "hydrarun/outputs/report/page.js" in files
    assert set(files) <= set(names)


def test_the_wheel_holds_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith(("hydrarun/", "hydrarun-")) for name in names)
    assert not [name for name in names if name.endswith(".pyc")]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_what_an_extra_brings_is_not_among_the_dependencies(wheel):
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = BytesParser().parsebytes(files.read(name))
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = {re.match(r"[\w-]+", line)[0].lower() for line in required}
    assert {"torch", "imageio", "av", "accelerate", "scikit-image"} <= names
    assert not names & {"matplotlib", "torchsde", "flash-attn", "torchao"}
    assert {"audio", "flash", "quantization"} <= {*metadata.get_all("Provides-Extra")}
    assert metadata["Version"] == __version__


def test_the_checkout_is_not_what_runs(run, installed):
    found = run("python", "-c", "import hydrarun; print(hydrarun.__file__)")
    assert Path(found.strip()).is_relative_to(installed.parent)


def test_the_command_knows_its_configuration(run):
    assert "name: demo" in run("hydrarun", "--cfg", "job")
    listed = run("hydrarun", "list")
    assert "qwen_image" in listed
    assert "demo/quick" in listed


def test_the_command_draws(run, tmp_path):
    run("hydrarun", "sampling.num_inference_steps=2", "hydra.run.dir=here")
    (picture,) = (tmp_path / "here").glob("*.png")
    pixels, record = png.read_png(picture)
    assert pixels.shape == (128, 128, 3)
    assert record["weights"]["path"] == "package:demo"
