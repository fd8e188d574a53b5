"""A stand-in for logits that answers what PPO asks of them, without a tensor [B, T, V] in memory.

Code that takes logits from a model, divides them by a temperature and reads log-probabilities and
entropies stays as it is: what it holds is hidden states and the weight of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from rlhf_kernels.linear import linear_token_logprobs

NEVER = torch.iinfo(torch.int64).min  # an ignore_index that no target has


class _Deferred:
    """What becomes a tensor as soon as it is used for anything that its class does not answer."""

    def whole(self) -> Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ANSWERS and len(args) == 1 and kwargs.keys() <= {"dim", "dtype", "_stacklevel"}:
            answer = _ANSWERS[func](args[0])
            along_rows = kwargs.get("dim") == -1 and kwargs.get("dtype") is None
            if answer is not None and along_rows:
                return answer
        return func(*tree_map(_whole, args), **tree_map(_whole, kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and pickling look for what no tensor has either
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.whole()[index]

    def __len__(self) -> int:
        return len(self.whole())


def _of_whole(name: str) -> Callable[..., Any]:
    def operator(self: _Deferred, *others: Any) -> Any:
        return getattr(self.whole(), name)(*map(_whole, others))

    return operator


# Python looks operators up in the class, not by `__getattr__`.
for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "mod"),
    *("pow", "rpow", "matmul", "rmatmul", "neg", "abs", "lt", "le", "gt", "ge"),
):
    setattr(_Deferred, f"__{_name}__", _of_whole(f"__{_name}__"))


class DeferredLogits(_Deferred):
    """In the place of (hidden · weightᵀ + bias) / temperature, [..., V].

    It keeps to hidden states through slices of leading dimensions, division by a number,
    `token_logprobs`, and the entropy as the difference of `torch.logsumexp` and of
    `torch.sum(softmax * logits)`. For anything else the logits are computed: right, only not small.

    Args:
        hidden: [..., H]. weight: [V, H], of its dtype. bias: [V] or None.
        temperature: what the logits are divided by.
        version: the weight's `_version` when the logits were due; None: now.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float = 1.0,
        version: int | None = None,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.temperature = temperature
        self.version = weight._version if version is None else version
        self._of_rows: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    def token_logprobs(self, tokens: Tensor) -> Tensor:
        """The log-probabilities of tokens [...], float32, differentiable.

        Raises:
            RuntimeError: The weight has changed since the logits were due.
            ValueError, TypeError: as `rlhf_kernels.linear_token_logprobs`.
        """
        self._check_weight()
        if not torch.is_grad_enabled():
            return linear_token_logprobs(
                *(self.hidden, self.weight, tokens),
                bias=self.bias,
                temperature=self.temperature,
                ignore_index=NEVER,
            )
        # A training step asks for the entropy as well, after the optimizer has changed the weight.
        logprobs, entropy = linear_token_logprobs(
            *(self.hidden, self.weight, tokens),
            bias=self.bias,
            temperature=self.temperature,
            return_entropy=True,
            ignore_index=NEVER,
        )
        with torch.no_grad():
            chosen = (self.hidden * self.weight[tokens]).sum(-1)
            if self.bias is not None:
                chosen += self.bias[tokens]
            self._of_rows = chosen / self.temperature - logprobs, entropy.detach()
        return logprobs

    def logsumexp(self) -> Tensor | None:
        """Of each row, [...], without a gradient; None where they are not known yet."""
        return None if self._of_rows is None or torch.is_grad_enabled() else self._of_rows[0]

    def expected(self) -> Tensor | None:
        """Σ p·logit of each row, [...], without a gradient; None where it is not known yet."""
        if self._of_rows is None or torch.is_grad_enabled():
            return None
        logsumexp, entropy = self._of_rows
        return logsumexp - entropy

    def whole(self) -> Tensor:
        self._check_weight()
        return F.linear(self.hidden, self.weight, self.bias) / self.temperature

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        leading = len(parts) < self.hidden.dim() and all(isinstance(part, slice) for part in parts)
        return self._like(self.hidden[index], 1.0) if leading else self.whole()[index]

    def __mul__(self, other: Any) -> Any:
        return self._like(self.hidden, 1 / other) if _number(other) else self.whole() * other

    def __truediv__(self, other: Any) -> Any:
        return self._like(self.hidden, other) if _number(other) else self.whole() / other

    def _like(self, hidden: Tensor, divisor: float) -> DeferredLogits:
        temperature = self.temperature * divisor
        return DeferredLogits(hidden, self.weight, self.bias, temperature, self.version)

    def _check_weight(self) -> None:
        if self.weight._version != self.version:
            raise RuntimeError(
                "the head's weight has changed since these logits were due (an optimizer's step?); "
                "read what you need of them before"
            )


class _Probabilities(_Deferred):
    def __init__(self, logits: DeferredLogits) -> None:
        self.logits = logits

    def whole(self) -> Tensor:
        return self.logits.whole().softmax(dim=-1)

    def __mul__(self, other: Any) -> Any:
        return _Products(self.logits) if other is self.logits else self.whole() * _whole(other)


class _Products(_Deferred):
    """Probabilities times logits."""

    def __init__(self, logits: DeferredLogits) -> None:
        self.logits = logits

    def whole(self) -> Tensor:
        logits = self.logits.whole()
        return logits.softmax(dim=-1) * logits


def _number(value: Any) -> bool:
    """Above 0: what a temperature can be."""
    return isinstance(value, (int, float)) and value > 0


def _whole(value: Any) -> Any:
    return value.whole() if isinstance(value, _Deferred) else value


def _softmax(value: Any) -> Any:
    return _Probabilities(value) if isinstance(value, DeferredLogits) else None


def _logsumexp(value: Any) -> Any:
    return value.logsumexp() if isinstance(value, DeferredLogits) else None


def _sum(value: Any) -> Any:
    return value.logits.expected() if isinstance(value, _Products) else None


_ANSWERS: dict[Any, Callable[[Any], Any]] = {
    F.softmax: _softmax,
    torch.logsumexp: _logsumexp,
    torch.sum: _sum,
}


@contextmanager
def deferred_head(model: nn.Module) -> Iterator[None]:
    """Within it the model's causal head gives `DeferredLogits`.

    Only a plain `nn.Linear` without hooks does, outside of autocast, with a weight of the hidden
    states' dtype; any other head (an adapter's, a quantized one) computes its logits as ever.

    Args:
        model: a Hugging Face causal model, or what holds one as `policy`; also within
            `DistributedDataParallel`.
    """
    head = _plain_head(model)
    if head is None:
        yield
        return

    def forward(hidden: Tensor) -> Any:
        casts = torch.is_autocast_enabled(hidden.device.type)
        if casts or hidden.dtype != head.weight.dtype:
            return F.linear(hidden, head.weight, head.bias)
        return DeferredLogits(hidden, head.weight, head.bias)

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


def _plain_head(model: nn.Module) -> nn.Linear | None:
    inner = getattr(model, "module", model)
    policy = getattr(inner, "policy", inner)
    find = getattr(policy, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if type(head) is not nn.Linear or "forward" in vars(head):
        return None
    return None if head._forward_hooks or head._forward_pre_hooks else head
