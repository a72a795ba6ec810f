"""Rollouts: engines that write completions."""

from specs_fast.rollout.engine import Engine
from specs_fast.rollout.sampler import Sampler

__all__ = ["Engine", "Sampler"]
