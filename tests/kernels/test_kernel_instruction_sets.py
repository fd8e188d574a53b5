"""A compact part of the suite over each instruction set that the cpu backend has code for here.

Wide vocabularies with tails, every dtype, recursions, clipped losses, strides, awkward rows: the
same test functions, run again.
"""

from __future__ import annotations

import pytest
from kernel_cases import ROW_PRIMITIVES, backends_for
from test_cached_attention import test_agrees_with_float64 as test_cached_attention
from test_cached_attention import test_hidden_keys_do_not_matter as test_cached_attention_hidden
from test_kernel_gae import test_agrees_with_float64 as test_gae
from test_kernel_gae import test_padding_and_holes_do_not_matter as test_gae_padding
from test_kernel_gae import test_sizes as test_gae_sizes
from test_kernel_layers import (
    test_rms_norm_agrees_with_float64,
    test_rms_norm_lets_special_values_through,
    test_rms_norm_strides,
    test_rotary_agrees_with_float64,
    test_rotary_lets_special_values_through,
    test_rotary_strides,
    test_swiglu_agrees_with_float64,
    test_swiglu_lets_special_values_through,
    test_swiglu_over_the_whole_range,
    test_swiglu_strides,
)
from test_kernel_ppo_loss import test_a_valid_nan_is_not_hidden as test_ppo_loss_nan
from test_kernel_ppo_loss import test_agrees_with_float64 as test_ppo_loss
from test_kernel_ppo_loss import test_any_mask as test_ppo_loss_masks
from test_kernel_ppo_loss import test_masked_content_does_not_matter as test_ppo_loss_masked
from test_kernel_ppo_loss import test_ties_follow_the_unclipped_branch as test_ppo_loss_ties
from test_kernel_row_attention import test_a_nan_stays_in_its_row as test_row_attention_nan
from test_kernel_row_attention import test_agrees_with_float64 as test_row_attention
from test_kernel_row_attention import (
    test_large_scores_and_infinite_ones as test_row_attention_scores,
)
from test_kernel_token_logprobs import (
    test_a_row_of_minus_infinity_is_nan_alone,
    test_agrees_with_float64,
    test_extreme_logits,
    test_ignored_rows_give_zero_whatever_they_hold,
    test_layouts,
    test_minus_infinity_masks_columns,
    test_nan_logits_are_not_hidden,
    test_temperature,
)

from rlhf_kernels import info
from rlhf_kernels.backends import cpu_extension

__all__ = [
    "test_a_row_of_minus_infinity_is_nan_alone",
    "test_agrees_with_float64",
    "test_cached_attention",
    "test_cached_attention_hidden",
    "test_extreme_logits",
    "test_gae",
    "test_gae_padding",
    "test_gae_sizes",
    "test_ignored_rows_give_zero_whatever_they_hold",
    "test_layouts",
    "test_minus_infinity_masks_columns",
    "test_nan_logits_are_not_hidden",
    "test_ppo_loss",
    "test_ppo_loss_masked",
    "test_ppo_loss_masks",
    "test_ppo_loss_nan",
    "test_ppo_loss_ties",
    "test_rms_norm_agrees_with_float64",
    "test_rms_norm_lets_special_values_through",
    "test_rms_norm_strides",
    "test_rotary_agrees_with_float64",
    "test_rotary_lets_special_values_through",
    "test_rotary_strides",
    "test_row_attention",
    "test_row_attention_nan",
    "test_row_attention_scores",
    "test_swiglu_agrees_with_float64",
    "test_swiglu_lets_special_values_through",
    "test_swiglu_over_the_whole_range",
    "test_swiglu_strides",
    "test_temperature",
]

if "cpu" not in backends_for(*ROW_PRIMITIVES):
    pytest.skip("the cpu backend is not built", allow_module_level=True)

from rlhf_kernels import _cpu

pytestmark = pytest.mark.parametrize("backend", ["cpu"])


@pytest.fixture(scope="module", autouse=True, params=_cpu.isas())
def instruction_set(request):
    usual = _cpu.isa()
    _cpu.use_isa(request.param)
    yield request.param
    _cpu.use_isa(usual)


def test_info_says_which_is_used(backend, instruction_set):
    assert f"{instruction_set} code" in info.report()


def test_an_unknown_one_is_a_reason(backend, monkeypatch):
    module = cpu_extension
    monkeypatch.setenv(module.ISA_VARIABLE, "avx1024")
    assert "RLHF_KERNELS_CPU_ISA" in module._load()[1]
