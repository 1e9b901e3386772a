"""One optimizer step of a sharded CoCa, exact for any number of ranks and micro-batches.

With one micro-batch per rank a step is: towers → all-gather of features, in flight while the
decoder and the caption loss run → losses of the features with their gradients → backward of

    ⟨features, dL/dfeatures⟩ + λ · caption_sum / tokens_of_the_global_batch

With more, a first pass without gradients collects the features of all micro-batches, so that the
contrastive loss sees the global batch, and the second pass runs the line above per micro-batch
(GradCache, Gao et al. 2021). The first pass is a prefix of the second: ZeRO-3's trace stays valid.
Where memory is left some towers keep their graphs in the first pass (`engine.kept_graphs`), and the
second one goes on from there: those run last in the first and first in the second, so that no more
graphs are alive than it takes, and gradients are added in the same order whatever is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from coca_scale.engine.compiling import compile_layers
from coca_scale.engine.config import (
    DTYPES,
    apply_settings,
    deepspeed_config,
    gathered_whole,
    kept_graphs,
    layers,
    transfers,
)
from coca_scale.engine.constants import CONSTANTS_FILE, constants_of
from coca_scale.engine.host import release_freed, room_for_copies
from coca_scale.engine.objective import Counts, FeatureTerms, Objective, Tally
from coca_scale.engine.optimizer import (
    SCALE_RATE,
    kind_of,
    make_optimizer,
    make_scale_optimizer,
    only_where,
    own_settings,
)
from coca_scale.engine.refit import refitted
from coca_scale.engine.scale_file import SCALE_FILE, read_scale
from coca_scale.engine.teacher import Teacher
from coca_scale.engine.weight_average import AVERAGE_FOLDER, WeightAverage, saved_average
from coca_scale.engine.world import World
from coca_scale.engine.writing import Entries, FileWriter
from coca_scale.engine.zero import ZeroEngine
from coca_scale.engine.zero_files import STATE_TAG, Layout, fits_layout, look_through
from coca_scale.engine.zero_slices import SavedState
from coca_scale.engine.zero_start import fill
from coca_scale.errors import AgreedError, UserError
from coca_scale.losses import FeatureGather
from coca_scale.model import CoCa, LogitScale
from coca_scale.model.coca import Encoded
from coca_scale.model.deferred import FirstWeights
from coca_scale.model.image import normalize_pixels
from coca_scale.model.packing import Lesson, PackedCaptions, sent
from coca_scale.model.targets import Targets
from coca_scale.model.timm_tower import cast_statistics
from coca_scale.model.weights import require_finite
from coca_scale.recipe import BatchSplit, Recipe


@dataclass(frozen=True)
class StepResult:
    """What one step did; losses are of the global batch and the same on every rank.

    Attributes:
        loss: weighted sum of the losses.
        loss_at_most: the same with the largest weights of the run.
        weights: of the losses in this step, by name.
        losses: each of them, by the names of the objective; nats, per token for captions.
        grad_norm: global norm before clipping, logit scale not included.
        logit_scale: s, after the step.
        logit_bias: b, after the step; None of a model without one.
        applied: False where a loss or gradient was not finite and nothing was updated.
        finite_here: whether this rank's own features and summed losses were finite.
    """

    loss: float
    loss_at_most: float
    weights: dict[str, float]
    losses: dict[str, float]
    grad_norm: float
    logit_scale: float
    logit_bias: float | None
    applied: bool
    finite_here: bool


class StepInFlight:
    """What a step comes to, on its way to the host."""

    def __init__(self, values: Mapping[str, Tensor], objective: Objective) -> None:
        """`values`: fields of a `StepResult` and losses by name, scalars on the device."""
        self._names = list(values)
        packed = torch.stack([value.detach().double().reshape(()) for value in values.values()])
        self._values = packed.to("cpu", non_blocking=True)  # into pinned memory
        self._arrived = torch.cuda.current_stream().record_event() if packed.is_cuda else None
        self._objective = objective

    def result(self) -> StepResult:
        """Wait for the device, if it is not through."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found = dict(zip(self._names, self._values.tolist(), strict=True))
        losses = {name: found[name] for name in self._objective.names}
        return StepResult(
            loss=self._objective.total(losses),
            loss_at_most=self._objective.total_at_most(losses),
            weights=self._objective.weights,
            losses=losses,
            grad_norm=found["grad_norm"],
            logit_scale=found["logit_scale"],
            logit_bias=found.get("logit_bias"),
            applied=bool(found["applied"]),
            finite_here=bool(found["finite_here"]),
        )


@dataclass(frozen=True)
class _MicroBatch:
    """Samples that run together: images uint8 [b, 3, H, W], captions, names int64 [b].

    `lesson` is what a teacher takes of them, where there is one.
    """

    images: Tensor
    captions: PackedCaptions
    sample_ids: Tensor
    lesson: Lesson | None


class TrainEngine:
    """A CoCa under DeepSpeed. All public methods are collectives: every rank calls them."""

    def __init__(
        self,
        model: CoCa,
        logit_scale: LogitScale,
        recipe: Recipe,
        batch_split: BatchSplit,
        world: World,
        recomputed: Collection[str] = (),
        teacher: Teacher | None = None,
        first: FirstWeights | None = None,
    ) -> None:
        """Shard `model`, which must hold the same weights on every rank, or those of `first`.

        Parameters without `requires_grad` stay as they are, and are saved in the precision they
        have here. Blocks named in `recomputed` keep no activations. A `teacher` is what the recipe
        names in `loss.distill`. `first` is asked for tensors without memory, one at a time.
        """
        assert world.size == batch_split.ranks, "the batch is split for another number of ranks"
        self._constants = constants_of(model, first) if world.rank == 0 else {}
        self.world = world
        self.dtype = DTYPES[recipe.engine.precision]
        self.layout = Layout(world.size, recipe.engine.zero_stage)
        self._batch_split = batch_split
        self._kept_graphs = kept_graphs(recipe, batch_split)
        self._seed = recipe.run.seed
        self._teacher = teacher
        self._losses = recipe.loss
        self._objective = self._objective_of(None)
        apply_settings(model, recipe, recomputed)
        self._logit_scale = logit_scale.to(world.device)
        self._scale_optimizer = make_scale_optimizer(self._logit_scale, recipe.optim)
        self._optimizer_kind = kind_of(recipe.optim)
        self._updates = torch.zeros((), dtype=torch.int64, device=world.device)
        config = deepspeed_config(recipe, batch_split, transfers(model), world.ranks_per_node)
        fill(model, first, config, self.dtype, world.device)
        optimizer, self._rates = make_optimizer(model, recipe.optim, recipe.loss)
        in_background = recipe.checkpoint.background
        self._writer = FileWriter(partial(room_for_copies, world.ranks_per_node, in_background))
        whole = gathered_whole(model) if recipe.engine.zero_stage == 3 else []
        self._zero = ZeroEngine(
            model,
            optimizer,
            self._optimizer_kind.moments,
            config,
            self._writer,
            whole,
            self._kept_graphs > 0,
        )
        self.module: CoCa = self._zero.module
        release_freed()
        cast_statistics(self.module, self.dtype)
        self._compiled = recipe.engine.compile == "blocks"
        if self._compiled:
            compile_layers(layers(self.module), layers(self.module.image))
        decay = recipe.optim.ema_decay
        self._average = None if decay is None else WeightAverage(self._zero, decay)

    def close(self) -> None:
        """Free what DeepSpeed holds, and what was compiled for this model."""
        self._zero.close()
        if self._compiled:
            torch._dynamo.reset()  # another stage's pictures are compiled as if they were the first

    def lay_out(self, tokens: Tensor, targets: Targets | None = None) -> list[PackedCaptions]:
        """Captions of this rank's share as `step` takes them. Local, in any thread.

        Args:
            tokens: int64 [n, T], on the host: their lengths are read.
            targets: what is to be written, where that is not the same; likewise.
        """
        assert tokens.device.type == "cpu", "a GPU would make the host wait at every length"
        size, pack = self._batch_split.micro_batch, self.module.text.pack
        parts = tokens.split(size)
        wanted = [None] * len(parts) if targets is None else targets.split(size)
        pairs = zip(parts, wanted, strict=True)
        return [pack(part, targets=of_it).to(self.world.device) for part, of_it in pairs]

    def lay_out_lesson(self, told: Tensor) -> list[Lesson]:
        """What a teacher takes of this rank's share as `step` takes it. Local, in any thread.

        Args:
            told: [n, …], on the host, as of `Teacher.lay_out`.
        """
        if self._teacher is None:
            return []
        return self._teacher.lay_out(told.split(self._batch_split.micro_batch))

    def step(
        self,
        images: Tensor,
        captions: Sequence[PackedCaptions],
        lr: float,
        samples_seen: int = 0,
        share_indices: Tensor | None = None,
        lesson: Sequence[Lesson] = (),
        loss_weights: Mapping[str, float] | None = None,
    ) -> StepInFlight:
        """One optimizer step, which a GPU may have before it when this returns.

        Args:
            images: uint8 [n, 3, H, W], this rank's share of the global batch.
            captions: of the same samples, by `lay_out`.
            lr: learning rate of this step.
            samples_seen: by all ranks before this step; which patches are dropped follows from it.
            share_indices: int64 [n], of each sample in this rank's share of the step before it was
                arranged; None if none was moved.
            lesson: of the same samples, by `lay_out_lesson`; empty without a teacher.
            loss_weights: of this step, by name; None where none follows a schedule.
        """
        self._zero.train()
        self._zero.begin_step()
        self._objective = self._objective_of(loss_weights)
        self._set_learning_rate(lr)
        batches = self._micro_batches(images, captions, samples_seen, share_indices, lesson)
        counts = self._objective.counts([batch.captions for batch in batches])
        tally = Tally(self.world.device)
        taught = self._taught(batches)
        if len(batches) == 1:
            terms = self._pass_once(batches[0], counts, tally, taught)
        else:
            terms = self._pass_twice(batches, counts, tally, taught)
        grad_norm, applied = self._zero.update()
        self._updates += applied
        self._update_scale(terms, applied)
        if self._average is not None:
            self._average.update(applied)
        values = {
            **self._objective.values(terms, tally.sums, counts),
            "grad_norm": grad_norm,
            "logit_scale": self._logit_scale(),
            "applied": applied,
            "finite_here": tally.finite,
        }
        if self._logit_scale.bias is not None:
            values["logit_bias"] = self._logit_scale.bias
        return StepInFlight(values, self._objective)

    def _objective_of(self, weights: Mapping[str, float] | None) -> Objective:
        log_scale = None if self._teacher is None else self._teacher.log_scale
        return Objective(self._losses, self.world, weights, log_scale)

    def _taught(self, batches: list[_MicroBatch]) -> Tensor | None:
        """The teacher's features [n, 2, t] of this rank's share; None without a teacher."""
        if self._teacher is None:
            return None
        found = []
        for batch in batches:
            assert batch.lesson is not None, "a step without its lesson"
            found.append(self._teacher.features(batch.images, batch.lesson))
        return torch.cat(found)

    def _pass_once(
        self, batch: _MicroBatch, counts: Counts, tally: Tally, taught: Tensor | None
    ) -> FeatureTerms:
        """Forward and backward of a share that is one micro-batch."""
        gathers: list[FeatureGather] = []  # begun when the towers are through
        features, sums = self._zero(
            self.prepare(batch.images),
            batch.captions,
            on_features=lambda found: gathers.append(self._objective.gather(found, taught)),
            sample_ids=batch.sample_ids,
        )
        tally.add(features, sums)
        terms = self._feature_terms(gathers[0])
        self._backward(self._objective.surrogate(features, terms.grad_features, sums, counts))
        return terms

    def _pass_twice(
        self, batches: list[_MicroBatch], counts: Counts, tally: Tally, taught: Tensor | None
    ) -> FeatureTerms:
        """The features of all micro-batches first, then forward and backward of each."""
        found = self._features(batches[self._kept_graphs :])
        kept = deque(self._encode(batch) for batch in batches[: self._kept_graphs])
        found = [encoded.features.detach() for encoded in kept] + found
        terms = self._feature_terms(self._objective.gather(torch.cat(found), taught))
        for number, batch in enumerate(batches):
            if kept:
                features, sums = self._zero.finish(kept.popleft(), batch.captions)
            else:
                features, sums = self._zero(
                    self.prepare(batch.images), batch.captions, sample_ids=batch.sample_ids
                )
            tally.add(features, sums)
            grads = terms.grad_features
            if grads is not None:
                grads = grads[number * len(features) : (number + 1) * len(features)]
            self._backward(self._objective.surrogate(features, grads, sums, counts))
            if number + 1 < len(batches):
                self._zero.end_micro_batch()
        return terms

    @torch.no_grad()
    def _features(self, batches: list[_MicroBatch]) -> list[Tensor]:
        """[b, 2, d] of each."""
        return [
            self._zero(
                self.prepare(batch.images),
                batch.captions,
                features_only=True,
                sample_ids=batch.sample_ids,
            )[0]
            for batch in batches
        ]

    def _encode(self, batch: _MicroBatch) -> Encoded:
        """The towers, with the graph that their backward pass needs."""
        images = self.prepare(batch.images)
        encoded: Encoded = self._zero.encode(images, batch.captions, batch.sample_ids)
        return encoded

    def _feature_terms(self, gather: FeatureGather) -> FeatureTerms:
        log_scale, bias = self._logit_scale.log_scale.detach(), self._logit_scale.bias
        return self._objective.of_features(gather, log_scale, bias)

    def _backward(self, surrogate: Tensor) -> None:
        # DeepSpeed averages over ranks; the loss is of the global batch, so undo that
        self._zero.backward(surrogate * self.world.size)

    def _micro_batches(
        self,
        images: Tensor,
        captions: Sequence[PackedCaptions],
        samples_seen: int,
        share_indices: Tensor | None,
        lesson: Sequence[Lesson],
    ) -> list[_MicroBatch]:
        """This rank's share, cut up, on its device; arguments as of `step`."""
        size, device = self._batch_split.micro_batch, self.world.device
        indices = torch.arange(len(images)) if share_indices is None else share_indices
        ids = samples_seen + self.world.rank * len(images) + indices
        ids += (self._seed % 2**23) << 40  # no run has 2^40 samples
        images, ids = sent(images, device), sent(ids, device)
        lessons = lesson or (None,) * len(captions)
        parts = zip(images.split(size), captions, ids.split(size), lessons, strict=True)
        batches = [_MicroBatch(*part) for part in parts]
        assert len(batches) == self._batch_split.accumulation, "not the batch that was split"
        return batches

    def _set_learning_rate(self, lr: float) -> None:
        weights = self._objective.weights
        self._zero.set_learning_rates([lr * rate.at(weights) for rate in self._rates])
        for group in self._scale_optimizer.param_groups:
            group["lr"] = lr * SCALE_RATE.at(weights)

    def _update_scale(self, terms: FeatureTerms, applied: Tensor) -> None:
        grads = {"log_scale": terms.grad_log_scale, "bias": terms.grad_bias}
        for name, parameter in self._logit_scale.named_parameters():
            grad = grads[name]  # of a bias that the loss does not use None
            parameter.grad = None if grad is None else grad.to(parameter.dtype).view_as(parameter)
        only_where(self._scale_optimizer, applied)
        self._scale_optimizer.step()
        self._logit_scale.clamp_()

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images [n, 3, H, W] as the towers take them. Local."""
        preprocess = self.module.config.preprocess_cfg
        return normalize_pixels(images.to(self.world.device), self.dtype, preprocess)

    def evaluate(self) -> None:
        """Evaluation mode, until the next step. Local."""
        self._zero.train(False)

    def add_file(self, path: Path, content: bytes) -> None:
        """Let the next `save_state` write one more file."""
        self._writer.add(path, lambda file: file.write(content))

    def save_state(self, folder: Path) -> Future[Entries]:
        """Copy weights and optimizer state now, and write them into `folder` in a thread.

        Returns:
            `bytes` and `sha256` of this rank's files, by name. An OSError in it is the disk's.
        """
        self._zero.save(folder)
        average_folder = None
        if self._average is not None:
            average_folder = folder / AVERAGE_FOLDER / STATE_TAG
            self._writer.save(self._average.state(), average_folder / self._zero.shard_name())
        if self.world.rank == 0:
            if self._constants:
                self.add_file(folder / CONSTANTS_FILE, save(self._constants))
            state = {
                "model": self._logit_scale.state_dict(),
                "optimizer": self._scale_optimizer.state_dict(),
                "optimizer_kind": self._optimizer_kind.name,
                "updates": int(self._updates),
                "ranks": self.layout.ranks,
                "zero_stage": self.layout.zero_stage,
            }
            self._writer.save(state, folder / SCALE_FILE)
        return self._writer.start(folder, average_folder)

    def load_state(self, folder: Path, remade: bool = False) -> bool:
        """Read what `save_state` wrote. A collective.

        Args:
            folder: of the checkpoint.
            remade: whether its model had other sizes or trained other weights. What is resized, or
                begins to train, begins with moments of zero.

        Returns:
            Whether its state was cut otherwise than this run's.

        Raises:
            UserError: the checkpoint lacks something that this run needs, is of another optimizer,
                holds more than data, or weights that are not finite.
        """
        world, state = self.world, folder / STATE_TAG
        world.agree(lambda: look_through(state, world.rank, world.size))
        saved = read_scale(folder, self.world.device)
        kind, own = saved.optimizer_kind, self._optimizer_kind.name
        if kind != own:
            raise UserError(f"{folder} was written with the optimizer {kind}, this run has {own}")
        self._logit_scale.load_state_dict(dict(saved.model))
        with own_settings(self._scale_optimizer):
            self._scale_optimizer.load_state_dict(saved.optimizer)
        self._updates.fill_(saved.steps)
        fits = fits_layout(saved.layout, self.layout, folder)
        if remade and self.layout.zero_stage == 0:
            raise UserError(f"{folder}: zero_stage 0 keeps the sizes and locks of a run")
        if fits and not remade:
            self._zero.load(folder)
            if self._average is not None:
                self._average.load(folder, world.rank)
        else:
            world.agree(lambda: self._load_slices(folder, saved.steps, remade))
        scale = {f"logit_scale.{n}": p for n, p in self._logit_scale.named_parameters()}
        try:
            world.agree(lambda: require_finite({**self._zero.own_weights(), **scale}))
        except AgreedError as error:
            raise AgreedError(f"{folder}: {error}") from error
        return not fits

    def _load_slices(self, folder: Path, steps: int, remade: bool) -> None:
        """What of a checkpoint of another layout is this rank's. Local."""
        saved = SavedState(folder)
        self._zero.load_slices(saved, steps, self._refitted(folder, saved, remade))
        if self._average is not None:
            average = saved_average(folder)
            self._average.load_resharded(average, self._refitted(folder, average, remade))

    def _refitted(self, checkpoint: Path, saved: SavedState, remade: bool) -> dict[str, Tensor]:
        if not remade:
            return {}
        return refitted(checkpoint, saved, self._zero.trained_shapes(), self.module.config)
