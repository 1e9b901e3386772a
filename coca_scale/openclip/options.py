"""What becomes of every option of OpenCLIP's training command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fate = Literal["taken", "differs", "not needed", "left out", "refused"]


@dataclass(frozen=True)
class Option:
    """One option of OpenCLIP's.

    Attributes:
        fate: taken over as it is; taken over, but meaning something else here; not needed here;
            left out, since there is nothing like it; refused, since without it the run would be
            another one.
        key: of the recipe, empty if there is none.
        note: what differs, or why.
    """

    fate: Fate
    key: str = ""
    note: str = ""


def _taken(key: str) -> Option:
    return Option("taken", key)


def _differs(key: str, note: str) -> Option:
    return Option("differs", key, note)


def _needless(note: str) -> Option:
    return Option("not needed", note=note)


def _left(note: str) -> Option:
    return Option("left out", note=note)


def _refused(note: str) -> Option:
    return Option("refused", note=note)


_LAUNCH = "the launcher decides"
_EXACT = "the loss and its gradient are exact over all ranks, and sharded, anyway"
_PREPROCESS = "weights bring their own; or give a model JSON with preprocess_cfg as --model"

# by the name under which OpenCLIP's parser stores them
OPTIONS: dict[str, Option] = {
    "train_data": _differs("data.train", "`::` becomes a list; table paths count from the table"),
    "train_data_upsampling_factors": _taken("data.train[].weight"),
    "val_data": _taken("data.val"),
    "train_num_samples": _taken("data.train_samples"),
    "val_num_samples": _taken("eval.samples"),
    "dataset_type": _needless("the name of the data says it"),
    "dataset_resampled": _taken("data.replacement"),
    "csv_separator": _needless("the first line of a table shows it: tab or comma"),
    "csv_img_key": _taken("data.image_column"),
    "csv_caption_key": _taken("data.caption_column"),
    "imagenet_val": _taken("eval.zeroshot"),
    "imagenet_v2": _left("`coca-scale eval zeroshot` measures it afterwards"),
    "cache_dir": _left("set HF_HOME"),
    "logs": _taken("run.dir"),
    "log_local": _needless("every rank's lines are in the log of the job"),
    "name": _taken("run.name"),
    "workers": _taken("data.workers"),
    "batch_size": _differs("train.micro_batch", "global_batch = it × GPUs × accumulation"),
    "epochs": _taken("train.epochs"),
    "epochs_cooldown": _differs("schedule.cooldown_steps", "in steps"),
    "lr": _taken("optim.lr"),
    "beta1": _taken("optim.beta1"),
    "beta2": _taken("optim.beta2"),
    "eps": _taken("optim.eps"),
    "wd": _taken("optim.weight_decay"),
    "momentum": _needless("AdamW has none"),
    "warmup": _taken("schedule.warmup_steps"),
    "opt": _refused("of these only AdamW is taken over"),
    "use_bn_sync": _differs("", "BatchNorm always runs with its stored statistics"),
    "skip_scheduler": _taken("schedule.name"),
    "lr_scheduler": _taken("schedule.name"),
    "lr_cooldown_end": _refused("the cooldown ends at 0"),
    "lr_cooldown_power": _refused("the cooldown is linear"),
    "save_frequency": _differs("checkpoint.every_steps", "in steps"),
    "save_most_recent": _needless("`checkpoint.keep` says how many stay"),
    "zeroshot_frequency": _differs("eval.every_steps", "together with the rest of validation"),
    "val_frequency": _differs("eval.every_steps", "in steps"),
    "resume": _differs("checkpoint.resume", "the same command goes on by itself"),
    "precision": _differs("engine.precision", "amp is bf16; the optimizer keeps fp32 always"),
    "model": _taken("model.name"),
    "pretrained": _taken("model.pretrained"),
    "pretrained_image": _differs(
        "model.pretrained_towers", "where the model's config names weights"
    ),
    "lock_image": _taken("model.lock_image"),
    "lock_image_unlocked_groups": _taken("model.image_unlocked_groups"),
    "lock_image_freeze_bn_stats": _needless("they always are"),
    "image_mean": _refused(_PREPROCESS),
    "image_std": _refused(_PREPROCESS),
    "image_interpolation": _refused(_PREPROCESS),
    "image_resize_mode": _refused(_PREPROCESS),
    "aug_cfg": _differs("data.crop_scale_min", "the smallest `scale`; nothing else is augmented"),
    "grad_checkpointing": _differs(
        "engine.activation_checkpointing", "full; without it selective, which is nearly free"
    ),
    "local_loss": _needless(_EXACT),
    "gather_with_grad": _needless(_EXACT),
    "force_context_length": _taken("model.context_length"),
    "force_image_size": _taken("model.image_size"),
    "force_quick_gelu": _refused("give a model JSON with quick_gelu: true as --model"),
    "force_patch_dropout": _taken("model.patch_dropout"),
    "force_custom_text": _needless("weights mean the same with and without"),
    "torchscript": _left("nothing like it"),
    "torchcompile": _differs("engine.compile", "blocks one by one, unless weights are locked"),
    "trace": _left("nothing like it"),
    "accum_freq": _differs("train.global_batch", "follows from global and micro-batch, exactly"),
    "device": _needless("the accelerator that is there, or the CPU"),
    "dist_url": _needless(_LAUNCH),
    "dist_backend": _needless(_LAUNCH),
    "report_to": _differs("log.wandb", "TensorBoard is written unless log.tensorboard is false"),
    "wandb_notes": _left("set WANDB_NOTES"),
    "wandb_project_name": _differs("log.wandb", "where --report-to has wandb"),
    "debug": _left("`coca-scale doctor` and `check` look at what may be wrong"),
    "copy_codebase": _left("RUN/versions.json has the commit"),
    "horovod": _needless(_LAUNCH),
    "ddp_static_graph": _needless("DeepSpeed shards the model"),
    "no_set_device_rank": _needless(_LAUNCH),
    "seed": _differs("run.seed", "other random numbers follow from it"),
    "grad_clip_norm": _taken("optim.clip_norm"),
    "lock_text": _taken("model.lock_text"),
    "lock_text_unlocked_layers": _taken("model.text_unlocked_groups"),
    "lock_text_freeze_layer_norm": _needless("a locked tower is locked with its norms"),
    "log_every_n_steps": _taken("log.every_steps"),
    "coca_caption_loss_weight": _taken("loss.caption_weight"),
    "coca_contrastive_loss_weight": _taken("loss.contrastive_weight"),
    "remote_sync": _left("checkpoint.mirror copies checkpoints, logs and export"),
    "remote_sync_frequency": _left("checkpoint.mirror copies checkpoints, logs and export"),
    "remote_sync_protocol": _left("checkpoint.mirror copies checkpoints, logs and export"),
    "delete_previous_checkpoint": _taken("checkpoint.keep"),
    "distill_model": _taken("loss.distill"),
    "distill_pretrained": _taken("loss.distill"),
    "use_bnb_linear": _refused("its layers are in int8; engine.fp8 has the like in FP8"),
    "siglip": _differs("loss.contrastive", "sigmoid; with a CoCa OpenCLIP 3 stays with softmax"),
    "loss_dist_impl": _needless(_EXACT),
}


_AUDIO = _refused("there are no models of sound here")
_NAFLEX = _refused("pictures are square and have the size of the model")
_PACKED = _needless("captions are packed: their lengths cost nothing, and nothing is padded")
_ONE_COMPILATION = _needless("blocks are compiled one by one, by inductor, for the shapes they see")

# of OpenCLIP's main branch after 3.3.0, by the flag; a `no_` before it may be typed as well
NEWER: dict[str, Option] = {
    "audio_ext": _AUDIO,
    "audio_fill": _AUDIO,
    "audio_fusion": _AUDIO,
    "audio_int16_normalize": _AUDIO,
    "audio_layer_decay": _AUDIO,
    "audio_multiprocessing_context": _AUDIO,
    "audio_trunc": _AUDIO,
    "audio_zeroshot_audio_key": _AUDIO,
    "audio_zeroshot_class_key": _AUDIO,
    "audio_zeroshot_dataset": _AUDIO,
    "audio_zeroshot_multiprocessing_context": _AUDIO,
    "audio_zeroshot_split": _AUDIO,
    "audio_zeroshot_target_key": _AUDIO,
    "audio_zeroshot_template": _AUDIO,
    "audio_zeroshot_workers": _AUDIO,
    "pretrained_audio": _AUDIO,
    "image_key": _refused("a picture is the member with the extension of one: jpg, png, webp, …"),
    "max_image_pixels": _differs("", "what is left out has over 2^27 pixels, whatever it says"),
    "text_key": _refused("captions are in .txt, or in fields of the .json: --json-text-key"),
    "json_text_key": _taken("data.captions"),
    "json_text_key_probs": _differs("data.captions", "a field of chance 0 is never read"),
    "persistent_workers": _needless("loaders live as long as the run"),
    "opt_kwargs": _refused("AdamW has lr, betas, eps and weight decay"),
    "opt_fallback_list": _refused("the optimizer is AdamW for all weights"),
    "image_layer_decay": _differs("optim.layer_decay", "of both towers and the decoder"),
    "visual_layer_decay": _differs("optim.layer_decay", "of both towers and the decoder"),
    "text_layer_decay": _differs("optim.layer_decay", "of both towers and the decoder"),
    "text_pooler_own_group": _left("what pools is in the group above"),
    "wd_exclude": _refused("matrices are decayed; norms, biases and embedding vectors are not"),
    "val_retrieval_chunk_size": _needless("similarities exist in tiles"),
    "val_retrieval_precision": _needless("ranks are found in fp32"),
    "torchcompile_strategy": _ONE_COMPILATION,
    "torchcompile_backend": _ONE_COMPILATION,
    "torchcompile_mode": _ONE_COMPILATION,
    "torchcompile_pass_break": _ONE_COMPILATION,
    "torchcompile_dynamic": _ONE_COMPILATION,
    "fsdp": _needless("DeepSpeed shards the model: engine.zero_stage"),
    "fsdp_no_reshard_after_forward": _left("engine.zero_stage=2 has whole weights all the time"),
    "fsdp_offload_cpu": _taken("engine.offload"),
    "fsdp_checkpoint": _needless("checkpoints are sharded, and exports whole, always"),
    "log_metric_every_n_steps": _differs("log.every_steps", "of the console as well"),
    "train_loss_ema_samples": _left("the curves of TensorBoard can be smoothed"),
    "text_attention_mask": _differs(
        "", "padding is never computed; a token with its id inside a caption counts as padding"
    ),
    "fused_caption_loss": _needless("logits never exist as a whole, with accumulation as well"),
    "caption_z_loss_weight": _differs(
        "loss.z_loss", "divided by the caption weight, which multiplies it here"
    ),
    "caption_loss_compute_dtype": _needless("logits are in the precision of the run, sums in fp32"),
    "caption_loss_chunk_size": _taken("loss.caption_chunk_rows"),
    "use_naflex": _NAFLEX,
    "force_naflex_vision": _NAFLEX,
    "naflex_num_train_image_tokens": _NAFLEX,
    "naflex_patch_sizes": _NAFLEX,
    "naflex_patch_size_probs": _NAFLEX,
    "naflex_seq_lens": _NAFLEX,
    "naflex_seq_len_probs": _NAFLEX,
    "naflex_max_tokens_per_batch": _NAFLEX,
    "naflex_max_text_tokens": _NAFLEX,
    "naflex_batch_divisor": _NAFLEX,
    "naflex_loss_scale": _NAFLEX,
    "naflex_pad_multiple": _NAFLEX,
    "length_bucketing": _PACKED,
    "bucket_pool": _PACKED,
    "bucket_chunk": _PACKED,
    "bucket_prefetch_pools": _PACKED,
    "text_pad_multiple": _PACKED,
}
OPTIONS |= NEWER


def options_table() -> str:
    """All of them as Markdown."""
    lines = ["| OpenCLIP | here | |", "|---|---|---|"]
    for name, option in OPTIONS.items():
        here = f"`{option.key}`" if option.key else option.fate
        lines.append(f"| `--{name.replace('_', '-')}` | {here} | {option.note} |")
    return "\n".join(lines) + "\n"
