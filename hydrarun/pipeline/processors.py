"""Loads processors, which turn a prompt with pictures into a text encoder's input, without torchvision.

PyPI's torchvision is linked against CUDA and cannot be imported with a CPU build of torch.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from hydrarun.core.errors import RunError

#: files with the image processor's settings: as published, and as saved by transformers 5
SETTINGS_FILES = ("preprocessor_config.json", "processor_config.json")


def load_processor(cls: type, folder: Path) -> Any:
    """Load transformers' processor `cls` from its folder, as published or as saved by transformers 5.

    Pillow resizes the pictures, whether torchvision is installed or not, so that the same input gives the same numbers
    everywhere. Raises `RunError` naming the folder if its files are missing or belong to another model.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    if not any((folder / name).is_file() for name in SETTINGS_FILES):
        raise RunError(f"{folder}: no {' and no '.join(SETTINGS_FILES)} here")
    own = {"local_files_only": True, "trust_remote_code": False}  # unset, transformers asks on the terminal
    images = AutoImageProcessor.from_pretrained(folder, backend="pil", **own)
    tokenizer = AutoTokenizer.from_pretrained(folder, **own)
    processor = drop_video_processor(cls)(images, tokenizer, tokenizer.chat_template)
    vocabulary = tokenizer.get_vocab()
    for token in filter(None, (processor.image_token, getattr(processor, "video_token", None))):
        if token not in vocabulary:  # transformers makes an empty tokenizer where there are no files
            raise RunError(f"{folder}: its tokenizer is missing or of another model: it has no token {token}")
    return processor


@lru_cache
def drop_video_processor(cls: Any) -> Any:
    """Return the processor class without its video part, which needs torchvision and which no pipeline uses.

    transformers derives the parts of a processor from the names of these arguments, so it suffices to leave one out.
    """

    def init(self: Any, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        cls.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    init.__annotations__ = {}
    return type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})
