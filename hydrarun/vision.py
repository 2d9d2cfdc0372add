"""The processor that turns a prompt with pictures into the input of Qwen2.5-VL, loaded without torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor

from hydrarun.components import readable
from hydrarun.errors import RunError

#: where the settings of the image processor are: as published, and as transformers 5 saves them
SETTINGS_FILES = ("preprocessor_config.json", "processor_config.json")
IMAGE_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
#: the tokens that the processor counts
PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>")


class VisionProcessor(Qwen2VLProcessor):
    """transformers' own processor for text and pictures, without its part for videos.

    That part needs torchvision, and no pipeline here hands it a video. transformers takes the parts of a processor
    from the names of these arguments, so leaving one out is all it takes.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def load_vision_processor(folder: Path) -> VisionProcessor:
    """The processor of an edit checkpoint from its `processor` folder, as published or as transformers 5 saves it.

    Pictures are resized by Pillow, whether torchvision is installed or not, so that the same input gives the same
    numbers everywhere. Raises `RunError` naming the folder if its files are missing, damaged or another model's.
    """
    if not any((folder / name).is_file() for name in SETTINGS_FILES):
        raise RunError(f"{folder}: no {' and no '.join(SETTINGS_FILES)} here")
    with readable(folder):
        settings, _ = Qwen2VLImageProcessorPil.get_image_processor_dict(folder, local_files_only=True)
        tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
        _refuse_other_models(folder, settings, tokenizer)
        return VisionProcessor(Qwen2VLImageProcessorPil.from_dict(settings), tokenizer, tokenizer.chat_template)


def _refuse_other_models(folder: Path, settings: dict[str, Any], tokenizer: Any) -> None:
    """transformers takes any settings, and makes an empty tokenizer where there are no files."""
    kind = settings.get("image_processor_type")
    if kind not in IMAGE_PROCESSORS:
        raise RunError(f"{folder}: its image processor is {kind}, and this model needs a Qwen2VLImageProcessor")
    vocabulary = tokenizer.get_vocab()
    for token in PLACEHOLDERS:
        if token not in vocabulary:
            raise RunError(f"{folder}: its tokenizer is missing or of another model: it has no token {token}")
