"""verl itself; a test file that imports this is skipped where verl is not installed."""

from __future__ import annotations

from typing import Any

import pytest

algorithms = pytest.importorskip("verl.trainer.ppo.core_algos")
functional = pytest.importorskip("verl.utils.torch_functional")

WHOLE_BATCH: dict[str, Any] = {
    "dp_size": 2,
    "batch_num_tokens": 31,
    "global_batch_size": 7,
    "loss_scale_factor": 5,
}


def actor_config(whole: dict[str, Any]) -> Any:
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=0.2,
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
        clip_ratio_c=2.5,
    )
    config.global_batch_info.update(whole)
    return config
