"""The Triton kernels of sequences as compiled for sm_80, sm_90 and sm_100.

No GPU is needed, nor used: the compiler is Triton's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("compiled, not interpreted", allow_module_level=True)

from triton_targets import compiled_for, resources

from rlhf_kernels import PPOLossConfig
from rlhf_kernels.backends import triton as backend
from rlhf_kernels.backends.triton import launch_advantages
from rlhf_kernels.ppo_types import GAEConfig

SLOW = pytest.mark.slow
ARCHITECTURES = [80, 90, 100]
# Those that combine what a few blocks left behind, in double precision.
IN_DOUBLE = {"total_kernel", "scaling_kernel", "finish_kernel"}


@pytest.fixture(params=[False, True], ids=["walk", "divided"])
def divided(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    monkeypatch.setattr(launch_advantages, "is_divided", lambda *sizes: request.param)
    yield request.param


def estimate(series: torch.Tensor, config: GAEConfig, kl_coef: float = 0.1) -> None:
    mask, of_sequences = torch.ones(series.shape, dtype=torch.bool), series[:, 0]
    backend.gae_forward(series, series, mask, None, None, config, None)
    backend.rollout_forward(
        *(of_sequences, series, series, series, mask, of_sequences, None),
        kl_coef,
        "k3",
        config,
        None,
    )


def lose(x: torch.Tensor, config: PPOLossConfig, all_series: bool = True) -> None:
    mask, optional = torch.ones(x.shape, dtype=torch.bool), x if all_series else None
    others = (optional, optional, optional, optional, optional, optional)
    backend.ppo_loss_forward(x, x, x, mask, *others, None, config, None)


def check(launches) -> None:
    for name, kernel in launches:
        used = resources(kernel)
        print(f"{name}: {used.registers} registers")
        assert used.stack == 0, f"{name} spills"
        assert not any(i.startswith(("LDL", "STL")) for i in used.instructions)
        assert name in IN_DOUBLE or ".f64" not in kernel.asm["ptx"], f"{name} is in double"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("masked", ["skip", pytest.param("decay", marks=SLOW)])
def test_advantages_do_not_spill(architecture, masked, divided):
    with compiled_for(architecture) as launches:
        estimate(torch.zeros(4, 3000), GAEConfig(0.99, 0.95, 1.0, masked))
    kernels = ["advantages_kernel"] * (4 if divided else 2) + ["total_kernel"]
    assert [name for name, _ in launches] == kernels
    check(launches)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whitening_does_not_spill(architecture):
    x, mask = torch.zeros(4, 3000), torch.ones(4, 3000, dtype=torch.bool)
    with compiled_for(architecture) as launches:
        backend.whiten(x, mask, backend.moments(x, mask), True, 1e-8)
    kernels = ["moments_kernel", "total_kernel", "scaling_kernel", "whiten_kernel"]
    assert [name for name, _ in launches] == kernels
    check(launches)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "aggregation", ["seq-mean-token-mean", pytest.param("token-mean", marks=SLOW)]
)
def test_the_loss_reads_whole_vectors(architecture, aggregation):
    """Of all nine series, and of all three gradients, where a block is whole."""
    with compiled_for(architecture) as launches:
        lose(torch.zeros(8, 4096), PPOLossConfig(dual_clip=3.0, aggregation=aggregation))
        lose(torch.zeros(8, 4097)[:, 1:], PPOLossConfig(aggregation=aggregation))
    names = ["count_kernel", "divisor_kernel", "_loss_kernel", "finish_kernel"]
    assert [name for name, _ in launches] == 2 * names
    check(launches)
    instructions = resources(launches[2][1]).instructions
    assert instructions.count("LDG.E.128") == 9 * 2 and instructions.count("STG.E.128") == 3 * 2


def test_sizes_and_numbers_share_their_compilations(divided):
    with compiled_for(90) as launches:
        for shape in ((1, 1), (1, 16), (2, 1000), (16, 4096), (33, 17)):
            for gamma, lam, kl_coef in ((1.0, 0.95, 0.0), (0.5, 1.0, 1.0), (0.0, 0.3, 0.1)):
                wide = torch.empty(shape[0], shape[1] + 3)
                for series in (torch.empty(shape), wide[:, 3:], wide[:, :-3]):
                    estimate(series, GAEConfig(gamma, lam, 0.9, "skip"), kl_coef)
    # Given rewards or shaped ones, each in one kernel or two; and the total.
    assert len({kernel.hash for _, kernel in launches}) == (5 if divided else 3)


def test_losses_share_their_compilations():
    """But for whether all memory keeps to boundaries of 16 bytes."""
    with compiled_for(90) as launches:
        for shape in ((1, 1), (1, 16), (2, 1000), (16, 4096), (33, 17)):
            for clip_range, coef in ((0.2, 0.0), (1.0, 1.0), (0.5, 16.0)):
                config = PPOLossConfig(clip_range, None, coef + 2.0, clip_range, coef, coef)
                wide = torch.empty(shape[0], shape[1] + 3)
                for series in (torch.empty(shape), wide[:, 3:], wide[:, :-3]):
                    lose(series, config)
    assert len({k.hash for name, k in launches if name == "_loss_kernel"}) == 2
    assert len({k.hash for name, k in launches if name != "_loss_kernel"}) == 3


def test_whitening_shares_its_compilations():
    total = torch.zeros(3, dtype=torch.float64)
    with compiled_for(90) as launches:
        for shape in ((1, 1), (16,), (2, 1000), (33, 17)):
            for eps in (1e-8, 1, 0.0):
                for x in (torch.empty(shape), torch.empty(*shape, 2)[..., 1]):
                    mask = torch.ones(shape, dtype=torch.bool)
                    backend.moments(x, mask)
                    backend.whiten(x, mask, total, True, eps)
    assert len({kernel.hash for _, kernel in launches}) == 4
