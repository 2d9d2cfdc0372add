"""The contract: a diffusion transformer is `embed -> blocks -> head`.

A model defines how its inputs become tokens, what one block computes and how tokens become a prediction. The forward
pass itself is shared by all models, so the code around the blocks exists once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from hydrarun.models.layers.attention import Attention, AttentionBackend, AttentionLayer
from hydrarun.models.layers.tokens import Tokens

#: branches of a step: the prompt, the negative prompt, and the prompt with some blocks left out
POSITIVE, NEGATIVE, FEWER_BLOCKS = "positive", "negative", "fewer_blocks"


@dataclass(frozen=True)
class Step:
    """One step of the loop: its index from 0, its timestep (the scheduler's value) and the name of its expert."""

    index: int = 0
    timestep: float = 0.0
    expert: str = "transformer"


class StepPredictor(Protocol):
    """Computes the predictions of a step: a cache, or the plain forward pass of all branches."""

    def predict(self, transformer: Transformer, inputs: Inputs, step: Step) -> dict[str, Tensor]:
        """Return `{branch: prediction}` for this rank's branches."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of the transformer in one step."""

    hidden_states: Tensor  # latents, in the layout that `embed` takes
    timestep: Tensor  # [B], the scheduler's values
    conditioning: Mapping[str, Mapping[str, Any]]  # {branch: conditioning arguments of `embed`}
    rows: Mapping[str, Tensor] | None = None  # {branch: [B, K], rows in modulation tables}; None: no tables
    without: tuple[int, ...] = ()  # blocks to leave out; caches that act between blocks ignore it


#: arguments of one branch: latents, timestep, conditioning, positions, rows in modulation tables
Arguments = tuple[Tensor, Tensor, Mapping[str, Any], Mapping[str, Any], Tensor | None]


@dataclass
class ForwardContext:
    """State of one branch's forward pass."""

    whole: Any  # Tokens of all ranks, as `embed` returned them
    tokens: Any  # Tokens of this rank, which the blocks update; `whole` itself without sequence parallelism
    lengths: dict[str, int]  # tokens of each stream, over all ranks


class Transformer(nn.Module):
    """Base class of all transformers.

    A block is called as `block(hidden_states, encoder_hidden_states, tokens)` and returns the first two. It takes its
    shifts, scales and gates, if any, from submodules named `modulation`, and provides `modulated(tokens)`.
    """

    #: names of the `nn.ModuleList`s that hold the blocks, in execution order
    block_lists: ClassVar[tuple[str, ...]] = ()
    #: `{our module: checkpoint module, or a tuple of them fused along dimension 0}`; `*` is a block's index.
    #: Modules that are not listed have the same name in the checkpoint; "" is the checkpoint's root.
    weight_map: ClassVar[Mapping[str, str | tuple[str, ...]]] = {}
    #: streams whose tokens may be sharded across ranks; a context that is only cross-attended is replicated
    sharded_streams: ClassVar[tuple[str, ...]] = ("hidden_states", "encoder_hidden_states")
    #: names of our modules and parameters that stay in float32, whatever the dtype of the others
    keep_in_float32: ClassVar[tuple[str, ...]] = ()
    #: names of modules in the blocks that are not quantized. Modulation is among them because its output shifts and
    #: scales every token, and because it runs once per step, not once per token: quantizing it saves little time.
    keep_unquantized: ClassVar[tuple[str, ...]] = ("modulation",)
    #: sequence parallelism (`hydrarun.acceleration.parallel.sequence`); None: tokens are not sharded
    sequence: Any = None
    #: values of the checkpoint's config.json that were passed to the constructor
    config: Mapping[str, Any]

    def embed(self, *inputs: Any, **conditioning: Any) -> Tokens:
        """Embed the inputs as tokens, without the fields that `positions` returns.

        Called as `embed(hidden_states, timestep, **conditioning)`: latents in the reference's layout (packed
        `[B, S, C]`, or `[B, C, F, H, W]`), timesteps `[B]` (the scheduler's values) and the model's conditioning.
        """
        raise NotImplementedError

    def positions(self, *inputs: Any, **conditioning: Any) -> dict[str, Any]:
        """Return the fields of `Tokens` that depend on sizes alone: `positions(hidden_states, **conditioning)`.

        Rotary tables and the like are computed on the host and cached between calls, outside compiled graphs.
        """
        return {}

    def make_temb(self, *times: Any, **conditioning: Any) -> Tensor:
        """Return the value of `Tokens.temb`, `[B, K, D]`: `make_temb(timestep, dtype, **conditioning)`.

        Timesteps `[B]` (or the conditioning) may have one row for the whole batch. `dtype` is that of the latents. Only
        transformers with `Modulation` layers, which modulation tables can replace, implement it.
        """
        raise NotImplementedError

    def head(self, tokens: Tokens) -> Tensor:
        """Map tokens to the prediction, in the shape of the latents."""
        raise NotImplementedError

    def gate_signal(self, tokens: Tokens) -> Tensor:
        """Return the tensor by which caches compare steps; by default the first block's modulated input."""
        return next(self.all_blocks()).modulated(tokens)

    def all_blocks(self) -> Iterator[Any]:
        """Yield every block, in order."""
        for name in self.block_lists:
            yield from getattr(self, name)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(1 for _ in self.all_blocks())

    def forward(self, inputs: Inputs, step: Step, cache: StepPredictor) -> dict[str, Tensor]:
        """Return `{branch: prediction}` of one step, in the shape of the latents.

        The cache receives all branches at once. For each branch it may call `begin_branch`, run some of the blocks and
        call `finish_branch`.
        """
        return cache.predict(self, inputs, step)

    def predict_branch(self, inputs: Inputs, branch: str) -> Tensor:
        """Compute one branch's prediction in one call: `prepare`, the blocks, `finish_branch`."""
        return self.forward_branch(*self.select_branch(inputs, branch), without=inputs.without)

    def begin_branch(self, inputs: Inputs, branch: str) -> ForwardContext:
        """Embed one branch's inputs and return this rank's tokens."""
        return self.prepare(*self.select_branch(inputs, branch))

    def select_branch(self, inputs: Inputs, branch: str) -> Arguments:
        """Select one branch's inputs. The branch name is left out so that equal shapes share one compiled graph."""
        given = inputs.conditioning[branch]
        rows = None if inputs.rows is None else inputs.rows[branch]
        return inputs.hidden_states, inputs.timestep, given, self.positions(inputs.hidden_states, **given), rows

    def forward_branch(self, *arguments: Any, without: tuple[int, ...] = ()) -> Tensor:
        """Compute the prediction from a branch's `Arguments`, leaving out the blocks in `without`."""
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
        """Embed a branch's `Arguments` and return this rank's tokens."""
        whole = replace(self.embed(latents, timestep, **given), **positions)
        if rows is not None:
            whole.temb = rows
        return self.shard(whole)

    def shard(self, whole: Tokens) -> ForwardContext:
        """Split the tokens across ranks and keep this rank's shard."""
        if self.sequence is None:
            return ForwardContext(whole, whole, {})
        return ForwardContext(whole, self.sequence.shard(whole, self.sharded_streams), self.sequence.lengths)

    def run_blocks(
        self, call: ForwardContext, start: int = 0, stop: int | None = None, without: tuple[int, ...] = ()
    ) -> None:
        """Run the blocks from `start` up to, not including, `stop`, leaving out those in `without`."""
        self.resume_branch(call)
        tokens = call.tokens
        for index, block in islice(enumerate(self.all_blocks()), start, stop):
            if index not in without:
                tokens.hidden_states, tokens.encoder_hidden_states = block(
                    tokens.hidden_states, tokens.encoder_hidden_states, tokens
                )

    def finish_branch(self, call: ForwardContext) -> Tensor:
        """Gather the tokens after the last block and compute the prediction."""
        self.resume_branch(call)
        hidden_states = call.tokens.hidden_states
        call.whole.hidden_states = self.sequence.gather(hidden_states) if self.sequence else hidden_states
        return self.head(call.whole)

    def resume_branch(self, call: ForwardContext) -> None:
        """Restore this branch's lengths: branches with prompts of other lengths may have begun since."""
        if self.sequence is not None:
            self.sequence.lengths = call.lengths

    def kept_bytes(self) -> int:
        """Return the bytes that the blocks keep between calls, not counting caches."""
        return 0

    def shard_tokens(self, sequence: Any) -> None:
        """Shard the tokens across ranks with `sequence`, in the attention layers too."""
        self.sequence = sequence
        for module in self.modules():
            if isinstance(module, Attention):
                module.sequence = sequence

    def set_attention_backend(self, backend: AttentionBackend) -> None:
        """Use `backend` in every attention layer."""
        for module in self.modules():
            if isinstance(module, AttentionLayer):
                module.backend = backend
