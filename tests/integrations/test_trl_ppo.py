"""What PPOTrainer gets in the place of logits: the same numbers, without the tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from rlhf_kernels.integrations import trl
from rlhf_kernels.integrations._deferred_logits import DeferredLogits, deferred_head

PAD, VOCABULARY, WIDTH = 0, 19, 8
EPS = torch.finfo(torch.float32).eps


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        pad_token_id=PAD,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def close(found: Tensor, expected: Tensor, roundings: float = 64) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=roundings * EPS)


def plain_logits(policy: Any, sequences: Tensor) -> Tensor:
    mask = sequences != PAD
    logits: Tensor = policy(
        input_ids=sequences.masked_fill(~mask, 0),
        attention_mask=mask,
        position_ids=mask.cumsum(1) - mask.long(),
    ).logits
    return logits


def statistics(logits: Any, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and the entropy in PPOTrainer's words."""
    logits = logits[:, 1:-1]
    logits /= 0.7
    logprobs = trl.selective_log_softmax(logits, chosen)
    with torch.no_grad():
        probabilities = F.softmax(logits, dim=-1)
        entropy = torch.logsumexp(logits, dim=-1) - torch.sum(probabilities * logits, dim=-1)
    return logprobs, entropy


@pytest.mark.parametrize("with_grad", [True, False])
def test_a_forward_gives_the_numbers_of_the_whole_logits(with_grad: bool) -> None:
    policy, sequences = model(), tokens(3, 7)
    sequences[0, :2], sequences[1, 5:] = PAD, PAD
    with torch.set_grad_enabled(with_grad):
        output = trl.forward(policy, sequences, PAD)
        assert isinstance(output.logits, DeferredLogits)
        assert output.logits.shape == (3, 7, VOCABULARY) and len(output.hidden_states) == 3
        expected = statistics(plain_logits(policy, sequences), sequences[:, 2:])
        found = statistics(output.logits, sequences[:, 2:])
    for ours, theirs in zip(found, expected):
        close(ours, theirs)
    if with_grad:
        wanted = list(policy.parameters())
        gradients = torch.autograd.grad(found[0].sum(), wanted)
        for ours, theirs in zip(gradients, torch.autograd.grad(expected[0].sum(), wanted)):
            close(ours, theirs, 64 * float(1 + theirs.abs().max()))


def test_the_head_is_as_before_afterwards() -> None:
    policy, sequences = model(), tokens(2, 4)
    trl.forward(policy, sequences, PAD)
    assert isinstance(plain_logits(policy, sequences), Tensor)
    with pytest.raises(ZeroDivisionError), deferred_head(policy):
        _ = 1 / 0
    assert isinstance(plain_logits(policy, sequences), Tensor)


def test_entropies_are_known_after_the_weight_has_changed_and_nothing_else() -> None:
    policy, sequences = model(), tokens(2, 5)
    _, expected = statistics(plain_logits(policy, sequences), sequences[:, 2:])
    logits = trl.forward(policy, sequences, PAD).logits[:, 1:-1] / 0.7
    trl.selective_log_softmax(logits, sequences[:, 2:])
    with torch.no_grad():
        policy.lm_head.weight.add_(1.0)
        products = F.softmax(logits, dim=-1) * logits
        close(torch.logsumexp(logits, dim=-1) - torch.sum(products, dim=-1), expected)
    with pytest.raises(RuntimeError, match="has changed since"):
        logits.argmax(dim=-1)


def test_anything_else_gets_the_logits() -> None:
    """A model may scale or bound its logits; other code may want all of them."""
    head = nn.Linear(WIDTH, VOCABULARY)
    hidden = torch.randn(2, 3, WIDTH)
    exact, found = head(hidden), DeferredLogits(hidden, head.weight, head.bias)
    close(torch.tanh(found / 5.0) * 5.0, torch.tanh(exact / 5.0) * 5.0)
    close((found * 0.5).float(), exact * 0.5)
    close(found[..., 1:4], exact[..., 1:4])
    close(found[:, 0, 2], exact[:, 0, 2])
    close(found * torch.ones(VOCABULARY), exact)
    close(torch.ones(VOCABULARY) * found, exact)
    close(torch.sum(found, dim=-1), exact.sum(-1))
    close(F.softmax(found, dim=1), exact.softmax(1))
    close(torch.logsumexp(found, dim=-1), exact.logsumexp(-1))
    close(found * -1.0, -exact)
    ones = torch.ones(VOCABULARY)
    for operator in (
        *(lambda x: x + 1, lambda x: ones + x, lambda x: x - ones, lambda x: 1 - x, lambda x: -x),
        *(abs, lambda x: x**2, lambda x: ones / x, lambda x: x @ ones, lambda x: (x > 0).float()),
    ):
        close(operator(found), operator(exact))
    assert len(found) == len(exact)


def test_several_classes_of_each_row() -> None:
    head = nn.Linear(WIDTH, VOCABULARY)
    hidden = torch.randn(2, 3, WIDTH)
    index = torch.randint(VOCABULARY, (2, 3, 4))
    expected = head(hidden).log_softmax(-1).gather(-1, index)
    logits = DeferredLogits(hidden, head.weight, head.bias)
    close(trl.selective_log_softmax(logits, index), expected)


@pytest.mark.parametrize("kind", ["hook", "subclass", "autocast"])
def test_another_head_computes_its_logits(kind: str) -> None:
    class Adapter(nn.Linear):
        pass

    policy, sequences = model(), tokens(2, 4)
    if kind == "hook":
        policy.lm_head.register_forward_hook(lambda *_: None)
    if kind == "subclass":
        policy.set_output_embeddings(Adapter(WIDTH, VOCABULARY, bias=False))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        assert isinstance(trl.forward(policy, sequences, PAD).logits, Tensor)


class Pair(nn.Module):
    """As TRL's pair of policy and critic."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, **inputs: Any) -> Any:
        return self.policy(**inputs), inputs["input_ids"]


def test_a_pair_of_policy_and_critic() -> None:
    output, _ = trl.forward(Pair(model()), tokens(2, 4), PAD)
    assert isinstance(output.logits, DeferredLogits)


@pytest.mark.parametrize("end", [None, 5])
def test_generation_keeps_log_probabilities_of_the_same_tokens(end: int | None) -> None:
    policy, queries = model(), tokens(5, 4)
    queries[0, :2] = PAD
    options = GenerationConfig(
        max_new_tokens=12, do_sample=True, temperature=0.7, top_k=0, top_p=1.0,
        eos_token_id=end, pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(3)
    sequences, kept = trl.batch_generation(policy, queries, 2, PAD, options)
    torch.manual_seed(3)
    for rows in range(0, 5, 2):
        mask = queries[rows : rows + 2] != PAD
        output = policy.generate(
            input_ids=queries[rows : rows + 2].masked_fill(~mask, 0),
            attention_mask=mask,
            generation_config=options,
            return_dict_in_generate=True,
            output_scores=True,
        )
        length = len(output.scores)
        found = sequences[rows : rows + 2]
        assert torch.equal(found[:, 4 : 4 + length], output.sequences[:, 4:])
        assert torch.equal(found[:, :4], queries[rows : rows + 2])
        assert bool((found[:, 4 + length :] == PAD).all())
        scores = torch.stack(output.scores, dim=1)
        expected = scores.log_softmax(-1).gather(-1, output.sequences[:, 4:, None])[..., 0]
        response = sequences[rows : rows + 2, 4:]
        logprobs = trl.selective_log_softmax(kept[rows : rows + 2], response)
        close(logprobs[:, :length], expected)
    with pytest.raises(ValueError, match="others are asked for"):
        trl.selective_log_softmax(kept, sequences[:, 4:] + 1)


def test_no_step_s_scores_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, generate, shapes = model(), LlamaForCausalLM.generate, []

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = generate(self, *args, **kwargs)
        shapes.extend(score.untyped_storage().nbytes() for score in output.scores)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "generate", watched)
    options = GenerationConfig(max_new_tokens=3, do_sample=True, top_k=0)
    trl.batch_generation(policy, tokens(2, 4), 2, PAD, options)
    assert shapes == [8, 8, 8]  # one float32 for each of two sequences


def test_rewards_are_read_at_the_last_token_before_padding() -> None:
    config = model().config
    config.num_labels = 1
    critic = LlamaForSequenceClassification(config).eval()
    sequences = tokens(4, 7)
    sequences[0, 0] = PAD  # a prompt of three tokens
    sequences[1, 5:] = PAD
    sequences[2, 4] = PAD  # what follows the first padding does not count
    sequences[3, 3:] = PAD  # an empty response: the prompt's last token
    scores, rewards, places = trl.get_reward(critic, sequences, PAD, 3)
    assert places.tolist() == [6, 4, 3, 2]
    for row, place in enumerate(places.tolist()):
        read = sequences[row : row + 1, : place + 1]
        read = read[read != PAD][None]
        hidden = critic.model(input_ids=read).last_hidden_state[0, -1]
        expected = hidden @ critic.score.weight[0]
        close(rewards[row], expected)
        close(scores[row, place, 0], expected)
