"""Group-relative advantages."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4


def group_advantages(reward: Tensor, group_size: int, *, scale: str = "group") -> tuple[Tensor, Tensor]:
    """A_i = (R_i - mean_g) / (std + 1e-4) for consecutive groups of ``group_size`` rewards.

    reward: float ``[B*G]``. Returns (advantages ``[B*G]`` fp32, zero-variance flags bool ``[B]``).
    scale: "group" divides by the group's sample standard deviation (GRPO, arXiv 2402.03300; TRL's epsilon), "batch" by
    that of all rewards (Lite-PPO, arXiv 2508.08221), "none" not at all (Dr. GRPO, arXiv 2503.20783).
    A group of equal rewards has advantages of exactly zero. ValueError for a size that does not divide or is below 2,
    an unknown scale, or a reward that is not finite (naming its index).
    """
    if group_size < 2 or reward.numel() % group_size:
        raise ValueError(f"{reward.numel()} rewards do not form groups of {group_size} (at least 2)")
    if not torch.isfinite(reward).all():
        index = int((~torch.isfinite(reward)).nonzero()[0])
        raise ValueError(
            f"reward {index} (group {index // group_size}) is {float(reward[index])}; rewards must be finite"
        )
    groups = reward.double().view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    flat = groups.amax(dim=1) == groups.amin(dim=1)
    centred = centred.masked_fill(flat[:, None], 0.0)
    if scale == "group":
        centred = centred / (groups.std(dim=1, keepdim=True) + EPSILON)
    elif scale == "batch":
        centred = centred / (groups.std() + EPSILON)
    elif scale != "none":
        raise ValueError(f"scale_rewards must be 'group', 'batch' or 'none', got {scale!r}")
    return centred.float().flatten(), flat
