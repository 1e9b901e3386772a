"""Every key of a recipe, with its type, unit, range and default.

This module, with those of single sections beside it, is the only description of recipes: loading,
error messages and `recipes/schema.json` are all made from it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from coca_scale.recipe.checkpoint_section import CheckpointSection
from coca_scale.recipe.data import DataSection
from coca_scale.recipe.distill import DistillSection
from coca_scale.recipe.lanes import usual_lanes
from coca_scale.recipe.loss_weights import LossWeight, factors
from coca_scale.recipe.optim_section import OptimSection
from coca_scale.recipe.section import (
    MAX_STEPS,
    Fraction,
    Minutes,
    NonNegativeInt,
    PathText,
    PositiveInt,
    SampleCount,
    Section,
    Seed,
)
from coca_scale.recipe.stage_section import STAGE_LENGTHS, StageSection


class RunSection(Section):
    """Names of the run, and its random seed."""

    name: str = Field(min_length=1, description="Name of the run.")
    dir: PathText | None = Field(None, description="Run folder; default runs/NAME.")
    seed: Seed = Field(0, description="Seed of weights, sample order and augmentation.")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.dir) if self.dir is not None else Path("runs") / self.name


class ModelSection(Section):
    """The model."""

    name: PathText = Field(
        description="An OpenCLIP config name (coca_ViT-L-14) or a path to its JSON."
    )
    image_size: Annotated[int, Field(ge=1, le=2**14)] | None = Field(
        None, description="Pixels per side; default from the model config."
    )
    context_length: Annotated[int, Field(ge=3, le=2**16)] | None = Field(
        None,
        description="Tokens per caption with start and end; default from the model config.",
    )
    patch_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None, description="Share of image patches left out while training (ViTs of this package)."
    )
    pretrained: PathText | None = Field(
        None,
        description="Weights to start from: a tag of OpenCLIP's registry (laion2b_s13b_b90k), "
        "NAME@TAG, hf-hub:ORG/NAME, a weight file, an exported folder, a run or a checkpoint.",
    )
    pretrained_towers: bool = Field(
        True,
        description="Without model.pretrained: start timm and Hugging Face towers from their own "
        "published weights where the model config says so.",
    )
    lock_image: bool = Field(False, description="Keep the image tower as it is.")
    image_unlocked_groups: NonNegativeInt = Field(
        0, description="lock_image: layer groups at the end that train; 1 is the projection alone."
    )
    lock_text: bool = Field(False, description="Keep the text tower as it is.")
    text_unlocked_groups: NonNegativeInt = Field(
        0, description="lock_text: layer groups at the end that train; 1 is the projection alone."
    )

    @model_validator(mode="after")
    def _groups_need_a_lock(self) -> ModelSection:
        for tower in ("image", "text"):
            if getattr(self, f"{tower}_unlocked_groups") and not getattr(self, f"lock_{tower}"):
                raise ValueError(
                    f"{tower}_unlocked_groups means nothing without lock_{tower}: true"
                )
        return self


class LossSection(Section):
    """Weights and memory settings of the losses."""

    def weight(self, name: str) -> float | dict[str, float]:
        """Of a loss, by its name: a number, or points as `weight_at` takes them."""
        of_teacher = self.distill.weights()
        if name in of_teacher:
            return of_teacher[name]
        found: float | dict[str, float] = getattr(self, f"{name}_weight")
        return found

    def learns(self, *names: str) -> bool:
        """Whether one of these losses has a weight above 0 at any time."""
        return any(max(factors(self.weight(name))) > 0 for name in names)

    contrastive: Literal["softmax", "sigmoid"] = Field(
        "softmax",
        description="What compares pictures and captions of the global batch: CLIP's softmax over "
        "all others, or SigLIP's sigmoid of every pair, which trains a bias of logits too.",
    )
    contrastive_weight: LossWeight = Field(
        1.0,
        description="Factor: a number, or points between which it moves in straight lines, in "
        "steps {0: 0.0, 1000: 2.0} or in shares of the run {0%: 0.0, 10%: 2.0}.",
    )
    caption_weight: LossWeight = Field(2.0, description="Factor, as contrastive_weight.")
    caption_parallel: Fraction = Field(
        0.0,
        description="Share of samples whose caption is predicted in parallel: every input is the "
        "start token, so that each word is found in the picture alone (CapPa).",
    )
    distill: DistillSection = Field(
        default_factory=lambda: DistillSection(),
        description="A teacher: {teacher: MODEL, weight: 1.0, feature_weight: 0.0}, or a folder of "
        "features instead of the model; docs/distillation.md.",
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Caption loss: probability mass spread over the vocabulary."
    )
    z_loss: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Caption loss: factor of the squared log partition function."
    )
    contrastive_chunk_rows: PositiveInt | None = Field(
        None,
        description="Rows of the similarity matrix that exist at a time, 8,192 columns of each; "
        "null: 512 on a CPU, and on a GPU tiles of 2^23 similarities.",
    )
    contrastive_resident: PositiveInt = Field(
        262_144,
        description="Samples whose gathered features exist at a time; a larger global batch is "
        "gathered in pieces, and twice.",
    )
    caption_chunk_rows: PositiveInt = Field(
        2048, description="Tokens whose vocabulary logits exist at a time."
    )
    caption_kernel: Literal["torch", "triton"] = Field(
        "triton",
        description="What makes softmax and gradient of the logits: torch, or on GPUs one Triton "
        "kernel, which gives the same in fewer passes over them.",
    )


class ScheduleSection(Section):
    """Learning rate over the run."""

    name: Literal["cosine", "constant", "constant-cooldown"] = Field(
        "cosine", description="Shape after the warm-up."
    )
    warmup_steps: NonNegativeInt = Field(
        0, description="Steps of linear warm-up; cut to the length of the run."
    )
    cooldown_steps: NonNegativeInt = Field(
        0, description="constant-cooldown: steps of the final linear decay to zero."
    )
    stages: list[StageSection] = Field(
        default_factory=list,
        description="Parts of the run, each with its length and what it changes, such as "
        "{samples: 12800000000, image_size: 84}; the length of the run is theirs.",
    )


class TrainSection(Section):
    """Length of the run and batch arithmetic."""

    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = Field(
        None, description="Length in optimizer steps."
    )
    samples: SampleCount | None = Field(None, description="Length in samples seen.")
    epochs: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Length in passes over the training data."
    )
    global_batch: PositiveInt = Field(description="Samples per optimizer step over all ranks.")
    micro_batch: PositiveInt = Field(
        description="Samples per rank and forward pass; accumulation follows from it."
    )


class EngineSection(Section):
    """How the model is sharded and in which precision it runs."""

    zero_stage: Literal[0, 1, 2, 3] = Field(3, description="DeepSpeed ZeRO stage.")
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="Parameters in the forward pass; the optimizer always keeps fp32."
    )
    activation_checkpointing: Literal["none", "selective", "full", "auto"] = Field(
        "selective",
        description="What the backward pass computes again instead of keeping it: none; "
        "selective: norms and activation functions, cheap and 40 % of what a block keeps; full: "
        "every transformer block; auto: the first of none, selective and selective with some "
        "blocks whole that fits into the device's memory as planned, which the log says.",
    )
    activation_budget_gb: Annotated[float, Field(gt=0.0, le=1e6)] | None = Field(
        None,
        description="Most memory for activations on a rank, in GB: as few blocks as that takes are "
        "recomputed as a whole. Counts captions of data.mean_tokens.",
    )
    kept_graphs: NonNegativeInt | Literal["auto"] = Field(
        0,
        description="Of a step's micro-batches, those whose towers run once, with all that their "
        "backward pass needs in memory, and not once more after the pass that collects features; "
        "auto: as many as there is planned to be room for beside everything else.",
    )
    compile: Literal["none", "blocks"] = Field(
        "none",
        description="torch.compile: nothing, or every transformer block by itself, which fuses its "
        "element-wise operations; the first steps take half a minute longer.",
    )
    attention_kernel: Literal["torch", "triton"] = Field(
        "triton",
        description="What attends in bf16 and fp16 on NVIDIA's GPUs from an A100 on: torch, or our "
        "Triton kernels, to images of at most 257 tokens with heads of 64 and to captions without "
        "their padding. Elsewhere it is torch.",
    )
    fp8: bool = Field(
        False,
        description="Linear layers of the transformer blocks in FP8 while they train, but for the "
        "gradients of their weights; needs precision bf16 and an NVIDIA GPU from an L40S, RTX 40 "
        "or H100 on, or computes slowly on a CPU.",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="What waits in the memory of the host: nothing; optimizer: its state, updated "
        "by the CPU; all: the weights too, which needs zero_stage 3.",
    )
    secondary_shard: bool = Field(
        False,
        description="ZeRO++ hpZ: every node keeps the weights once more, over its own GPUs, and "
        "the backward pass gathers them there. Needs zero_stage 3.",
    )
    gc_every_steps: PositiveInt | None = Field(
        100,
        description="Steps between Python's garbage collections, on all ranks together; null "
        "leaves them to Python, and then ranks wait for each other's.",
    )
    start_timeout_minutes: Minutes = Field(
        30.0, description="Longest wait for all ranks to come together and build the model."
    )
    step_timeout_minutes: Minutes = Field(
        10.0, description="Longest step; a longer one is a hang, and ends the run."
    )
    save_timeout_minutes: Minutes = Field(
        60.0, description="Longest save, load, validation or export."
    )
    silence_timeout_minutes: Annotated[float, Field(gt=0.0)] = Field(
        5.0,
        description="Longest time without a sign of life from a rank, as from one that is stopped "
        "or whose node is down. One that died is noticed within seconds.",
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="Raw DeepSpeed configuration, merged over the generated one.",
    )

    @model_validator(mode="after")
    def _stage0_is_fp32(self) -> EngineSection:
        if self.zero_stage == 0 and self.precision != "fp32":
            raise ValueError("zero_stage 0 runs in fp32 only; use zero_stage 1 for bf16 or fp16")
        return self

    @model_validator(mode="after")
    def _fp8_beside_bf16(self) -> EngineSection:
        if self.fp8 and self.precision != "bf16":  # fp16 would not hold products without scales
            raise ValueError("fp8 needs precision bf16")
        return self

    @model_validator(mode="after")
    def _one_tracker(self) -> EngineSection:
        for name in ("comet", "csv_monitor", "tensorboard", "wandb"):
            if name in self.deepspeed:
                raise ValueError(
                    f"deepspeed.{name} would send or write more than `publish` lets out; "
                    "log.tensorboard and log.wandb do that here"
                )
        return self

    @model_validator(mode="after")
    def _what_needs_sharding(self) -> EngineSection:
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"offload {self.offload} needs zero_stage 1, 2 or 3")
        if self.offload == "all" and self.zero_stage < 3:
            raise ValueError("offload all needs zero_stage 3; use offload optimizer")
        if self.secondary_shard and self.zero_stage < 3:
            raise ValueError("secondary_shard needs zero_stage 3")
        return self


class HealthSection(Section):
    """What a run makes of steps that go wrong."""

    max_bad_steps: PositiveInt = Field(
        10, description="Steps in a row without a finite loss and gradient that end the run."
    )
    rollbacks: NonNegativeInt = Field(
        0,
        description="How often, instead of ending, a run goes back to its last checkpoint and on "
        "with the data behind the bad stretch; spikes that last count as one then.",
    )
    spike_deviations: Annotated[float, Field(gt=0.0)] | None = Field(
        8.0,
        description="A loss so many standard deviations above its running mean is reported as a "
        "spike; null looks for none.",
    )
    straggler_factor: Annotated[float, Field(gt=0.0)] = Field(
        0.2,
        description="A rank for which the others wait longer than this share of the time is named.",
    )


class EvalSection(Section):
    """Validation during training."""

    every_steps: PositiveInt | None = Field(
        None, description="Steps between validations; null validates at the end only."
    )
    samples: PositiveInt = Field(1024, description="Most validation samples used.")
    captions: NonNegativeInt = Field(
        8, description="Pictures with captions in TensorBoard and RUN/validation."
    )
    scored_captions: NonNegativeInt = Field(
        0,
        description="Validation samples that are captioned (greedy search) and scored with BLEU, "
        "ROUGE-L and CIDEr; 0 scores none.",
    )
    zeroshot: PathText | None = Field(
        None, description="Folder of class folders, or shards with .cls, to classify zero-shot."
    )
    classnames: PathText | None = Field(
        None, description="imagenet, or a file with a class name per line; null: folder names."
    )
    templates: PathText = Field(
        "openai", description="openai, simple, or a file of sentences with {} for the name."
    )


class LogSection(Section):
    """What is written while training."""

    every_steps: PositiveInt = Field(10, description="Steps between lines of metrics.jsonl.")
    tensorboard: bool = Field(True, description="Write RUN/tensorboard.")
    wandb: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Project of Weights & Biases that gets numbers and captioned pictures."
    )
    profile_steps: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="[first, last]: steps whose operators and trace rank 0 writes to RUN/profile.",
    )

    @model_validator(mode="after")
    def _project_has_a_name(self) -> LogSection:
        if self.wandb is not None and self.wandb.lower() in ("off", "no", "false"):
            raise ValueError(f"wandb is the name of a project; null instead of {self.wandb}")
        return self

    @model_validator(mode="after")
    def _span_has_steps(self) -> LogSection:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError("profile_steps is [first, last], and first is not above last")
        return self


class Recipe(Section):
    """A whole run. Unknown keys are errors."""

    run: RunSection
    model: ModelSection
    data: DataSection
    loss: LossSection = Field(default_factory=LossSection)
    optim: OptimSection
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    train: TrainSection
    engine: EngineSection = Field(default_factory=EngineSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    health: HealthSection = Field(default_factory=HealthSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    log: LogSection = Field(default_factory=LogSection)

    @model_validator(mode="after")
    def _average_needs_masters(self) -> Recipe:
        if self.optim.ema_decay is not None and self.engine.zero_stage == 0:
            raise ValueError("optim.ema_decay needs engine.zero_stage 1, 2 or 3")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Recipe:
        given = [k for k in LENGTH_KEYS if getattr(self.train, k) is not None]
        if self.schedule.stages and given:
            raise ValueError(
                f"train.{given[0]}: the length of this run is that of its schedule.stages; leave "
                "it out there, or set schedule.stages to []"
            )
        if not self.schedule.stages and len(given) != 1:
            raise ValueError(
                "train: give exactly one of steps, samples, epochs "
                f"(found: {', '.join(given) or 'none'})"
            )
        return self

    @model_validator(mode="after")
    def _stages_are_recipes(self) -> Recipe:
        stages = self.schedule.stages
        if stages and self.engine.zero_stage == 0:
            raise ValueError("schedule.stages needs engine.zero_stage 1, 2 or 3")
        for number, stage in enumerate(stages):
            key = f"schedule.stages.{number}"
            if number and stage.warmup_steps is not None and stage.lr is None:
                raise ValueError(f"{key}: warmup_steps needs the lr of a schedule that begins here")
            if number and stage.lr is not None and stage.lr_factor != 1.0:
                raise ValueError(f"{key}: give lr or lr_factor, not both")
            try:
                self.of_stage(number)
            except ValidationError as error:
                fault = error.errors()[0]
                message = fault["msg"].removeprefix("Value error, ")
                raise ValueError(f"{key}: {message}") from error
        return self

    def batches(self) -> list[int]:
        """The global batch of every stage."""
        own = [stage.global_batch for stage in self.schedule.stages]
        return [batch or self.train.global_batch for batch in own] or [self.train.global_batch]

    def of_stage(self, number: int) -> Recipe:
        """The recipe of one of its stages, from 0, by itself.

        Raises:
            ValidationError: what the stage names does not fit the rest.
        """
        stage, raw = self.schedule.stages[number], self.model_dump()
        for section, named in stage.sections().items():
            raw[section] |= named
        raw["train"] |= {key: getattr(stage, key) for key in STAGE_LENGTHS}
        raw["schedule"]["stages"] = []
        if number and stage.warmup_steps is None:
            raw["schedule"]["warmup_steps"] = 0
        if raw["data"]["lanes"] is None:  # lanes of the whole run: positions stay what they are
            raw["data"]["lanes"] = usual_lanes(math.gcd(*self.batches()))
        return Recipe.model_validate(raw)


LENGTH_KEYS = ("steps", "samples", "epochs")
