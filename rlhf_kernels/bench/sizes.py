"""The named sizes: how much of the grid a run covers, and for how long each case is timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf_kernels.bench.operation import Grid


@dataclass(frozen=True)
class Size:
    """turns: of each case, at the most. seconds: after which no new turn of a case begins."""

    grid: Grid
    turns: int
    seconds: float


def _sizes(large: Grid, default: Grid) -> dict[str, Size]:
    small = replace(large, rows=64, hidden=64, vocabularies=(32_000,), sequences=((8, 128),))
    return {
        "small": Size(small, turns=3, seconds=1.0),
        "default": Size(default, turns=15, seconds=2.0),
        "large": Size(large, turns=15, seconds=2.0),
    }


# Llama 2, SmolLM2, Llama 3, Qwen 2.5, Gemma 3.
_VOCABULARIES = (32_000, 49_152, 128_256, 151_936, 262_144)
# Few processors multiply bfloat16 faster than float32; the products then hide all else.
_CPU = Grid("cpu", 256, 576, _VOCABULARIES, ("float32", "bfloat16"), ("float32",))
_CUDA = Grid("cuda", 8192, 4096, _VOCABULARIES, ("bfloat16", "float32"), ("bfloat16",))
SIZES = {
    # By default of one size each: two cores then take some minutes.
    "cpu": _sizes(_CPU, replace(_CPU, vocabularies=(32_000,), sequences=((512, 1024),))),
    "cuda": _sizes(_CUDA, replace(_CUDA, vocabularies=(32_000, 128_256))),
}
