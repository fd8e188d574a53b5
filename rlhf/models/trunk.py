"""The transformer without its head, and the head by itself.

Losses that need a few positions, or never the whole logits, run the trunk and then apply the head
where they need it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.last_layer import last_feed_forward_from
from rlhf.models.loading import ModelError, model_name
from rlhf.models.packed import packed_hidden_states, packs
from rlhf_kernels.fast_rotary import fast_rotary

# What transformers calls a head that does more than hidden @ weight.T + bias. A small or untrained
# model's logits would not show it, so the config is asked as well.
LOGIT_TRANSFORMS = {
    "final_logit_softcapping": None,
    "logits_scaling": 1,
    "logit_scale": 1,
    "lm_head_multiplier": 1,
}


def position_ids_from_mask(attention_mask: Tensor) -> Tensor:
    """Positions [B, L] int64 that count attended tokens only, so padding does not shift them."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def hidden_states(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """The trunk's last hidden states [B, L - first, H]; no head, no KV cache.

    Args:
        model: A transformers model with any head.
        input_ids: int64 [B, L].
        attention_mask: bool or integer [B, L], padding on either side.
        position_ids: int64 [B, L]; from the mask if not given.
        first: Column from which on they are read; what comes before need not be computed.
    """
    trunk = model.get_decoder()
    takes_positions = "position_ids" in inspect.signature(trunk.forward).parameters
    if position_ids is None:
        position_ids = position_ids_from_mask(attention_mask)
    with fast_rotary(trunk):
        if takes_positions and packs(model, attention_mask):
            mask = attention_mask.bool()
            return packed_hidden_states(trunk, input_ids, mask, position_ids, first)[:, first:]
        # Models without the parameter (ALiBi) read positions off the attention mask.
        positions = {"position_ids": position_ids} if takes_positions else {}
        with last_feed_forward_from(trunk, torch.ones_like(input_ids, dtype=torch.bool), first):
            output = trunk(
                input_ids=input_ids,
                attention_mask=attention_mask.long(),
                use_cache=False,
                **positions,
            )
        return output.last_hidden_state[:, first:]


def lm_head(model: Any) -> tuple[Tensor, Tensor | None]:
    """The output projection: weight [V, H] and bias [V] or None.

    Raises:
        ModelError: The model has no output projection.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{model_name(model)} has no language-model head; give a causal model")
    return head.weight, getattr(head, "bias", None)


@torch.no_grad()
def check_linear_head(model: Any) -> None:
    """Check that logits are ``hidden @ weight.T + bias``, which the losses here rely on.

    Raises:
        ModelError: The model caps or scales its logits, or its weights are NaN or infinite; the
            message names it and what was found.
    """
    config = model.config.get_text_config()
    for name, neutral in LOGIT_TRANSFORMS.items():
        value = getattr(config, name, neutral)
        if value not in (None, neutral):
            raise ModelError(f"{model_name(model)} {NOT_LINEAR} (its config has {name}={value})")
    weight, bias = lm_head(model)
    ids = torch.arange(4, device=weight.device).remainder(weight.shape[0]).unsqueeze(0)
    mask = torch.ones_like(ids)
    was_training = model.training
    model.eval()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    hidden = hidden_states(model, ids, mask).float()
    model.train(was_training)
    expected = torch.nn.functional.linear(
        hidden, weight.float(), None if bias is None else bias.float()
    )
    # Rounding of a dot product is bounded by a few ulps of the product of the norms.
    scale = hidden.norm(dim=-1).max() * weight.float().norm(dim=-1).max()
    tolerance = 16 * torch.finfo(weight.dtype).eps * scale
    if not bool(((logits - expected).abs() <= tolerance).all()):
        for name, parameter in model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise ModelError(
                    f"{model_name(model)} is broken: its weights {name} are NaN or infinite in "
                    f"{int((~parameter.isfinite()).sum())} of {parameter.numel()} places. Take an "
                    "earlier one; a training may have diverged or its files be damaged."
                )
        raise ModelError(f"{model_name(model)} {NOT_LINEAR}")


NOT_LINEAR = "does not compute its logits as hidden @ weight.T + bias, so it cannot be trained here"


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability in the model to 0, also where it is kept as a plain number."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
