"""What TRL's functions and ours are compared on before one takes the other's place.

A few float32 numbers on the CPU, and a causal model of a few weights. Each gives outputs, and
gradients where PPO takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.integrations._samples import SHAPE, VOCABULARY, normal, with_gradients
from rlhf_kernels.integrations._trl_functions import selective_log_softmax

Function = Callable[..., Any]

_PAD = 0
_TEMPERATURE = 0.7


def logprobs(function: Function) -> Sequence[Tensor]:
    logits = normal(*SHAPE, VOCABULARY).requires_grad_()
    index = _tokens(*SHAPE)
    several = torch.stack([index, (index + 1) % VOCABULARY], dim=-1)
    return [
        *with_gradients(function(logits, index), logits),
        *with_gradients(function(logits, several), logits),
    ]


def entropy(function: Function) -> Sequence[Tensor]:
    logits = normal(*SHAPE, VOCABULARY).requires_grad_()
    return with_gradients(function(logits, chunk_size=5), logits)


def scaled_logprobs(function: Function) -> Sequence[Tensor]:
    """With a temperature and a mask as well, which TRL 1.12 does not have."""
    logits = normal(*SHAPE, VOCABULARY).requires_grad_()
    index = _tokens(*SHAPE)
    found = function(logits, index, temperature=_TEMPERATURE, row_mask=_mask())
    return [*logprobs(function), *with_gradients(found, logits)]


def logprobs_and_entropy(function: Function) -> Sequence[Tensor]:
    logits = normal(*SHAPE, VOCABULARY).requires_grad_()
    series = logits, _tokens(*SHAPE)
    both = function(*series, temperature=_TEMPERATURE, row_mask=_mask())
    found, constant = function(*series, False)
    return [
        *with_gradients(torch.stack(both), logits),
        *with_gradients(found, logits),
        constant,
        torch.tensor(constant.requires_grad),
    ]


def fused_head(function: Function) -> Sequence[Tensor]:
    leaves = [normal(4, 8), normal(VOCABULARY, 8), normal(VOCABULARY)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    targets, scale = _tokens(1, 4)[0], 0.9
    outputs = []
    for names in ((), ("entropy",)):
        found = function.apply(*leaves, targets, _TEMPERATURE, 5, None, scale, names)  # type: ignore[attr-defined]
        present = torch.stack([each for each in found if each is not None])
        outputs += with_gradients(present, *leaves)
    return outputs


def mean(function: Function) -> Sequence[Tensor]:
    x = normal(*SHAPE).requires_grad_()
    return [
        *with_gradients(function(x, _mask()), x),
        *with_gradients(function(x, _mask(), axis=1), x),
    ]


def variance(function: Function) -> Sequence[Tensor]:
    x = normal(*SHAPE).requires_grad_()
    return [*with_gradients(function(x, _mask()), x), function(x, _mask(), unbiased=False)]


def whitening(function: Function) -> Sequence[Tensor]:
    x = normal(*SHAPE)
    return [function(x, _mask()), function(x, _mask(), shift_mean=False)]


def forward(function: Function) -> Sequence[Tensor]:
    """Log-probabilities and entropies, as PPOTrainer reads them, and the head's gradient."""
    model = _tiny_model()
    sequences = _tokens(*SHAPE)
    sequences[0, :2] = _PAD
    logits = function(model, sequences, _PAD).logits[:, 1:-1]
    logits = logits / _TEMPERATURE
    found = selective_log_softmax(logits, sequences[:, 2:])
    (gradient,) = torch.autograd.grad(found.sum(), model.lm_head.weight)
    with torch.no_grad():
        products = torch.nn.functional.softmax(logits, dim=-1) * logits
        entropies = torch.logsumexp(logits, dim=-1) - torch.sum(products, dim=-1)
    return [found, gradient, entropies]


def reward(function: Function) -> Sequence[Tensor]:
    """Of responses that end early, in their middle, and not at all."""
    from transformers import LlamaForSequenceClassification

    config = _tiny_model().config
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(1)
        model = LlamaForSequenceClassification(config).float().eval()
    sequences = _tokens(*SHAPE)
    sequences[0, 0] = sequences[1, 3:] = sequences[2, 4] = _PAD
    return function(model, sequences, _PAD, 2)


def generation(function: Function) -> Sequence[Tensor]:
    """Tokens and log-probabilities of two parts of a batch, under the same random numbers."""
    from transformers import GenerationConfig

    queries = _tokens(4, 3)
    queries[0, 0] = _PAD
    options = GenerationConfig(
        max_new_tokens=4, do_sample=True, temperature=_TEMPERATURE, top_k=0, top_p=1.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sequences, scores = function(_tiny_model(), queries, 2, _PAD, options)
    return [sequences, selective_log_softmax(scores, sequences[:, 3:])]


def _tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        pad_token_id=_PAD,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).float().eval()


def _tokens(rows: int, length: int) -> Tensor:
    """Without padding."""
    generator = torch.Generator("cpu").manual_seed(1)
    return torch.randint(1, VOCABULARY, (rows, length), generator=generator, device="cpu")


def _mask() -> Tensor:
    rows = [[1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0], [1] * 6]
    return torch.tensor(rows, dtype=torch.bool, device="cpu")
