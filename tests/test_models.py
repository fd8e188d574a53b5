"""Loading, the trunk and the head apart, and models with one score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SIZES, tiny_llama, tiny_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf.data import pad_left, pad_right
from rlhf.engine import World, save_model
from rlhf.models import (
    ModelError,
    check_linear_head,
    disable_dropout,
    hidden_states,
    last_token_scores,
    length_limit,
    lm_head,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    make_scalar_model,
    position_ids_from_mask,
    scalar_model_from_causal,
    score_head,
    token_scores,
)

# Sums of 32 float32 products in another order: a few ulps of values around 1.
ATOL = 32 * torch.finfo(torch.float32).eps


def architectures() -> dict[str, Any]:
    return {
        "llama": tiny_llama(),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZES)),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(
                vocab_size=128,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                bos_token_id=None,
                eos_token_id=3,
            )
        ),
        "opt": OPTForCausalLM(
            OPTConfig(
                vocab_size=128,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                word_embed_proj_dim=32,
            )
        ),
    }


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt"])
@torch.no_grad()
def test_trunk_and_head_make_the_logits(name: str) -> None:
    model = architectures()[name].eval()
    check_linear_head(model)
    ids = torch.randint(4, 120, (2, 9))
    mask = torch.ones_like(ids)
    weight, bias = lm_head(model)
    logits = torch.nn.functional.linear(hidden_states(model, ids, mask), weight, bias)
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt"])
@torch.no_grad()
def test_hidden_states_do_not_depend_on_padding(name: str) -> None:
    model = architectures()[name].eval()
    sequences = [torch.randint(4, 120, (n,)).tolist() for n in (9, 4, 6)]
    left, left_mask = pad_left([*sequences, [5] * 14], 1)
    right, right_mask = pad_right(sequences, 1)
    for row, sequence in enumerate(sequences):
        ids = torch.tensor([sequence])
        alone = hidden_states(model, ids, torch.ones_like(ids))[0]
        padded_left = hidden_states(model, left, left_mask)[row][left_mask[row]]
        padded_right = hidden_states(model, right, right_mask)[row][right_mask[row]]
        torch.testing.assert_close(padded_left, alone, rtol=0, atol=ATOL)
        torch.testing.assert_close(padded_right, alone, rtol=0, atol=ATOL)


def test_position_ids_count_attended_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    assert position_ids_from_mask(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


def test_capped_or_scaled_logits_are_refused() -> None:
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=30.0))
    with pytest.raises(ModelError, match=r"Gemma2ForCausalLM .*final_logit_softcapping=30"):
        check_linear_head(capped)
    scaled = GraniteForCausalLM(GraniteConfig(**{**SIZES, "logits_scaling": 8.0}))
    with pytest.raises(ModelError, match=r"Granite.*logits_scaling=8"):
        check_linear_head(scaled)
    check_linear_head(Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=None)))
    check_linear_head(GraniteForCausalLM(GraniteConfig(**{**SIZES, "logits_scaling": 1.0})))


def test_a_head_that_does_more_is_found_by_its_logits() -> None:
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + 0.01)
    with pytest.raises(ModelError, match="cannot be trained here"):
        check_linear_head(model)


def test_check_keeps_the_mode() -> None:
    for training in (True, False):
        model = tiny_llama().train(training)
        check_linear_head(model)
        assert model.training == training


def test_disable_dropout_makes_training_mode_deterministic() -> None:
    ids = torch.arange(4, 14).unsqueeze(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )
    for model in (gpt2, tiny_llama(attention_dropout=0.5)):
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        disable_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_loading(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    assert load_causal_lm(model) is model and load_tokenizer(tokenizer) is tokenizer
    save_model(model.bfloat16(), tokenizer, tmp_path)
    assert load_causal_lm(tmp_path).dtype == torch.float32
    assert load_causal_lm(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_tokenizer(str(tmp_path)).eos_token == "<end>"


def test_models_loaded_by_name_come_onto_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "sft")
    save_model(scalar_model_from_causal(tiny_llama()), tiny_tokenizer(), tmp_path / "rm")
    monkeypatch.setattr(World, "device", torch.device("meta"))
    assert load_causal_lm(tmp_path / "sft").device.type == "meta"
    assert load_scalar_model(tmp_path / "rm").device.type == "meta"
    assert load_causal_lm(tiny_llama()).device.type == "cpu"  # the caller's own choice


def test_what_is_no_tokenizer_or_model(tmp_path: Path) -> None:
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path)
    assert load_tokenizer(None, tmp_path).eos_token == "<end>"
    with pytest.raises(ModelError, match="no tokenizer is given, and the model is an object"):
        load_tokenizer(None, tiny_llama())
    with pytest.raises(ModelError, match="the tokenizer is a LlamaForCausalLM; give"):
        load_tokenizer(tiny_llama())
    for nothing in (None, tiny_tokenizer(), 3):
        with pytest.raises(ModelError, match=f"a {type(nothing).__name__} is no causal"):
            load_causal_lm(nothing)  # type: ignore[arg-type]


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_causal_lm(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="cannot load a causal language model from"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_is_no_causal_model(tmp_path: Path, tied: bool) -> None:
    scalar = scalar_model_from_causal(tiny_llama(tie_word_embeddings=tied))
    save_model(scalar, tiny_tokenizer(), tmp_path)
    for given in (tmp_path, scalar):
        with pytest.raises(ModelError, match=r"is a LlamaForSequenceClassification \(a rew"):
            load_causal_lm(given)


def test_missing_weights_are_named_and_tied_ones_are_not_missing(tmp_path: Path) -> None:
    for tied in (False, True):
        model = tiny_llama(tie_word_embeddings=tied)
        save_model(model.model, tiny_tokenizer(), tmp_path / f"trunk-{tied}")
        save_model(model, tiny_tokenizer(), tmp_path / f"whole-{tied}")
        load_causal_lm(tmp_path / f"whole-{tied}")
    with pytest.raises(ModelError, match=r"trunk-False .* lacks the weights lm_head\.weight"):
        load_causal_lm(tmp_path / "trunk-False")
    loaded = load_causal_lm(tmp_path / "trunk-True")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    scalar = scalar_model_from_causal(model)
    scalar.save_pretrained(tmp_path / "headless", state_dict=model.model.state_dict())
    with pytest.raises(ModelError, match=r"no whole reward model: .*score\.weight"):
        load_scalar_model(tmp_path / "headless")


def test_broken_weights_are_named() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, :2] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight are NaN .* 2 of 1536"):
        check_linear_head(model)


def test_length_limit() -> None:
    model = tiny_llama(context=64)
    assert length_limit(model, None) == 64 and length_limit(model, 32) == 32
    with pytest.raises(ValueError, match=r"max_length=65 is longer than the context .*: 64"):
        length_limit(model, 65)


@torch.no_grad()
def test_scalar_model_has_the_trunk_and_a_seeded_head() -> None:
    causal = tiny_llama(hidden_act="gelu").eval()
    scalar = scalar_model_from_causal(causal, seed=5).eval()
    ids = torch.randint(4, 120, (2, 9))
    mask = torch.ones_like(ids)
    assert torch.equal(hidden_states(scalar, ids, mask), hidden_states(causal, ids, mask))
    again = scalar_model_from_causal(causal, seed=5)
    assert torch.equal(score_head(scalar).weight, score_head(again).weight)
    other = scalar_model_from_causal(causal, seed=6)
    assert not torch.equal(score_head(scalar).weight, score_head(other).weight)
    # A copy: training one does not change the other.
    next(scalar.parameters()).add_(1.0)
    assert not torch.equal(next(scalar.parameters()), next(causal.parameters()))


def test_head_variance_is_one_over_d_plus_one() -> None:
    model = tiny_llama()
    weights = torch.cat(
        [score_head(scalar_model_from_causal(model, seed=s)).weight for s in range(100)]
    )
    # 3200 draws: the sample variance has a relative standard deviation of sqrt(2/3200) = 2.5 %.
    assert weights.var().item() == pytest.approx(1 / 33, rel=0.1)


@torch.no_grad()
def test_scores_do_not_depend_on_padding_or_batch() -> None:
    model = scalar_model_from_causal(tiny_llama()).eval()
    sequences = [[*torch.randint(4, 120, (n,)).tolist(), 3] for n in (9, 4, 6)]
    alone = [last_token_scores(model, torch.tensor([s]), torch.ones(1, len(s))) for s in sequences]
    expected = torch.cat(alone)
    assert expected.std() > 0.1  # they differ, so a wrong position would show
    for pad_id in (1, 3):  # 3 is EOS: the position may not be found by comparing ids
        for pad in (pad_left, pad_right):
            ids, mask = pad([*sequences, [7] * 20], pad_id)
            torch.testing.assert_close(
                last_token_scores(model, ids, mask)[:3], expected, rtol=0, atol=ATOL
            )


@torch.no_grad()
def test_scores_agree_with_plain_transformers_and_reward_mean() -> None:
    model = scalar_model_from_causal(tiny_llama()).eval()
    ids, mask = pad_right([[5, 6, 7, 3], [8, 9, 3]], 1)
    plain = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    scores = last_token_scores(model, ids, mask)
    torch.testing.assert_close(scores, plain, rtol=0, atol=ATOL)
    every = token_scores(model, ids, mask)
    assert every.shape == (2, 4) and every.dtype == torch.float32
    torch.testing.assert_close(torch.stack([every[0, 3], every[1, 2]]), scores, rtol=0, atol=ATOL)
    model.config.reward_mean = 0.25
    torch.testing.assert_close(last_token_scores(model, ids, mask), plain - 0.25, rtol=0, atol=ATOL)


@torch.no_grad()
def test_scores_are_float32_under_autocast() -> None:
    model = scalar_model_from_causal(tiny_llama()).eval()
    ids = torch.arange(4, 12).unsqueeze(0)
    with torch.autocast("cpu", torch.bfloat16):
        scores = token_scores(model, ids, torch.ones_like(ids))
    assert scores.dtype == torch.float32
    # Not merely bfloat16 results in a wider type.
    assert not torch.equal(scores, scores.bfloat16().float())


def test_load_scalar_model_from_every_source(tmp_path: Path) -> None:
    causal, tokenizer = tiny_llama(), tiny_tokenizer()
    save_model(causal, tokenizer, tmp_path / "sft")
    fresh = make_scalar_model(tmp_path / "sft", seed=2)
    assert torch.equal(
        score_head(fresh).weight, score_head(make_scalar_model(causal, seed=2)).weight
    )
    save_model(fresh, tokenizer, tmp_path / "rm")
    for load in (load_scalar_model, make_scalar_model):
        trained = load(tmp_path / "rm")
        assert torch.equal(score_head(trained).weight, score_head(fresh).weight)
        assert load(trained) is trained
    for untrained in (causal, tmp_path / "sft"):
        with pytest.raises(ModelError, match=r"LlamaForCausalLM has no trained score.*rlhf reward"):
            load_scalar_model(untrained)


def test_a_classifier_with_several_labels_is_refused(tmp_path: Path) -> None:
    config = tiny_llama().config
    config.num_labels = 3
    save_model(AutoModelForSequenceClassification.from_config(config), tiny_tokenizer(), tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for load in (load_scalar_model, make_scalar_model):
        for model in (tmp_path, classifier):
            with pytest.raises(ModelError, match="classifier with 3 labels"):
                load(model)
