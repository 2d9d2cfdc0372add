import sys
import types

import pytest

from hydrarun.config import targets
from hydrarun.core.errors import UsageError

HOSTILE = [
    "os.system",
    "posix.system",
    "subprocess.run",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "builtins.open",
    "torch.load",
    "torch.hub.load",
    "torch.hub._load_local",
    "numpy.load",
    "urllib.request.urlopen",
    "logging.os.system",
    "pathlib.Path.touch",
    "asyncio.run",
    "functools.partial",
    "setuptools._distutils.spawn.spawn",
    "site.addsitedir",
    "hydra.utils.instantiate",
    # similar to allowed names: prefixes, siblings, extra dots
    "diffusers.DiffusionPipeline",
    "diffusers.QwenImagePipeline.from_pretrained",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage.QwenImagePipeline",
    "hydrarun.models.layers.attention_backends",
    "hydrarun.models.layers.attention_backends.SDPA.__init__",
    "hydrarun.models.layers.attention_backends.torch.load",
    "hydrarun.models.layers.attention_backends.SDPA ",
    "",
    "${oc.env:HOME}",
    None,
    3,
    ["os.system"],
]


@pytest.fixture
def user_classes():
    """Provide a user module with classes to build; clear the user's allow-list afterwards."""

    class Part:
        def __init__(self, size: int, name: str = "x", mode: "int | None" = None, **_: object) -> None:
            self.size, self.name, self.mode = size, name, mode

    class Strict:
        def __init__(self, threshold: float, *, device: object, flag: bool = False) -> None:
            self.threshold, self.device, self.flag = threshold, device, flag

    module = types.ModuleType("user_module")
    for cls in (Part, Strict):
        cls.__module__, cls.__qualname__ = "user_module", cls.__name__
        setattr(module, cls.__name__, cls)
    module.function, module.Renamed = len, dict
    module.Borrowed = type("Borrowed", (), {"__module__": "elsewhere"})
    sys.modules["user_module"] = module
    for name in ("Part", "Strict", "function", "Renamed", "Borrowed", "Absent"):
        targets.allow_target(f"user_module.{name}")
    yield module
    del sys.modules["user_module"]
    targets._allowed_by_user.clear()


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("wrap", [lambda n: {"attention": n}, lambda n: {"model": {"stages": [{"x": {"y": n}}]}}])
def test_only_exact_names_are_allowed(name, wrap):
    with pytest.raises(UsageError, match="not on the list of allowed classes"):
        targets.check_targets(wrap({"_target_": name}))
    with pytest.raises(UsageError, match="not on the list"):
        targets.instantiate({"_target_": name})


@pytest.mark.parametrize("key", ["_partial_", "_args_", "_recursive_", "_convert_", "_call_", "__class__", "_"])
def test_every_other_underscore_key_is_refused(key):
    with pytest.raises(UsageError, match=rf"attention\.{key}: keys with a leading underscore"):
        targets.check_targets({"attention": {"_target_": "hydrarun.models.layers.attention_backends.SDPA", key: True}})


@pytest.mark.parametrize("key", ["trust_remote_code", "custom_pipeline"])
def test_arguments_that_run_a_checkpoints_code_are_refused(key):
    with pytest.raises(UsageError, match=rf"model\.pipeline\.{key}: not allowed"):
        targets.check_targets({"model": {"pipeline": {"_target_": "diffusers.QwenImagePipeline", key: True}}})


def test_all_violations_come_at_once_with_their_origin_and_the_nearest_name():
    config = {
        "attention": {"_target_": "hydrarun.models.layers.attention_backends.SPDA"},
        "compile": {"_target_": "os.system"},
    }
    with pytest.raises(UsageError) as caught:
        targets.check_targets(config, lambda key: f"from {key}")
    first, second = str(caught.value).splitlines()
    assert first.startswith("attention._target_ (from attention._target_)")
    assert "Did you mean 'hydrarun.models.layers.attention_backends.SDPA'?" in first
    assert "--allow-target" in second


def test_what_the_shipped_options_build_is_on_the_list_and_is_what_it_says():
    for name in sorted(targets.list_shipped_targets()):
        cls = targets.load_class({"_target_": name})
        assert cls.__name__ == name.rpartition(".")[2]


def test_a_user_can_allow_a_class_but_not_a_function_or_an_alias(user_classes):
    assert targets.instantiate({"_target_": "user_module.Part", "size": 3}).size == 3
    for name in ("function", "Renamed", "Borrowed"):
        with pytest.raises(UsageError, match="is not a class of the package 'user_module'"):
            targets.load_class({"_target_": f"user_module.{name}"})
    with pytest.raises(UsageError, match="cannot load user_module.Absent"):
        targets.load_class({"_target_": "user_module.Absent"}, "attention")
    with pytest.raises(UsageError, match="not the dotted name of a class"):
        targets.allow_target("not a name")


def test_the_signature_is_the_schema(user_classes):
    node = {"_target_": "user_module.Strict", "threshold": 1}
    built = targets.instantiate(node, "cache", device="cpu")
    assert (built.threshold, built.device, built.flag) == (1, "cpu", False)
    cases = [
        ({"treshold": 1}, r"^cache\.treshold: Strict takes no such argument. Did you mean 'threshold'\? It takes:"),
        ({}, r"^cache: Strict needs threshold; set cache\.threshold="),
        ({"threshold": 1, "device": "cuda"}, r"^cache\.device: Strict takes no such argument"),
        ({"threshold": "high"}, r"^cache\.threshold: 'high' is not a number"),
        ({"threshold": True}, r"^cache\.threshold: true is not a number"),
        ({"threshold": 1, "flag": "yes"}, r"^cache\.flag: 'yes' is not true or false"),
    ]
    for arguments, message in cases:
        with pytest.raises(UsageError, match=message):
            targets.instantiate({"_target_": "user_module.Strict", **arguments}, "cache", device="cpu")


def test_open_signatures_take_what_they_are_given(user_classes):
    built = targets.instantiate({"_target_": "user_module.Part", "size": 1, "anything": 2, "mode": None})
    assert built.mode is None
