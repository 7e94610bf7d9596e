"""Optimizer, learning rate schedule and averaged weights. The defaults are those of the released recipe."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

BACKBONE = "vision_model.embeddings.patch_embeddings.backbone."


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.05, backbone_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, in the order of the model's parameters. Weights with at least two dimensions
    are in `"decayed"`; biases and all others are in `"not decayed"`, without weight decay. Frozen parameters are left
    out. With a `backbone_learning_rate`, the backbone's parameters are in two separate groups.

    Raises:
        ValueError: if all parameters are frozen.
    """
    names = ["decayed", "not decayed", "backbone, decayed", "backbone, not decayed"]
    groups: list[dict[str, Any]] = [
        {"name": name, "params": [], "weight_decay": 0.0 if "not" in name else weight_decay} for name in names
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim > 1 and name.rpartition(".")[2] != "bias"
            is_backbone = backbone_learning_rate is not None and name.startswith(BACKBONE)
            groups[2 * is_backbone + (not is_decayed)]["params"].append(parameter)
    if not any(group["params"] for group in groups):
        raise ValueError(
            "all parameters of the model are frozen, so there is nothing to train; unfreeze some of them."
        )
    for group in groups[2:]:
        group["lr"] = backbone_learning_rate
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    backbone_factor: float | None = None,
) -> AdamW:
    """AdamW over [`parameter_groups`], fused if the model is already on CUDA. The learning rate of a backbone that is
    not frozen is multiplied by `backbone_factor`, if given.

    With the fused kernel and a gradient scaler, steps with infinite gradients are skipped inside the kernel, so
    `accelerator.optimizer_step_was_skipped` does not report them.
    """
    backbone_rate = None if backbone_factor is None else backbone_factor * learning_rate
    groups = parameter_groups(model, weight_decay, backbone_rate)
    on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return AdamW(groups, lr=learning_rate, betas=betas, fused=on_cuda or None)


def learning_rate_factor(
    step: int,
    warmup_steps: int,
    total_steps: int,
    peak: float = 1e-4,
    start: float = 1e-6,
    floor: float = 1e-5,
) -> float:
    """The learning rate of a step, divided by `peak`. It rises linearly from `start` at step 0 to `peak` at
    `warmup_steps`, then follows half a cosine down to `floor` at the last step, `total_steps - 1`, and stays there.

    In the released code the cosine starts at step 0. With its 10 warm-up epochs of 30, the rate therefore drops from
    1e-4 to 7.75e-5 in one step at the end of the warm-up, which this function avoids.
    """
    if step < warmup_steps:
        return (start + (peak - start) * step / warmup_steps) / peak
    progress = min((step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1), 1.0)
    return (floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2) / peak


def cosine_schedule(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, start: float = 1e-6, floor: float = 1e-5
) -> LambdaLR:
    """A scheduler for [`learning_rate_factor`] with the optimizer's learning rate as the peak. Groups with a different
    rate are scaled proportionally. Step it once per optimizer step.

    The state contains the step and the peak but not the shape, so a run resumed with another `total_steps` follows the
    new one. Accelerate steps a prepared scheduler once per process unless `step_scheduler_with_optimizer` is False.

    Raises:
        ValueError: if the warm-up is not shorter than training, or not 0 <= start, floor <= peak.
    """
    peak = float(optimizer.defaults["lr"])
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps} of total_steps {total_steps}, expected 0 <= warmup_steps < total_steps."
        )
    if not (peak > 0 and 0 <= start <= peak and 0 <= floor <= peak):
        raise ValueError(
            f"learning rates start at {start}, peak at {peak} and end at {floor}; expected a positive peak, and start "
            "and end between 0 and the peak."
        )
    shape: dict[str, Any] = {"warmup_steps": warmup_steps, "total_steps": total_steps}
    shape |= {"start": start, "floor": floor}
    return LambdaLR(optimizer, partial(learning_rate_factor, peak=peak, **shape))


@contextmanager
def own_settings_kept(optimizer: Optimizer, schedule: LambdaLR) -> Iterator[None]:
    """A context in which an optimizer and its schedule can load states. On exit they get back their own learning rates,
    weight decay and betas, at the loaded step, so that changed settings take effect in a resumed run."""
    own = [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    peaks = list(schedule.base_lrs)
    yield
    schedule.base_lrs = peaks
    rates = [peak * factor(schedule.last_epoch) for peak, factor in zip(peaks, schedule.lr_lambdas)]
    schedule._last_lr = rates
    for group, settings, rate in zip(optimizer.param_groups, own, rates, strict=True):
        group.update(settings | {"lr": rate})


class ExponentialMovingAverage(AveragedModel):
    """Exponential moving average of a model's weights; buffers (BatchNorm statistics, prototypes) are copied.

    Call `update_parameters(model)` after each optimizer step. `state_dict` and `load_state_dict` work as in torch.

    Args:
        model: the unwrapped model on its device. The average is a copy of it in `module`.
        decay: weight of the old average. Update n (from 0) uses min(decay, (1 + n) / (10 + n)), so that the initial
            weights are forgotten quickly; the first update copies the weights.

    Raises:
        ValueError: if weights are in half precision, where the average would not change, or `decay` is not in [0, 1].
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}, expected a number from 0 to 1.")
        for dtype in {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}:
            raise ValueError(
                f"the weights are {dtype}, expected float32; load the model in float32 and use mixed_precision."
            )

        def average(averages: Any, weights: Any, count: Tensor | int) -> None:
            ramp = (1 + int(count)) / (10 + int(count))
            get_ema_multi_avg_fn(min(decay, ramp))(averages, weights, count)

        super().__init__(model, multi_avg_fn=average)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """A context in which `model` (unwrapped) has the averaged weights. On exit its own weights and buffers are
        restored exactly, even if they were changed. This needs memory for another copy of the model."""
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            model.load_state_dict(self.module.state_dict())
            yield
        finally:
            model.load_state_dict(own)
