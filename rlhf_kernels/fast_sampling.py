"""Llama-like models while they sample on a CPU: each decoder layer as one function.

A step of sampling has one token a row. Calling a layer's modules one by one, and multiplying by q,
k and v, gate and up apart, takes longer than its products then.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from rlhf_kernels.backends import unavailable_reason
from rlhf_kernels.fast_attention import NAME
from rlhf_kernels.fast_layers import (
    draw,
    draw_weights,
    functions_of,
    is_gated_mlp,
    is_rms_norm,
    replacement,
    settings_of,
)
from rlhf_kernels.linear_layers import (
    keeping_forwards,
    linear_layers,
    packable,
    packed_for_sampling,
    packed_product,
)
from rlhf_kernels.ops.rms_norm import rms_norm
from rlhf_kernels.ops.rotary import rotary
from rlhf_kernels.ops.swiglu import swiglu

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
# transformers leaves its hooks on layers and attentions once hidden states were asked for. Those of
# layers run, and attentions give nothing to record here.
CAPTURING = "transformers.utils.output_capturing"

_agrees: dict[tuple[Any, ...], bool] = {}


@contextmanager
def fast_sampling(model: nn.Module, rows: int) -> Iterator[None]:
    """`packed_for_sampling`, with the decoder layers of Llama-like models as one function each.

    Layers that compute something else, seen on a few numbers, are as before, and so is every call
    that is none of sampling: with gradients, without transformers' own cache, in another type than
    the weights'. Inside, the weights must not change, the model cannot be copied, and hooks that
    are put on parts of a layer do not run.

    Args:
        model: A causal model of transformers. rows: How many there will be, about.

    Raises:
        TypeError: It is no model, but perhaps the name of one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}; expected a loaded model, an nn.Module")
    layers = (
        [] if unavailable_reason("cpu") is not None else list(filter(_is_layer, model.modules()))
    )
    inside = {linear for layer in layers for linear in linear_layers(layer)}
    with keeping_forwards(layers), packed_for_sampling(model, rows, leaving_out=inside) as packs:
        for layer in layers if packs else ():
            layer.forward = FusedLayer(layer, rows)  # type: ignore[assignment]
        yield


class FusedLayer:
    """`forward` of LlamaDecoderLayer and its like, for sampling.

    Args:
        layer: Whose weights it has copies of, but for the norms'.
        rows: How many there will be, about; None: the weights are not packed, but used as they are.
    """

    def __init__(self, layer: Any, rows: int | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.layer, self.attention, self.size = layer, attention, attention.head_dim
        self.queries = attention.q_proj.weight.shape[0] // self.size
        self.turned = self.queries + attention.k_proj.weight.shape[0] // self.size
        self.of_heads = _product([attention.q_proj, attention.k_proj, attention.v_proj], rows)
        self.of_out = _product([attention.o_proj], rows)
        self.of_inner = _product([mlp.gate_proj, mlp.up_proj], rows)
        self.of_down = _product([mlp.down_proj], rows)

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **options: Any,
    ) -> Any:
        """As transformers calls a layer: hidden states [B, T, H] to the same."""
        attend = _attention_function(self.attention)
        if attend is None or not self._fits(hidden_states, past_key_values, position_embeddings):
            return type(self.layer).forward(
                self.layer,
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **options,
            )
        heads = self.of_heads(self._normed(hidden_states, self.layer.input_layernorm))
        heads = heads.unflatten(-1, (-1, self.size)).transpose(1, 2)
        turned = rotary(heads[:, : self.turned], *position_embeddings)
        key, value = past_key_values.update(
            turned[:, self.queries :], heads[:, self.turned :], self.attention.layer_idx
        )
        found, _ = attend(
            self.attention,
            turned[:, : self.queries],
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.attention.scaling,
            position_ids=position_ids,
            **options,
        )
        hidden_states = self.of_out(found.flatten(2)).add_(hidden_states)
        inner = self.of_inner(self._normed(hidden_states, self.layer.post_attention_layernorm))
        return self.of_down(swiglu(*inner.chunk(2, dim=-1))).add_(hidden_states)

    def _normed(self, x: Tensor, norm: Any) -> Tensor:
        return rms_norm(x, norm.weight, norm.variance_epsilon)

    def _fits(self, x: Tensor, cache: Any, position_embeddings: Any) -> bool:
        from transformers import DynamicCache

        training = self.layer.training or self.attention.training
        if torch.is_grad_enabled() or training or type(cache) is not DynamicCache:
            return False
        dtype = self.layer.input_layernorm.weight.dtype
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != dtype:
            return False
        tables = isinstance(position_embeddings, tuple) and len(position_embeddings) == 2
        return x.dtype == dtype and tables and position_embeddings[0].shape[-1] == self.size


def _product(layers: Sequence[nn.Linear], rows: int | None) -> Callable[[Tensor], Tensor]:
    """x @ weight.T + bias by all layers at once, their results side by side."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias for layer in layers]
    bias = None
    if any(each is not None for each in biases):
        bias = torch.cat(
            [
                weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
                for layer in layers
            ]
        )
    if rows is None:
        return lambda x: nn.functional.linear(x, weight, bias)
    return packed_product(weight, bias, rows)


def _attention_function(attention: Any) -> Any:
    """PyTorch's, or what stands in for it meanwhile; None for the layer's own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation)


def _is_layer(layer: Any) -> bool:
    """Whether it is built as Llama's are, runs as its class does, and computes the same."""
    children = dict(layer.named_children())
    if set(children) != PARTS or _has_any_global_hook() or any(map(_is_watched, layer.modules())):
        return False
    attention, norms = layer.self_attn, (layer.input_layernorm, layer.post_attention_layernorm)
    projections = dict(attention.named_children())
    linear = linear_layers(layer)
    return (
        set(projections) == PROJECTIONS
        and _attends_by_pytorch(attention)
        and all(map(is_rms_norm, norms))
        and is_gated_mlp(layer.mlp)
        and "forward" not in vars(layer) | vars(attention) | vars(layer.mlp.act_fn)
        and all(type(part).__call__ is nn.Module.__call__ for part in _parts(layer))
        and None not in map(replacement, (*norms, layer.mlp))
        and all(each in linear and packable(each) for each in projections.values())
        and len({parameter.dtype for parameter in layer.parameters()}) == 1
        and _same(layer)
    )


def _attends_by_pytorch(attention: Any) -> bool:
    """Others may want more than the mask says, and give weights that somebody has asked for."""
    return getattr(getattr(attention, "config", None), "_attn_implementation", None) == NAME


def _parts(layer: Any) -> list[nn.Module]:
    """All modules of a layer but itself."""
    return [module for module in layer.modules() if module is not layer]


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody has asked to be told when it is called."""
    after = (getattr(hook, "__module__", None) for hook in module._forward_hooks.values())
    return bool(module._forward_pre_hooks) or any(name != CAPTURING for name in after)


def _same(layer: Any) -> bool:
    """Whether layers of its class and settings compute `FusedLayer`, on a small one drawn for the
    question.
    """
    try:
        kind = _kind(layer)
        if kind not in _agrees:
            _agrees[kind] = _agrees_on_a_sample(layer)
        return _agrees[kind]
    except Exception:  # it is built or called in another way
        return False


def _kind(layer: Any) -> tuple[Any, ...]:
    """What decides over the numbers that a layer computes: functions, which may be replaced at any
    time, and settings.
    """
    attention = layer.self_attn
    rotation = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    settings = map(settings_of, (layer, attention, attention.config))
    return (functions_of(layer), rotation, *settings)


@torch.no_grad()
def _agrees_on_a_sample(layer: Any) -> bool:
    from transformers import DynamicCache

    config = copy.deepcopy(layer.self_attn.config)
    config.hidden_size, config.intermediate_size, config.head_dim = 32, 24, 8
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    config._attn_implementation = "sdpa"
    # Whoever samples next shall not notice, and no one's defaults matter.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        twin = type(layer)(config, layer.self_attn.layer_idx).float().eval()
    generator = torch.Generator().manual_seed(0)
    draw_weights(twin, generator)
    fused, caches = FusedLayer(twin, None), (DynamicCache(), DynamicCache())
    with torch.autocast("cpu", enabled=False):
        for steps in (3, 1):  # a prompt, and a step
            x, cos, sin = (draw(generator, 2, steps, size) for size in (32, 8, 8))
            if not fused._fits(x, caches[1], (cos, sin)):
                return False
            theirs, ours = (
                call(x, attention_mask=None, past_key_values=cache, position_embeddings=(cos, sin))
                for call, cache in zip((type(twin).forward.__get__(twin), fused), caches)
            )
            # Up to sums of other orders, a few roundings apart; another formula is off by far more.
            bound = 64 * torch.finfo(torch.float32).eps * (1 + float(theirs.abs().max()))
            if ours.shape != theirs.shape or not bool(((ours - theirs).abs() <= bound).all()):
                return False
    return True
