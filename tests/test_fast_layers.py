"""Layers of models run by this package's kernels: the same numbers, and only where they belong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaMLP, GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3MLP, Qwen3RMSNorm

from rlhf_kernels import backends, fast_layers
from rlhf_kernels.fast_attention import attend, fast_attention
from rlhf_kernels.fast_layers import use_fast_layers
from rlhf_kernels.fast_rotary import fast_rotary
from rlhf_kernels.ops.gated_mlp import gated_mlp
from rlhf_kernels.ops.rotary import rotary
from rlhf_kernels.ops.row_attention import row_attention

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None, reason="the C++ kernels are not built"
)
EPS = torch.finfo(torch.float32).eps
SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2}
IDS = torch.arange(24).view(2, 12) % 17


def drawn(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def replaced(module: nn.Module) -> bool:
    return "forward" in vars(module)


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    x = x.clone().requires_grad_()
    output = module(x)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    return [output.detach(), *torch.autograd.grad(output, [x, *module.parameters()], upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "module",
    [
        drawn(LlamaMLP(LlamaConfig(**SIZES))),
        drawn(Qwen3MLP(Qwen3Config(**SIZES))),
        drawn(LlamaRMSNorm(12, eps=1e-5)),
        drawn(Qwen3RMSNorm(12)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_results_and_gradients_are_those_of_float64(module: nn.Module, dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    fast = copy.deepcopy(module).to(dtype)
    use_fast_layers(fast)
    assert replaced(fast)
    exact = results(copy.deepcopy(module).to(dtype).double(), x.double())
    theirs = results(copy.deepcopy(module).to(dtype), x)
    for found, expected, plain in zip(results(fast, x), exact, theirs, strict=True):
        assert found.dtype == dtype
        size = 1 + float(expected.abs().max())
        error = float((found.double() - expected).abs().max())
        # No farther off than PyTorch's own by more than a few roundings.
        allowed = float((plain.double() - expected).abs().max()) + 4 * torch.finfo(dtype).eps * size
        assert error <= allowed


@pytest.mark.parametrize(
    "module",
    [
        drawn(GemmaMLP(GemmaConfig(**SIZES))),  # another activation
        drawn(GemmaRMSNorm(12)),  # 1 + weight
        nn.LayerNorm(12),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_computes_something_else_is_left_alone(module: nn.Module) -> None:
    use_fast_layers(module)
    assert not replaced(module)


def test_a_class_that_looks_alike_is_left_alone() -> None:
    class Scaled(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Other(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 1e-3

    for module in (Scaled(LlamaConfig(**SIZES)), Other(12)):
        use_fast_layers(module)
        assert not replaced(module)


def test_biases_adapters_and_float64_are_left_to_pytorch() -> None:
    with_bias = LlamaMLP(LlamaConfig(**SIZES, mlp_bias=True))
    use_fast_layers(with_bias)
    assert not replaced(with_bias)
    mlp = drawn(LlamaMLP(LlamaConfig(**SIZES)))
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    expected = copy.deepcopy(mlp)
    use_fast_layers(mlp)
    expected.up_proj = mlp.up_proj = nn.Sequential(mlp.up_proj, nn.Tanh())  # since then
    assert torch.allclose(mlp(x), expected(x), rtol=0, atol=32 * EPS * float(expected(x).max()))
    wide, exact = mlp.double()(x.double()), expected.double()(x.double())
    assert torch.allclose(wide, exact, rtol=0, atol=1e-14 * float(exact.abs().max()))


def test_who_watches_a_layer_of_it_goes_on_seeing_it() -> None:
    mlp, x = drawn(LlamaMLP(LlamaConfig(**SIZES))), torch.ones(3, 12)
    use_fast_layers(mlp)
    unseen = mlp(x)
    seen = []
    mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    output = mlp(x)
    assert len(seen) == 1 and seen[0] is output
    assert torch.allclose(
        output, unseen, rtol=0, atol=32 * EPS * (1 + float(unseen.detach().abs().max()))
    )
    other = drawn(LlamaMLP(LlamaConfig(**SIZES)))
    other.gate_proj.register_full_backward_hook(lambda *_: None)
    use_fast_layers(other)
    assert not replaced(other)


@pytest.mark.parametrize("module", [LlamaMLP(LlamaConfig(**SIZES)), LlamaRMSNorm(12)])
def test_a_forward_that_someone_else_has_put_there_stays(module: Any) -> None:
    """As accelerate's hooks do."""
    module.forward = theirs = lambda x: x
    use_fast_layers(module)
    with fast_layers.fast_layers(module):
        assert module.forward is theirs
    assert module.forward is theirs


def test_under_autocast_it_is_pytorch_s_product() -> None:
    mlp = drawn(LlamaMLP(LlamaConfig(**SIZES)))
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        expected = mlp(x)
        use_fast_layers(mlp)
        found = mlp(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    size = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 4 * torch.finfo(torch.bfloat16).eps * size


def test_a_model_has_the_same_logits_and_gradients_inside_and_is_as_before_after() -> None:
    model = tiny_llama()
    before = [vars(module).get("forward") for module in model.modules()]
    plain = model(IDS).logits
    plain.square().mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with fast_layers.fast_layers(model):
        assert sum(map(replaced, model.modules())) >= 3 * model.config.num_hidden_layers
        logits = model(IDS).logits
    logits.square().mean().backward()
    assert [vars(module).get("forward") for module in model.modules()] == before
    assert torch.allclose(logits, plain, rtol=0, atol=64 * EPS * float(plain.abs().max()))
    largest = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=0, atol=64 * EPS * largest), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_embeddings_are_the_kernel_s_inside(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama().to(dtype)
    theirs = modeling_llama.apply_rotary_pos_emb
    exact = copy.deepcopy(model).double()(IDS).logits
    plain = model(IDS).logits
    calls = []
    monkeypatch.setattr(
        "rlhf_kernels.fast_rotary.rotary", lambda *args: calls.append(0) or rotary(*args)
    )
    with fast_rotary(nn.ModuleList([model])):  # wherever the model is
        assert modeling_llama.apply_rotary_pos_emb is not theirs
        found = model(IDS).logits
    assert len(calls) >= 2 * model.config.num_hidden_layers
    assert modeling_llama.apply_rotary_pos_emb is theirs
    allowed = float((plain.double() - exact).abs().max())
    allowed += 8 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert float((found.double() - exact).abs().max()) <= allowed


def test_rotary_embeddings_of_another_kind_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        return q * cos.unsqueeze(unsqueeze_dim), k * cos.unsqueeze(unsqueeze_dim)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    with fast_rotary(tiny_llama()):
        assert modeling_llama.apply_rotary_pos_emb is apply_rotary_pos_emb
    monkeypatch.delattr(modeling_llama, "apply_rotary_pos_emb")
    with fast_rotary(tiny_llama()), fast_rotary(nn.Linear(1, 1)):
        assert not hasattr(modeling_llama, "apply_rotary_pos_emb")


def test_rotary_embeddings_are_put_back_after_an_error() -> None:
    theirs = modeling_llama.apply_rotary_pos_emb
    with pytest.raises(RuntimeError), fast_rotary(tiny_llama()):
        raise RuntimeError
    assert modeling_llama.apply_rotary_pos_emb is theirs


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_without_padding_are_attended_to_by_the_kernel(
    padded: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama().to(dtype)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0 if padded else 1
    exact = copy.deepcopy(model).double()(IDS, attention_mask=mask).logits.detach()
    plain = model(IDS, attention_mask=mask).logits.detach()
    calls = []
    monkeypatch.setattr(
        "rlhf_kernels.fast_attention.row_attention",
        lambda *args: calls.append(0) or row_attention(*args),
    )
    with fast_attention(nn.ModuleList([model])):
        found = model(IDS, attention_mask=mask).logits
    found.float().square().mean().backward()  # outside
    assert len(calls) == (0 if padded else model.config.num_hidden_layers)
    assert model.config._attn_implementation == "sdpa"
    real = mask.bool()
    allowed = float((plain.double() - exact)[real].abs().max())
    allowed += 8 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert float((found.detach().double() - exact)[real].abs().max()) <= allowed


def test_models_that_ask_for_the_name_of_their_attention_find_it() -> None:
    """Some choose by it what they compute, and one name is for all models inside another."""
    model = tiny_llama()
    seen = []
    model.model.layers[0].register_forward_hook(
        lambda *_: seen.append(model.config._attn_implementation)
    )
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with fast_attention(model):
        model(IDS)
    assert seen == ["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


@pytest.mark.parametrize(
    "change",
    [
        {"indices": torch.zeros(1)},  # of a sparse attention
        {"cache": object()},
        {"value": torch.zeros(1, 2, 5, 6)},  # of another size than keys, as with latent attention
        {"attention_mask": torch.ones(1, 1, 5, 5, dtype=torch.bool)},
        {"dropout": 0.1},
        {"is_causal": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_kernel_does_not_do_is_left_to_the_attention_it_stands_in_for(
    change: dict[str, Any],
) -> None:
    given = {name: torch.zeros(1, 2, 5, 4) for name in ("query", "key", "value")}
    arguments = {**given, "attention_mask": None, "position_ids": torch.arange(5), **change}

    def theirs(*args: Any, **options: Any) -> Any:
        assert all(options[name] is change[name] for name in options.keys() & change.keys())
        return args, None

    args, _ = attend(theirs, None, **arguments)
    assert args[1:] == tuple(
        arguments[name] for name in ("query", "key", "value", "attention_mask")
    )
    found, _ = attend(theirs, None, **given, attention_mask=None, position_ids=torch.arange(5))
    assert isinstance(found, Tensor)


class MLPWithDropout(LlamaMLP):
    """As SeedOss has it: a function, no module, so that it shows in training alone."""

    def __init__(self, config: LlamaConfig, dropout: float) -> None:
        super().__init__(config)
        self.residual_dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), self.residual_dropout, self.training)


def test_a_layer_that_differs_in_training_alone_runs_as_it_is() -> None:
    config = LlamaConfig(**SIZES)
    state = torch.random.get_rng_state()
    with_dropout, without = MLPWithDropout(config, 0.1), MLPWithDropout(config, 0.0)
    drawn_by_them = torch.random.get_rng_state()
    for module in (with_dropout.eval(), with_dropout.train(), without.train()):
        use_fast_layers(module)
        assert replaced(module) == (module is without)
    assert torch.equal(torch.random.get_rng_state(), drawn_by_them)
    torch.random.set_rng_state(state)


def test_layers_checkpointed_by_pytorch_s_wrapper_are_left_alone() -> None:
    model = tiny_llama().train()
    expected = torch.autograd.grad(model(IDS).logits.square().mean(), list(model.parameters()))
    kind = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kind))
    with fast_layers.fast_layers(model), fast_rotary(model), fast_attention(model):
        loss = model(IDS).logits.square().mean()
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointed_layers_are_the_same_ones_when_they_run_again() -> None:
    model = tiny_llama().train()
    expected = torch.autograd.grad(model(IDS).logits.square().mean(), list(model.parameters()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with fast_layers.fast_layers(model), fast_rotary(model), fast_attention(model):
        loss = model(IDS).logits.square().mean()
    found = torch.autograd.grad(loss, list(model.parameters()))
    use_fast_layers(model)  # to stay
    again = torch.autograd.grad(model(IDS).logits.square().mean(), list(model.parameters()))
    largest = max(float(grad.abs().max()) for grad in expected)
    for name, grads in zip(dict(model.named_parameters()), zip(expected, found, again)):
        for grad in grads:
            assert torch.allclose(grad, grads[0], rtol=0, atol=64 * EPS * largest), name


def test_the_layer_can_be_compiled_and_checked() -> None:
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((3, 5), (7, 5), (7, 5), (4, 7))]
    torch.library.opcheck(torch.ops.rlhf_kernels.gated_mlp, leaves)
    compiled = torch.compile(gated_mlp, fullgraph=True)
    expected = torch.autograd.grad(gated_mlp(*leaves).sum(), leaves)
    for one, other in zip(torch.autograd.grad(compiled(*leaves).sum(), leaves), expected):
        assert torch.allclose(one, other, rtol=0, atol=8 * EPS * (1 + float(other.abs().max())))


def test_gradients_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (7, 5), (7, 5), (4, 7))
    leaves = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    assert torch.autograd.gradcheck(gated_mlp, [leaf.requires_grad_() for leaf in leaves])
    for needed in range(4):
        some = [leaf.detach().requires_grad_(at == needed) for at, leaf in enumerate(leaves)]
        assert torch.autograd.gradcheck(gated_mlp, some)


def test_without_the_kernels_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_layers, "unavailable_reason", lambda name: "not built")
    model = LlamaMLP(LlamaConfig(**SIZES))
    use_fast_layers(model)
    assert not replaced(model)
    assert isinstance(model.act_fn, type(ACT2FN["silu"]))
