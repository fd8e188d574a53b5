"""The Triton kernels as compiled for sm_80, sm_90 and sm_100: loads, spills, and how many variants.

No GPU is needed, nor used: the compiler is Triton's own.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("compiled, not interpreted", allow_module_level=True)

from triton_targets import compiled_for, resources

from rlhf_kernels.backends.triton import launch_token_logprobs as backend

ARCHITECTURES = [80, 90, 100]
# Rows that begin and end on 16-byte boundaries, and rows that need not.
WIDTHS = [8192, 8193]
KERNELS = ["backward_kernel", "combine_kernel", "forward_kernel", "partial_kernel"]


def launch(
    logits: torch.Tensor, need_entropy: bool, temperature: float | torch.Tensor = 1.0
) -> None:
    rows = len(logits)
    targets, numbers = torch.zeros(rows, dtype=torch.long), torch.ones(rows)
    backend.token_logprobs_forward(logits, targets, temperature, -100, need_entropy)
    entropy = numbers if need_entropy else None
    backend.token_logprobs_backward(
        numbers,
        entropy,
        logits,
        targets,
        temperature,
        -100,
        torch.ones(rows, 2),
        entropy,
        out=logits,
    )


def launch_divided(monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor, entropy: bool) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(backend, "processors", lambda device: 132)
        launch(logits, entropy)


def cases():
    """(dtype, width, entropy): in every run bfloat16, and where registers are scarcest."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for width in WIDTHS:
            for entropy in (True, False):
                quick = (width == 8192 and entropy) or (dtype == torch.bfloat16 and entropy)
                quick = quick or (dtype == torch.bfloat16 and width == 8192)
                yield pytest.param(dtype, width, entropy, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype, width, entropy", list(cases()))
def test_wide_loads_and_no_spills(monkeypatch, architecture, dtype, width, entropy):
    logits = torch.zeros(16, width, dtype=dtype)
    with compiled_for(architecture) as launches:
        launch(logits, entropy)
        launch_divided(monkeypatch, logits, entropy)
    kernels = dict(launches)
    assert sorted(kernels) == KERNELS
    vectors = backend.BLOCK_VECTORS // (32 * backend.NUM_WARPS)  # of a block, for each thread
    for name, kernel in kernels.items():
        used = resources(kernel)
        print(f"sm_{architecture} {dtype} V={width} entropy={entropy} {name}: {used.registers}")
        assert used.stack == 0, f"{name} spills"
        assert not any(i.startswith(("LDL", "STL")) for i in used.instructions)
        assert ".f64" not in kernel.asm["ptx"], f"{name} computes in double precision"
        if name == "combine_kernel":
            continue  # reads a few numbers a row
        # In the loop, or in backward's branch for blocks inside of a row; where rows begin and end
        # on boundaries, at their ends too. Nothing else that is read is as wide as a vector.
        wide = used.instructions.count("LDG.E.128")
        assert wide == (2 * vectors if width == 8192 else vectors)
        if name == "backward_kernel":
            stores = used.instructions.count("STG.E.128")
            assert stores == 2 * wide  # zeros of ignored rows, or the gradient


def variants(launches):
    return {kernel.hash for _, kernel in launches}


def test_sizes_share_their_compilations(monkeypatch):
    """Within a bucket (rows on boundaries or not, divided or not) no size compiles anew."""
    with compiled_for(90) as launches:
        for rows in (1, 2, 15, 16, 33):
            for width in (8, 16, 504, 4096, 8200, 151936):
                launch(torch.empty(rows, width, dtype=torch.bfloat16), True)
                launch_divided(monkeypatch, torch.empty(rows, width, dtype=torch.bfloat16), True)
        aligned = variants(launches)
        assert sorted({name for name, _ in launches}) == KERNELS
        assert len(aligned) == 4
        for rows in (1, 2, 16):
            for width in (1, 2, 511, 513, 4097, 50257):
                launch(torch.empty(rows, width, dtype=torch.bfloat16), True)
                launch_divided(monkeypatch, torch.empty(rows, width, dtype=torch.bfloat16), True)
        assert len(variants(launches)) - len(aligned) == 3  # combining knows no alignment


def test_numbers_and_addresses_share_their_compilations():
    """Nor does a temperature, what is ignored, or where a tensor's memory begins."""
    logits = torch.empty(8, 4096, dtype=torch.bfloat16)
    numbers = torch.ones(20)
    ids = torch.zeros(20, dtype=torch.long)
    with compiled_for(90) as launches:
        for temperature in (1.0, 1, 2, 0.7):
            for ignore_index in (-100, 1, 0, 16, 2**40):
                for at in (0, 1, 2):
                    backend.token_logprobs_forward(
                        logits, ids[at : at + 8], temperature, ignore_index, False
                    )
        assert len(variants(launches)) == 1
        for at in (0, 1, 2):
            tau = numbers[at : at + 8]
            backend.token_logprobs_forward(logits, ids[at : at + 8], tau, -100, False)
            for rows in (logits, logits[:, 8:], logits[2:5]):
                few = slice(at, at + len(rows))
                backend.token_logprobs_forward(rows, ids[few], numbers[few], -100, False)
        assert len(variants(launches)) == 2
