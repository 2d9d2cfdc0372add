"""The contract: a diffusion transformer is `embed -> blocks -> head`.

A model says how its inputs become tokens, what one block does and how tokens become a prediction; the forward
pass itself is ours and the same for all, so that what happens around the blocks is written once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from hydrarun.models.layers.attention import Attention, AttentionBackend, AttentionLayer
from hydrarun.models.layers.tokens import Tokens

#: the branches of a step: the prompt's prediction, the negative prompt's, the prompt's with some blocks left out
POSITIVE, NEGATIVE, FEWER_BLOCKS = "positive", "negative", "fewer_blocks"


@dataclass(frozen=True)
class Step:
    """One step of the loop: its place from 0, its timestep (the scheduler's own value), and whose step it is."""

    index: int = 0
    timestep: float = 0.0
    expert: str = "transformer"


class StepPredictor(Protocol):
    """What decides how a step's predictions come about: a cache, or the plain forward of all branches."""

    def predict(self, transformer: Transformer, inputs: Inputs, step: Step) -> dict[str, Tensor]:
        """`{branch: prediction}` of this rank's branches."""


@dataclass(frozen=True)
class Inputs:
    """What a step gives the transformer."""

    hidden_states: Tensor  # latents, as `embed` takes them
    timestep: Tensor  # [B], the scheduler's own values
    conditioning: Mapping[str, Mapping[str, Any]]  # {branch: what else `embed` takes for it}
    rows: Mapping[str, Tensor] | None = None  # {branch: [B, K], its rows in modulation tables}; None: there are none
    without: tuple[int, ...] = ()  # blocks that are left out, where no cache looks between them


#: of one branch: latents, timestep, conditioning, positions, rows in modulation tables
Arguments = tuple[Tensor, Tensor, Mapping[str, Any], Mapping[str, Any], Tensor | None]


@dataclass
class ForwardContext:
    """One branch's way through the transformer."""

    whole: Any  # Tokens: all of them, as `embed` made them
    tokens: Any  # Tokens: this rank's, which the blocks change; the same object in one process
    lengths: dict[str, int]  # tokens of each stream on all ranks


class Transformer(nn.Module):
    """Base of all transformers.

    A block is called as `block(hidden_states, encoder_hidden_states, tokens)` and returns the first two; it takes its
    shifts, scales and gates from a sub-module named `modulation`, and offers `modulated(tokens)`.
    """

    #: names of the `nn.ModuleList`s, in the order in which they run
    block_lists: ClassVar[tuple[str, ...]] = ()
    #: `{our module: checkpoint module, or a tuple of them fused along dimension 0}`; `*` is a block's index.
    #: Modules that are not listed have the checkpoint's name; "" is the checkpoint's root.
    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = {}
    #: streams whose tokens may be spread over ranks; a context that is only cross-attended stays whole
    sharded_streams: ClassVar[tuple[str, ...]] = ("hidden_states", "encoder_hidden_states")
    #: names of our modules and parameters that are kept in float32 whatever the others are held in
    keep_in_float32: ClassVar[tuple[str, ...]] = ()
    #: names of modules in the blocks that quantization leaves alone; modulation, because every token is shifted and
    #: scaled by what it makes, and it is computed once a step, not once a token: there is little time to win
    keep_unquantized: ClassVar[tuple[str, ...]] = ("modulation",)
    #: how tokens are spread over ranks (`hydrarun.acceleration.parallel.sequence`); None: they are not
    sequence: Any = None
    #: the values of the checkpoint's config.json that the constructor took
    config: Mapping[str, Any]

    def embed(self, *inputs: Any, **conditioning: Any) -> Tokens:
        """Inputs to tokens: `embed(hidden_states, timestep, **conditioning)`, without what `positions` gives.

        Latents as the model's reference holds them (packed `[B, S, C]`, or `[B, C, F, H, W]`), timesteps `[B]` (the
        scheduler's own values), and what the model is conditioned on.
        """
        raise NotImplementedError

    def positions(self, *inputs: Any, **conditioning: Any) -> dict[str, Any]:
        """The fields of `Tokens` that sizes alone decide: `positions(hidden_states, **conditioning)`.

        Rotations and the like are made on the host and kept from call to call; no compiled graph makes them again.
        """
        return {}

    def make_temb(self, *times: Any, **conditioning: Any) -> Tensor:
        """What `embed` puts into `Tokens.temb`: `make_temb(timestep, dtype, **conditioning)`, `[B, K, D]`.

        Timesteps `[B]` (or the conditioning) may have one row for all. `dtype`: of the latents. Only transformers with
        a `Modulation`, of which tables can be made, have it.
        """
        raise NotImplementedError

    def head(self, tokens: Tokens) -> Tensor:
        """Tokens to the prediction, in the shape of the latents."""
        raise NotImplementedError

    def gate_signal(self, tokens: Tokens) -> Tensor:
        """What tells whether a step differs from the last one: by default the first block's modulated input."""
        return next(self.all_blocks()).modulated(tokens)

    def all_blocks(self) -> Iterator[Any]:
        """Every block, in order."""
        for name in self.block_lists:
            yield from getattr(self, name)

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return sum(1 for _ in self.all_blocks())

    def forward(self, inputs: Inputs, step: Step, cache: StepPredictor) -> dict[str, Tensor]:
        """`{branch: prediction}` of one step, in the shape of the latents.

        The cache sees all branches together. For each it may call `begin_branch`, run some of the blocks, and call
        `finish_branch`.
        """
        return cache.predict(self, inputs, step)

    def predict_branch(self, inputs: Inputs, branch: str) -> Tensor:
        """One branch's prediction in one go: `prepare`, all blocks, `finish_branch`."""
        return self.forward_branch(*self.select_branch(inputs, branch), without=inputs.without)

    def begin_branch(self, inputs: Inputs, branch: str) -> ForwardContext:
        """Inputs to this rank's tokens."""
        return self.prepare(*self.select_branch(inputs, branch))

    def select_branch(self, inputs: Inputs, branch: str) -> Arguments:
        """Of the inputs what one branch takes, without its name: equal sizes are one graph to a compiler."""
        given = inputs.conditioning[branch]
        rows = None if inputs.rows is None else inputs.rows[branch]
        return inputs.hidden_states, inputs.timestep, given, self.positions(inputs.hidden_states, **given), rows

    def forward_branch(self, *arguments: Any, without: tuple[int, ...] = ()) -> Tensor:
        """A branch's `Arguments` to its prediction, without these blocks."""
        call = self.prepare(*arguments)
        self.run_blocks(call, 0, None, without)
        return self.finish_branch(call)

    def prepare(
        self,
        latents: Tensor,
        timestep: Tensor,
        given: Mapping[str, Any],
        positions: Mapping[str, Any],
        rows: Tensor | None,
    ) -> ForwardContext:
        """A branch's `Arguments` to this rank's tokens."""
        whole = replace(self.embed(latents, timestep, **given), **positions)
        if rows is not None:
            whole.temb = rows
        return self.shard(whole)

    def shard(self, whole: Tokens) -> ForwardContext:
        """Tokens to this rank's."""
        if self.sequence is None:
            return ForwardContext(whole, whole, {})
        return ForwardContext(whole, self.sequence.shard(whole, self.sharded_streams), self.sequence.lengths)

    def run_blocks(
        self, call: ForwardContext, start: int = 0, stop: int | None = None, without: tuple[int, ...] = ()
    ) -> None:
        """Run the blocks from `start` up to `stop`, without some."""
        self.resume_branch(call)
        tokens = call.tokens
        for index, block in islice(enumerate(self.all_blocks()), start, stop):
            if index not in without:
                tokens.hidden_states, tokens.encoder_hidden_states = block(
                    tokens.hidden_states, tokens.encoder_hidden_states, tokens
                )

    def finish_branch(self, call: ForwardContext) -> Tensor:
        """The tokens behind the last block to the prediction."""
        self.resume_branch(call)
        hidden_states = call.tokens.hidden_states
        call.whole.hidden_states = self.sequence.gather(hidden_states) if self.sequence else hidden_states
        return self.head(call.whole)

    def resume_branch(self, call: ForwardContext) -> None:
        """Other branches may have been begun since: their prompts have other lengths."""
        if self.sequence is not None:
            self.sequence.lengths = call.lengths

    def kept_bytes(self) -> int:
        """What the blocks keep from call to call, beside what caches do."""
        return 0

    def shard_tokens(self, sequence: Any) -> None:
        """Let the tokens be spread over ranks, and attention reach across them."""
        self.sequence = sequence
        for module in self.modules():
            if isinstance(module, Attention):
                module.sequence = sequence

    def set_attention_backend(self, backend: AttentionBackend) -> None:
        """Let every attention layer compute with `backend`."""
        for module in self.modules():
            if isinstance(module, AttentionLayer):
                module.backend = backend
