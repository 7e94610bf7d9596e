"""Optimizer, learning rate and averaged weights of training. Defaults are the released recipe's."""

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
    """Groups for an optimizer, in the order of the model's parameters: `"decayed"`, and without weight decay
    `"not decayed"`, the biases and whatever has fewer than two dimensions. Frozen parameters are in neither. With a
    `backbone_learning_rate` those of a backbone are in two groups of their own.

    Raises:
        ValueError: every parameter is frozen.
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
            "no parameter of the model needs a gradient, so there is nothing to train; unfreeze some."
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
    """AdamW over [`parameter_groups`], with the fused kernel if the model is on CUDA already. A backbone that is not
    frozen learns at `backbone_factor` times the learning rate, by default at all of it.

    With that kernel and a gradient scaler, a step that is skipped for infinite gradients is skipped inside the
    kernel, and `accelerator.optimizer_step_was_skipped` does not tell.
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
    """The learning rate of a step, as a part of `peak`: a line from `start` at step 0 to `peak` at `warmup_steps`,
    then half a cosine to `floor` at the last step, `total_steps - 1`, and `floor` ever after.

    The released code counts its cosine from step 0, so that with its 10 of 30 epochs of warm-up the rate falls from
    1e-4 to 7.75e-5 at once when the cosine takes over; here it does not.
    """
    if step < warmup_steps:
        return (start + (peak - start) * step / warmup_steps) / peak
    progress = min((step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1), 1.0)
    return (floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2) / peak


def cosine_schedule(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, start: float = 1e-6, floor: float = 1e-5
) -> LambdaLR:
    """The schedule of [`learning_rate_factor`] with the optimizer's learning rate as its peak; groups with a rate of
    their own follow in proportion. Step it once an optimizer step.

    A state holds the step and the peak, not the shape: training that goes on with another `total_steps` follows the
    new ones. Accelerate steps a prepared scheduler once for each process, unless its
    `step_scheduler_with_optimizer` is False.

    Raises:
        ValueError: a warm-up that is not shorter than training, or rates that are not 0 <= start, floor <= peak.
    """
    peak = float(optimizer.defaults["lr"])
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps} of total_steps {total_steps}, expected 0 <= warmup_steps < total_steps."
        )
    if not (peak > 0 and 0 <= start <= peak and 0 <= floor <= peak):
        raise ValueError(
            f"learning rates start at {start}, have the peak {peak} and end at {floor}; expected a positive peak and "
            "start and floor from 0 to the peak."
        )
    shape: dict[str, Any] = {"warmup_steps": warmup_steps, "total_steps": total_steps}
    shape |= {"start": start, "floor": floor}
    return LambdaLR(optimizer, partial(learning_rate_factor, peak=peak, **shape))


@contextmanager
def own_settings_kept(optimizer: Optimizer, schedule: LambdaLR) -> Iterator[None]:
    """In the block an optimizer and its schedule may load states; afterwards they have their own rates, weight decay
    and betas again, at the state's step. Those of the state would otherwise hold until the end of the run."""
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
    """Exponential moving average of a model's weights; its buffers (BatchNorm statistics, prototypes) are copied.

    `update_parameters(model)` after each optimizer step, `state_dict` and `load_state_dict` are torch's.

    Args:
        model: unwrapped, on its device. The average is a copy of it in `module`.
        decay: weight of the old average. Update n (from 0) uses min(decay, (1 + n) / (10 + n)), so that the average
            soon forgets the start; the first one copies.

    Raises:
        ValueError: half-precision weights, whose average would stand still, or a decay outside 0 to 1.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}, expected a number from 0 to 1.")
        for dtype in {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}:
            raise ValueError(
                f"the weights are {dtype}, expected float32: load the model in float32 and train with mixed_precision."
            )

        def average(averages: Any, weights: Any, count: Tensor | int) -> None:
            ramp = (1 + int(count)) / (10 + int(count))
            get_ema_multi_avg_fn(min(decay, ramp))(averages, weights, count)

        super().__init__(model, multi_avg_fn=average)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Inside the block `model` (unwrapped) has the averaged weights; afterwards its own weights and buffers again,
        bit for bit, also where the block changed them. Takes memory for one more copy of the model."""
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            model.load_state_dict(self.module.state_dict())
            yield
        finally:
            model.load_state_dict(own)
