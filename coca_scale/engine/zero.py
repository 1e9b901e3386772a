"""What touches DeepSpeed's inside, with zero2.py, zero3*.py, zero_files.py: engine, optimizers.

Read against 0.19. A checkpoint of one layout (ranks, ZeRO stage) is brought into a run of another
by slices (`engine/zero_slices.py`) and not by DeepSpeed, whose converter takes twice the disk, and
whose loaders take no other stage's format, give every parameter group the hyper-parameters of the
first, and let all groups share one step counter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from inspect import getclosurevars
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import (
    FP32_FLAT_GROUPS,
    OPTIMIZER_STATE_DICT,
    PARAM_ALIGNMENT_PADDINGS,
    PARTITION_COUNT,
    SINGLE_PARTITION_OF_FP32_GROUPS,
    ZERO_STAGE,
)
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.torch_autocast import autocast_if_enabled
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_module,
)
from torch import Tensor, nn

from coca_scale.engine.config import many_at_once
from coca_scale.engine.optimizer import only_where, own_settings, whole_shape
from coca_scale.engine.writing import FileWriter
from coca_scale.engine.zero2 import steps_unasked, take_over_step
from coca_scale.engine.zero3 import ManyAtOnce
from coca_scale.engine.zero3_layers import WholeLayers
from coca_scale.engine.zero3_trace import StepTrace
from coca_scale.engine.zero_files import HARMLESS, STATE_TAG
from coca_scale.engine.zero_slices import SavedState
from coca_scale.model.pickles import read_pickle, tensors_alone

_RELEASED = "_PartitionedParameterCoordinator__params_to_release"  # remembers its arguments


class ZeroEngine:
    """A model under DeepSpeed. What is not said to be local is a collective."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        moments: Sequence[str],
        config: dict[str, Any],
        writer: FileWriter,
        gathered_whole: Sequence[nn.Module] = (),
        keeps_graphs: bool = False,
    ) -> None:
        """Shard `model`, which must hold the same weights on every rank.

        Args:
            model: its parameters become DeepSpeed's.
            optimizer: over those that train.
            moments: that it keeps of every weight, by the names in its state.
            config: of DeepSpeed.
            writer: gets the files of `save`.
            gathered_whole: modules that stage 3 gathers with everything inside, at once.
            keeps_graphs: whether `encode` and `finish` are used, and `begin_step` before a step.
        """
        for module in gathered_whole:
            set_z3_leaf_module(module, True)
        names = {module: name for name, module in model.named_modules()}
        layers = {names[module]: module for module in gathered_whole}
        self._moments = tuple(moments)
        self._stage = int(config["zero_optimization"]["stage"])
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config
        )
        self._engine.checkpoint_engine = _Handover(writer)
        self._many = None
        if many_at_once(config):
            zero3 = self._engine.optimizer
            whole = WholeLayers(layers, zero3, config["zero_optimization"])
            self._many = ManyAtOnce(zero3, whole)
        elif steps_unasked(config):
            take_over_step(self._engine.optimizer)
        self._trace = None
        if keeps_graphs and self._stage == 3:
            self._trace = StepTrace(self._engine.optimizer.parameter_offload, self.module)
        # a file beside the writer: on a full disk rank 0 would fail and the others wait for it
        self._engine._copy_recovery_script = lambda _: None

    @property
    def module(self) -> Any:
        """The model; its parts may be called by themselves, by every rank."""
        return self._engine.module

    def close(self) -> None:
        """Free what DeepSpeed holds. Local."""
        self._engine.destroy()
        # which hold the model for as long as the process lives
        FWD_MODULE_STACK.clear()
        released = getclosurevars(getattr(PartitionedParameterCoordinator, _RELEASED)).nonlocals
        released["func"].cache_clear()

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode. Local."""
        if mode != self.module.training:  # a walk over all modules
            self._engine.train(mode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass."""
        return self._engine(*args, **kwargs)

    def begin_step(self) -> None:
        """A step's first forward pass is next."""
        if self._trace is not None:
            self._trace.begin_step()

    def encode(self, *args: Any) -> Any:
        """The model's `encode`, in whose graph `finish` goes on."""
        with autocast_if_enabled(self._engine):
            encoded = self.module.encode(*args)
        if self._trace is not None:
            self._trace.left()
        return encoded

    def finish(self, encoded: Any, *args: Any) -> Any:
        """The rest of the forward pass; its backward pass comes before the next one is finished."""
        if self._trace is not None:
            self._trace.come_back()
        return self._engine(encoded, *args)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` on each rank, averaged over ranks and not divided further."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def end_micro_batch(self) -> None:
        """What follows belongs to the same step."""
        self._engine.step()

    def set_learning_rates(self, rates: Sequence[float]) -> None:
        """One per parameter group. Local."""
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def update(self) -> tuple[Tensor, Tensor]:
        """The optimizer step, left out everywhere if a gradient of any rank is not finite.

        Returns:
            Global gradient norm before clipping, and whether the weights were updated: scalars on
            the device, fp64 and boolean, for which the host does not wait, but with offload, in
            fp16 and where `engine.deepspeed` changes ZeRO-3.
        """
        if self._stage > 0:
            self._engine.step()
            if self._many is not None:
                self._many.order_streams()
            norm = self._engine.get_global_grad_norm()
            norm = self._scalar(math.nan if norm is None else norm)
            return norm, norm.isfinite() & self._engine.was_step_applied()
        grads = [p.grad for _, p in self._trained() if p.grad is not None]
        norm = self._scalar(torch.nn.utils.get_total_norm(grads))
        only_where(self._optimizer, norm.isfinite())  # plain replicas: DeepSpeed does not look
        self._engine.step()
        return norm, norm.isfinite()

    def _scalar(self, value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=self._engine.device)

    def masters(self) -> list[Tensor]:
        """This rank's fp32 weights that the optimizer updates, in DeepSpeed's own order. Local."""
        assert self._stage > 0, "plain replicas have no masters"
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return list(self._engine.optimizer.single_partition_of_fp32_groups)

    def own_weights(self) -> dict[str, Tensor]:
        """What this rank has of the weights that train: its masters, or whole ones. Local."""
        if self._stage == 0:
            return dict(self._trained())
        return {f"master {number}": master for number, master in enumerate(self.masters())}

    def save(self, folder: Path) -> None:
        """Hand weights and optimizer state to the writer."""
        self._engine.save_checkpoint(str(folder), tag=STATE_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what a run of this layout saved, all of it looked through before.

        Settings stay those of this run.
        """
        optimizer = self._engine.optimizer
        clip_norm = getattr(optimizer, "clip_grad", None)
        with own_settings(optimizer), tensors_alone(HARMLESS):
            self._engine.load_checkpoint(str(folder), tag=STATE_TAG)
        if clip_norm is not None:
            optimizer.clip_grad = clip_norm

    def load_slices(
        self, saved: SavedState, optimizer_steps: int, others: Mapping[str, Tensor]
    ) -> None:
        """Fill weights and optimizer state of a new engine from a state of any layout. Local.

        Args:
            saved: what is read.
            optimizer_steps: updates of the optimizer so far.
            others: fp32 weights that are not in it as they are here, by name; they have no moments.

        Raises:
            UserError: it is damaged, or holds something else.
        """
        self._prepare_moments(optimizer_steps)
        for moment in (None, *self._moments):
            self.set_state(saved, others, moment)
        self._round_masters()

    def trained_shapes(self) -> dict[str, torch.Size]:
        """Of the weights that train, whole, by name. Local."""
        return {name: whole_shape(p) for name, p in self._trained()}

    def set_state(
        self, saved: SavedState, others: Mapping[str, Tensor], moment: str | None = None
    ) -> None:
        """Fill this rank's part of the fp32 masters, or of one of the moments. Local.

        Args:
            saved: what is read, of every parameter the slice that this rank has.
            others: as of `load_slices`.
            moment: None for the masters.
        """
        for name, parameter in self._trained():
            own = self._own_slice(parameter)
            if own is None:
                continue
            if name not in others:
                part = saved.slice(name, *own, moment)
            elif moment is None:
                part = others[name].flatten()[slice(*own)]
            else:
                part = torch.zeros(own[1] - own[0])
            self._set_slice(parameter, part, moment)

    def _own_slice(self, parameter: Any) -> tuple[int, int] | None:
        """Where this rank's part of a parameter begins and ends in it, flat; None without one."""
        if self._stage == 3:
            size, count = parameter.ds_tensor.ds_numel, parameter.ds_numel
            begin = min(count, parameter.ds_zero_partition_rank * size)
            return begin, min(count, begin + size)
        if parameter._hp_mapping is None:
            return None
        address = parameter._hp_mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def _set_slice(self, parameter: Any, part: Tensor, moment: str | None) -> None:
        if self._stage < 3:
            parameter._hp_mapping.get_hp_fragment(moment).data.copy_(part)
            return
        padded = torch.nn.functional.pad(part, (0, parameter.ds_tensor.ds_numel - len(part)))
        if moment is None:
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, moment)

    def shard(self, values: list[Tensor]) -> dict[str, Any]:
        """Values of the masters in the format of a shard of weights, for `SavedState`. Local."""
        state = self._engine.optimizer.state_dict()  # which says how the shard is cut
        names = (ZERO_STAGE, PARTITION_COUNT, PARAM_ALIGNMENT_PADDINGS)
        kept: dict[str, Any] = {n: state[n] for n in names if n in state}
        key = FP32_FLAT_GROUPS if FP32_FLAT_GROUPS in state else SINGLE_PARTITION_OF_FP32_GROUPS
        assert [t.shape for t in state[key]] == [t.shape for t in values]
        kept[key] = values
        return {OPTIMIZER_STATE_DICT: kept}

    def shard_name(self) -> str:
        """Of this rank's file. Local."""
        return Path(self._engine._get_zero_ckpt_name("", STATE_TAG)).name

    def _trained(self) -> list[tuple[str, Any]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _round_masters(self) -> None:
        """Into the parameters that the forward pass sees."""
        optimizer = self._engine.optimizer
        if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            optimizer.update_lp_params()
            return
        optimizer.checkpoint_event_prologue()  # cuts the small ones too, which are kept whole
        for _, parameter in self._trained():
            parameter.ds_tensor.data.copy_(safe_get_local_fp32_param(parameter))
        optimizer.checkpoint_event_epilogue()

    def _prepare_moments(self, steps: int) -> None:
        """Give every flat master its optimizer state, which DeepSpeed makes with the first step."""
        optimizer = self._engine.optimizer
        for number, master in enumerate(self.masters()):
            state = optimizer.optimizer.state[master]
            for key in self._moments:
                if key not in state:
                    state[key] = torch.zeros_like(master)
            state["step"] = torch.tensor(float(steps), device=master.device)  # as fused ones want
            if self._stage < 3:
                _link_moments(optimizer, number, master, state)


class _Handover(CheckpointEngine):
    """Where DeepSpeed thinks that it writes its files."""

    def __init__(self, writer: FileWriter) -> None:
        super().__init__()
        self.name = "coca-scale"
        self._writer = writer

    def create(self, _: Any) -> None:
        """DeepSpeed begins a checkpoint."""

    def commit(self, _: Any) -> bool:
        """DeepSpeed has handed over everything; `checkpoint.py` decides what is complete."""
        return True

    def save(self, state_dict: Any, path: str) -> None:
        """Copied now, and written when the writer starts."""
        self._writer.save(state_dict, Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        """A file that a run of ours wrote, or somebody who says so."""
        return read_pickle(Path(path), HARMLESS, place=map_location)


def _link_moments(
    optimizer: DeepSpeedZeroOptimizer, group: int, master: Tensor, state: dict[str, Any]
) -> None:
    for parameter in optimizer.bit16_groups[group]:
        mapping = parameter._hp_mapping
        if mapping is not None:
            mapping.set_optim_state_fragment(master, state)
