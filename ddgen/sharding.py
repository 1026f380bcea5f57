"""Weights of which every process holds a part (FSDP): the few places where a part is not the whole."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ddgen.errors import UserError


def check_supported(accelerator: Accelerator) -> None:
    """Refuses ways to spread a model over processes that training does not know.

    Raises:
        UserError: FSDP 1, DeepSpeed or Megatron.
    """
    kind = accelerator.distributed_type
    if uses_fsdp(accelerator):
        if not accelerator.is_fsdp2:
            raise UserError("accelerate launch --fsdp_version 1: not supported; use --fsdp_version 2")
        # Compute is autocast, as without FSDP; its own policy would also add up gradients in the coarser format.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    elif kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        name = kind.value.lower()
        raise UserError(f"accelerate launch --use_{name}: not supported; use --use_fsdp --fsdp_version 2")


def uses_fsdp(accelerator: Accelerator) -> bool:
    """Whether `accelerator.prepare` cuts models up."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def replicate(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    """Prepares a model that every process holds whole, also under FSDP, where accelerate would cut it up."""
    if uses_fsdp(accelerator):
        return DistributedDataParallel(model), optimizer
    prepared: tuple[nn.Module, Any] = accelerator.prepare(model, optimizer)
    return prepared


def is_sharded(model: nn.Module) -> bool:
    """Whether every process holds a part of the weights only."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this process holds; sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor; if it is sharded, every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """Returns a tensor that every process has whole, cut up like another one."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the optimizer's state dict with whole tensors; if they are sharded, every process must call this."""
    state = optimizer.state_dict()
    moments = {
        number: {name: whole(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return state | {"state": moments}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads what `whole_optimizer_state` returned."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {
            name: part_of(value, parameters[number]) if value.shape == parameters[number].shape else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": moments})
