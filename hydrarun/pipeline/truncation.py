"""Finds what a text encoder does not read: prompts longer than its limit are cut by the pipelines without a word."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from hydrarun.core.distributed.collectives import gather_texts
from hydrarun.core.distributed.mesh import Axis
from hydrarun.core.errors import UsageError
from hydrarun.core.printable import make_printable

#: attributes of pipelines that hold the number of a template's first tokens, whose embeddings they drop
DROPPED = ("prompt_template_encode_start_idx", "user_prompt_begin_id")

#: the limit of a call that cuts nothing
NO_LIMIT = 2**62

MAX_SHOWN = 200  # characters of the words in a message


class ReadPrompt(NamedTuple):
    """What one tokenizer passes on of one prompt. `cut`: the words that it leaves out, "" if none."""

    tokenizer: str
    tokens: int
    read: int
    cut: str


#: by prompt, what each tokenizer passes on
Readings = dict[str, list[ReadPrompt]]


class CutText(NamedTuple):
    """Where a tokenizer's call cuts a text, in characters and tokens of the text."""

    name: str
    text: str
    #: the end of the part that the tokenizer passes on
    end: int
    #: start and end of each token; the special tokens that the tokenizer adds are empty
    spans: Sequence[tuple[int, int]]
    limit: int


@contextmanager
def watch_tokenizers(pipeline: Any, prompts: Sequence[str], sliced_to: int | None, found: Readings) -> Iterator[None]:
    """Add to `found` what the tokenizers of a diffusers pipeline pass on of these prompts while the block runs.

    `sliced_to`: the pipeline's `max_sequence_length`. A pipeline that does not pass it to any tokenizer keeps that many
    of the embeddings after its template's start. A pipeline of ours that cuts tokens itself has `read_prompt(prompt)`.
    """
    prompts = tuple(prompts)  # some pipelines write into the list that they get
    calls: list[CutText] = []
    if hasattr(pipeline, "read_prompt") and isinstance(pipeline.tokenizer, PreTrainedTokenizerBase):
        found.update({prompt: [pipeline.read_prompt(prompt)] for prompt in prompts if prompt.strip()})
        yield
        return
    with ExitStack() as watches:
        for name, component in vars(pipeline).items():
            if isinstance(component, PreTrainedTokenizerBase) and component.is_fast:
                watches.enter_context(_watch_tokenizer(name, component, calls))
        yield
    dropped = max(getattr(pipeline, name, 0) for name in DROPPED)
    obeyed = sliced_to is None or any(call.limit - dropped <= sliced_to for call in calls)
    kept = None if obeyed or sliced_to is None else dropped + sliced_to
    for call in calls:
        if prompt := _find_prompt(call.text, prompts):
            reading = _measure_reading(call, prompt, kept)
            if reading not in found.setdefault(prompt, []):
                found[prompt].append(reading)


@contextmanager
def _watch_tokenizer(name: str, tokenizer: Any, calls: list[CutText]) -> Iterator[None]:
    """Record the calls of a tokenizer. `__call__` is looked up in the class, so the class is replaced meanwhile."""
    plain = type(tokenizer)

    def call(self: Any, text: Any = None, *args: Any, **options: Any) -> Any:
        limit = (options.get("max_length") or self.model_max_length) if options.get("truncation") is True else NO_LIMIT
        for one in [text] if isinstance(text, str) else text or ():
            if isinstance(one, str):
                calls.append(_measure_call(plain, self, name, one, limit, options.get("add_special_tokens", True)))
        return plain.__call__(self, text, *args, **options)

    tokenizer.__class__ = type(plain.__name__, (plain,), {"__call__": call})
    try:
        yield
    finally:
        tokenizer.__class__ = plain


def _measure_call(plain: Any, tokenizer: Any, name: str, text: str, limit: int, special: bool) -> CutText:
    """Return where a call with this limit of tokens cuts a text."""
    options = {"add_special_tokens": special, "return_offsets_mapping": True, "verbose": False}
    spans = plain.__call__(tokenizer, text, **options)["offset_mapping"]
    added = 0  # special tokens at the end, which are kept
    while added < len(spans) and spans[-1 - added][0] == spans[-1 - added][1]:
        added += 1
    kept = spans[: limit - added] if len(spans) > limit else spans
    end = max((stop for _, stop in kept), default=0) if len(spans) > limit else len(text)
    return CutText(name, text, end, spans, limit)


def _find_prompt(text: str, prompts: Sequence[str]) -> str | None:
    """Return the longest prompt that a tokenized text holds: templates surround it, and pipelines clean white space."""
    held = [one for one in prompts if one.strip() and " ".join(one.split()) in " ".join(text.split())]
    return max(held, key=len, default=None)


def _locate_prompt(text: str, prompt: str) -> tuple[int, int]:
    """Return the start and end of the prompt in the text; the whole text if white space was changed."""
    start = text.find(prompt.strip())
    return (0, len(text)) if start < 0 else (start, start + len(prompt.strip()))


def _measure_reading(call: CutText, prompt: str, kept: int | None) -> ReadPrompt:
    """Return what a call passes on of a prompt. `kept`: so many tokens from the text's start are kept afterwards."""
    first, last = _locate_prompt(call.text, prompt)
    places = [place for place, (start, stop) in enumerate(call.spans) if first <= start < last and stop > start]
    read = sum(call.spans[place][1] <= call.end and (kept is None or place < kept) for place in places)
    cut = call.text[call.spans[places[read]][0] : last].strip() if read < len(places) else ""
    return ReadPrompt(call.name, len(places), read, cut)


def find_cuts(readings: Sequence[ReadPrompt]) -> list[ReadPrompt]:
    """Return the readings that leave out words."""
    return [one for one in readings if one.cut]


def describe_cut(prompt: str, readings: Sequence[ReadPrompt]) -> str:
    """Describe what is not read of a prompt, by one tokenizer or several, and which others read it all."""
    cuts = find_cuts(readings)
    parts = [f"{one.tokenizer} reads {one.read} of {one.tokens} tokens, not {_shorten(one.cut)!r}" for one in cuts]
    whole = sorted({one.tokenizer for one in readings} - {one.tokenizer for one in cuts})
    others = f" ({', '.join(whole)} reads all)" if whole else ""
    return f"the prompt {make_printable(prompt[:60])!r} is cut: {'; '.join(parts)}{others}"


def refuse_lost_words(found: Mapping[str, Sequence[ReadPrompt]]) -> None:
    """Raise UsageError for a prompt of which no text encoder reads all."""
    for prompt, readings in found.items():
        if readings and all(one.cut for one in readings):
            cut = describe_cut(prompt, readings)
            raise UsageError(f"strict_prompt=true: {cut}; shorten it, or strict_prompt=false to draw what is read")


def gather_readings(found: Readings, axis: Axis, device: torch.device) -> Readings:
    """Return what the tokenizers of all data-parallel ranks pass on of their prompts."""
    own = {prompt: readings for prompt, readings in found.items() if find_cuts(readings)}
    texts = gather_texts(json.dumps(own) if own else "", axis.group, device)
    others = [json.loads(text) for text in texts if text]
    return {prompt: [ReadPrompt(*one) for one in rows] for other in others for prompt, rows in other.items()}


def _shorten(text: str) -> str:
    shown = make_printable(text)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…"


def list_records(found: Mapping[str, Sequence[ReadPrompt]], texts: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """Return what a picture records of its cut texts: `texts` holds its prompt and negative prompt by field name."""
    records: list[dict[str, Any]] = []
    for name, text in texts.items():
        for one in find_cuts(found.get(text or "", ())):
            records.append({"text": name, **one._asdict()})
    return records
