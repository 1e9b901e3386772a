"""One optimizer step of a sharded CoCa, exact for any number of ranks and micro-batches.

With one micro-batch per rank a step is: towers → all-gather of features, in flight while the
decoder and the caption loss run → contrastive loss with its gradients → backward of

    ⟨features, dL/dfeatures⟩ + λ · caption_sum / tokens_of_the_global_batch

With more, a first pass without gradients collects the features of all micro-batches, so that the
contrastive loss sees the global batch, and the second pass runs the line above per micro-batch
(GradCache, Gao et al. 2021). The first pass is a prefix of the second: ZeRO-3's trace stays valid.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from safetensors.torch import save
from torch import Tensor

from coca_scale.engine.config import deepspeed_config, transfers
from coca_scale.engine.optimizer import make_optimizer, make_scale_optimizer
from coca_scale.engine.resharding import Layout, load_universal
from coca_scale.engine.weight_average import AVERAGE_FOLDER, WeightAverage, master_weights
from coca_scale.engine.world import World
from coca_scale.engine.writing import Entries, FileWriter
from coca_scale.losses import ContrastiveResult, FeatureGather, contrastive_loss
from coca_scale.model import CoCa, LogitScale
from coca_scale.model.image import normalize_pixels
from coca_scale.model.packing import PackedCaptions
from coca_scale.model.timm_tower import cast_statistics
from coca_scale.recipe import BatchSplit, Recipe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALE_FILE = "logit_scale.pt"
CONSTANTS_FILE = "constants.safetensors"
STATE_TAG = "state"


@dataclass(frozen=True)
class StepResult:
    """What one step did; losses are of the global batch and the same on every rank.

    Attributes:
        loss: weighted sum of the two losses.
        contrastive_loss: nats.
        caption_loss: nats per token that is not padding.
        grad_norm: global norm before clipping, logit scale not included.
        logit_scale: s, after the step.
        applied: False where a loss or gradient was not finite and nothing was updated.
        finite_here: whether this rank's own features and caption loss were finite.
    """

    loss: float
    contrastive_loss: float
    caption_loss: float
    grad_norm: float
    logit_scale: float
    applied: bool
    finite_here: bool


def apply_settings(model: CoCa, recipe: Recipe, recomputed: Collection[str] = ()) -> None:
    """Put what a recipe says about recomputing and about the caption loss into its model.

    Args:
        model: of the recipe.
        recipe: of the run.
        recomputed: names of blocks that are recomputed as a whole.
    """
    model.set_activation_checkpointing(recipe.engine.activation_checkpointing, recomputed)
    if model.caption_head is not None:
        model.caption_head.chunk_rows = recipe.loss.caption_chunk_rows
        model.caption_head.label_smoothing = recipe.loss.label_smoothing
        model.caption_head.z_loss = recipe.loss.z_loss
        model.caption_head.kernel = recipe.loss.caption_kernel


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
    ) -> None:
        """Shard `model`, which must hold the same weights on every rank.

        Parameters without `requires_grad` stay as they are, and are saved in the precision they
        have here. Blocks named in `recomputed` keep no activations.
        """
        assert world.size == batch_split.ranks, "the batch is split for another number of ranks"
        self._constants = _constants(model) if world.rank == 0 else {}
        self.world = world
        self.dtype = DTYPES[recipe.engine.precision]
        self._recipe = recipe
        self._batch_split = batch_split
        apply_settings(model, recipe, recomputed)
        self._logit_scale = logit_scale.to(world.device)
        self._scale_optimizer = make_scale_optimizer(self._logit_scale.log_scale, recipe.optim)
        optimizer, self._lr_scales = make_optimizer(model, recipe.optim)
        config = deepspeed_config(recipe, batch_split, transfers(model), world.ranks_per_node)
        setattr(model, UNIVERSAL_CHECKPOINT_INFO, {})  # without it checkpoints cannot be resharded
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config
        )
        self.module: CoCa = self._engine.module
        self._writer = self._engine.checkpoint_engine = FileWriter()
        # a file beside the writer: on a full disk rank 0 would fail and the others wait for it
        self._engine._copy_recovery_script = lambda _: None
        cast_statistics(self.module, self.dtype)
        self._average: WeightAverage | None = None
        if recipe.optim.ema_decay is not None:
            masters = master_weights(self._engine, recipe.engine.zero_stage)
            self._average = WeightAverage(masters, recipe.optim.ema_decay)

    def close(self) -> None:
        """Free what DeepSpeed holds."""
        self._engine.destroy()

    def step(
        self,
        images: Tensor,
        tokens: Tensor,
        lr: float,
        samples_seen: int = 0,
        share_indices: Tensor | None = None,
    ) -> StepResult:
        """One optimizer step.

        Args:
            images: uint8 [n, 3, H, W], this rank's share of the global batch.
            tokens: int64 [n, T].
            lr: learning rate of this step.
            samples_seen: by all ranks before this step; which patches are dropped follows from it.
            share_indices: int64 [n], of each sample in this rank's share of the step before it was
                arranged; None if none was moved.
        """
        self._engine.train()
        images = images.to(self.world.device, non_blocking=True)
        micro = self._batch_split.micro_batch
        captions = [self._arrange(piece) for piece in tokens.split(micro)]
        (total_tokens,) = self.world.sum(sum(len(c.labels_K) for c in captions))
        caption_factor = self._recipe.loss.caption_weight / max(total_tokens, 1.0)
        self._set_lr(lr)
        first = samples_seen + self.world.rank * len(tokens)
        share_indices = torch.arange(len(tokens)) if share_indices is None else share_indices
        sample_ids = first + share_indices.to(self.world.device)
        sample_ids += (self._recipe.run.seed % 2**23) << 40  # no run has 2^40 samples
        pieces = list(zip(images.split(micro), captions, sample_ids.split(micro), strict=True))
        assert len(pieces) == self._batch_split.accumulation, "a batch of another size than planned"
        gather: FeatureGather | None = None
        if len(pieces) > 1:
            gather = self._start_gather(self._all_features(pieces))
            contrastive = self._contrastive(gather)

        def on_features(features: Tensor) -> None:
            nonlocal gather
            gather = self._start_gather(features)

        caption_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        finite = torch.ones((), dtype=torch.bool, device=self.world.device)
        for number, (piece_images, piece_captions, piece_ids) in enumerate(pieces):
            callback = on_features if len(pieces) == 1 else None
            features, piece_sum = self._engine(
                self._prepare(piece_images), piece_captions, callback, sample_ids=piece_ids
            )
            if piece_sum is not None:
                caption_sum += piece_sum.detach()
            if len(pieces) == 1:
                assert gather is not None
                contrastive = self._contrastive(gather)
            finite &= features.detach().isfinite().all()
            grads = contrastive.grad_features[number * micro : (number + 1) * micro]
            surrogate = self._surrogate(features, grads, piece_sum, caption_factor)
            # DeepSpeed averages over ranks; the loss is of the global batch, so undo that
            self._engine.backward(surrogate * self.world.size, scale_wrt_gas=False)
            if number + 1 < len(pieces):
                self._engine.step()
        grad_norm, applied = self._update()
        if applied:
            self._update_scale(contrastive.grad_log_scale)
            if self._average is not None:
                self._average.update()
        (caption_total,) = self.world.sum(float(caption_sum))
        caption = caption_total / max(total_tokens, 1.0)
        contrast = float(contrastive.loss)
        weights = self._recipe.loss
        return StepResult(
            loss=weights.contrastive_weight * contrast + weights.caption_weight * caption,
            contrastive_loss=contrast,
            caption_loss=caption,
            grad_norm=grad_norm,
            logit_scale=float(self._logit_scale().detach()),
            applied=applied,
            finite_here=bool(finite) and math.isfinite(float(caption_sum)),
        )

    def _surrogate(
        self, features: Tensor, grads: Tensor, caption_sum: Tensor | None, caption_factor: float
    ) -> Tensor:
        """A scalar whose gradient is that of the loss; a part with weight 0 has no graph at all."""
        parts = []
        if self._recipe.loss.contrastive_weight:
            weighted = self._recipe.loss.contrastive_weight * grads
            parts.append((features.to(weighted.dtype) * weighted).sum())
        if caption_sum is not None and caption_factor:
            parts.append(caption_factor * caption_sum)
        assert parts, "the recipe leaves nothing to train"
        return sum(parts[1:], start=parts[0])

    def _arrange(self, tokens: Tensor) -> PackedCaptions:
        """Captions without padding; laid out on the host, which a GPU would have to wait for."""
        return self.module.text.pack(tokens).to(self.world.device)

    def _prepare(self, images: Tensor) -> Tensor:
        return normalize_pixels(images, self.dtype)

    @torch.no_grad()
    def _all_features(self, pieces: list[tuple[Tensor, PackedCaptions, Tensor]]) -> Tensor:
        """Features of all micro-batches, [n, 2, d]."""
        return torch.cat(
            [
                self._engine(
                    self._prepare(images), captions, None, features_only=True, sample_ids=sample_ids
                )[0]
                for images, captions, sample_ids in pieces
            ]
        )

    def _set_lr(self, lr: float) -> None:
        for group, scale in zip(self._optimizer.param_groups, self._lr_scales, strict=True):
            group["lr"] = lr * scale
        for group in self._scale_optimizer.param_groups:
            group["lr"] = lr

    def _start_gather(self, features: Tensor) -> FeatureGather:
        resident = self._recipe.loss.contrastive_resident
        return FeatureGather(features, self.world.gather_group, resident)

    def _contrastive(self, gather: FeatureGather) -> ContrastiveResult:
        return contrastive_loss(
            gather,
            self._logit_scale.log_scale.detach(),
            self.world.group,
            self._recipe.loss.contrastive_chunk_rows,
        )

    def _update(self) -> tuple[float, bool]:
        """The optimizer step, left out everywhere if a gradient of any rank is not finite.

        Returns:
            Global gradient norm before clipping, and whether the weights were updated.
        """
        if self._recipe.engine.zero_stage == 0:  # plain replicas: DeepSpeed does not look
            trained = [p for p in self.module.parameters() if p.requires_grad]
            grads = [p.grad for p in trained if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            applied = math.isfinite(norm)
            if applied:
                self._engine.step()
            else:
                self._engine.optimizer.zero_grad(set_to_none=True)
                self._engine.micro_steps += 1
            return norm, applied
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return (float(norm) if norm is not None else math.nan), self._engine.was_step_applied()

    def _update_scale(self, grad: Tensor) -> None:
        parameter = self._logit_scale.log_scale
        weighted = self._recipe.loss.contrastive_weight * grad
        parameter.grad = weighted.to(parameter.dtype).reshape_as(parameter)
        self._scale_optimizer.step()
        self._logit_scale.clamp_()

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Unit features [n, d] in fp32 of uint8 images, without gradients."""
        return self.module.encode_image(self.eval_images(images)).float()

    @torch.no_grad()
    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Unit features [n, d] in fp32 of token ids, without gradients."""
        self._engine.eval()
        return self.module.encode_text(tokens.to(self.world.device)).float()

    @torch.no_grad()
    def eval_images(self, images: Tensor) -> Tensor:
        """uint8 images ready for the towers, with the model in evaluation mode."""
        self._engine.eval()
        return self._prepare(images.to(self.world.device))

    @property
    def layout(self) -> Layout:
        """How this run cuts its state."""
        return Layout(self.world.size, self._recipe.engine.zero_stage)

    def add_file(self, path: Path, content: bytes) -> None:
        """Let the next `save_state` write one more file."""
        self._writer.add(path, lambda file: file.write(content))

    def save_state(self, folder: Path) -> Future[Entries]:
        """Copy weights and optimizer state now, and write them into `folder` in a thread.

        Returns:
            `bytes` and `sha256` of this rank's files, by name. An OSError in it is the disk's.
        """
        self._engine.save_checkpoint(str(folder), tag=STATE_TAG, save_latest=False)
        average_folder = None
        if self._average is not None:
            average_folder = folder / AVERAGE_FOLDER / STATE_TAG
            state = self._engine.optimizer.state_dict()
            name = Path(self._engine._get_zero_ckpt_name(str(folder), STATE_TAG)).name
            self._writer.save(self._average.state(state), average_folder / name)
        if self.world.rank == 0:
            if self._constants:
                self.add_file(folder / CONSTANTS_FILE, save(self._constants))
            state = {
                "model": self._logit_scale.state_dict(),
                "optimizer": self._scale_optimizer.state_dict(),
                "ranks": self.layout.ranks,
                "zero_stage": self.layout.zero_stage,
            }
            self._writer.save(state, folder / SCALE_FILE)
        return self._writer.start(folder, average_folder)

    def load_state(self, folder: Path, universal: Path | None) -> None:
        """Read what `save_state` wrote.

        Args:
            folder: of the checkpoint.
            universal: its state in DeepSpeed's universal format, where it has another layout.

        Raises:
            UserError: the checkpoint lacks something that this run needs.
        """
        saved = torch.load(folder / SCALE_FILE, map_location=self.world.device, weights_only=True)
        self._logit_scale.load_state_dict(saved["model"])
        self._scale_optimizer.load_state_dict(saved["optimizer"])
        if universal is None:
            self._engine.load_checkpoint(str(folder), tag=STATE_TAG)
        else:
            load_universal(self._engine, universal, self._optimizer_steps())
        if self._average is not None:
            if universal is None:
                self._average.load(folder, STATE_TAG, self.world.rank)
            else:
                self._average.load_resharded(folder, STATE_TAG, self._engine)

    def _optimizer_steps(self) -> int:
        """Updates of the logit scale, which are those of all other weights."""
        states = list(self._scale_optimizer.state.values())
        return int(states[0]["step"]) if states else 0


def _constants(model: CoCa) -> dict[str, Tensor]:
    """What training does not change: frozen parameters and buffers, as they are before DeepSpeed.

    Its own copies are rounded to the precision of the run.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if name not in trained
    }
