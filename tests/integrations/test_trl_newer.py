"""TRL 1.16's functions on our kernels, values and gradients, against definitions in float64.

Then against TRL's own, where TRL 1.16 or later is installed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_kernels.integrations import _trl_newer as newer
from rlhf_kernels.integrations import trl
from rlhf_kernels.integrations._patching import Patch, PatchByVersion, Peer

SEEDS = st.integers(0, 50)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
TEMPERATURES = st.sampled_from([1.0, 0.7, 3.0])


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator)).to(dtype)


def integers(limit: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, roundings: float) -> None:
    """Arithmetic is float32's or wider, and rounded once to the result's dtype."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected.double(), rtol=eps, atol=roundings * eps)


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Under upstream gradients that differ from place to place."""
    upstream = [
        torch.linspace(0.5, 1.5, each.numel()).view(each.shape).to(each.dtype) for each in outputs
    ]
    return list(torch.autograd.grad(outputs, leaves, upstream))


def rows_of_logits(
    shape: tuple[int, ...], vocabulary: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor]:
    logits = normal(*shape, vocabulary, seed=seed, dtype=dtype).requires_grad_()
    return logits, logits.detach().double().requires_grad_()


def defined_entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


@given(
    *(SEEDS, DTYPES, SHAPES, st.integers(1, 9), TEMPERATURES),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([None, torch.bool, torch.int64]),
)
def test_selected_log_probabilities(
    seed: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    vocabulary: int,
    temperature: float,
    several: int | None,
    mask_dtype: torch.dtype | None,
) -> None:
    logits, exact = rows_of_logits(shape, vocabulary, dtype, seed)
    index = integers(vocabulary, *shape, *([several] if several else []), seed=seed)
    mask = None if mask_dtype is None else integers(2, *index.shape, seed=seed + 1).to(mask_dtype)
    given_index = index if mask is None else index.masked_fill(mask == 0, -100)
    found = newer.selective_log_softmax(logits, given_index, temperature, mask)
    chosen = index if several else index[..., None]
    expected = (exact / temperature).log_softmax(-1).gather(-1, chosen).view(index.shape)
    if mask is not None:
        expected = expected * mask
    assert found.dtype == dtype and found.shape == index.shape
    # A row's K gradients are added up before they are rounded.
    close(found, expected, 16 / temperature)
    (gradient,) = gradients([found], [logits])
    close(gradient, gradients([expected], [exact])[0], 32 * (several or 1) / temperature)


@given(SEEDS, DTYPES, SHAPES, st.integers(1, 9))
def test_entropies(seed: int, dtype: torch.dtype, shape: tuple[int, ...], vocabulary: int) -> None:
    logits, exact = rows_of_logits(shape, vocabulary, dtype, seed)
    found, expected = newer.entropy_from_logits(logits, chunk_size=3), defined_entropy(exact)
    assert found.dtype == dtype
    close(found, expected, 16)
    close(gradients([found], [logits])[0], gradients([expected], [exact])[0], 32)


@given(SEEDS, DTYPES, SHAPES, TEMPERATURES, st.booleans(), st.booleans())
def test_both_of_one_pass(
    seed: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    temperature: float,
    differentiable: bool,
    masked: bool,
) -> None:
    logits, exact = rows_of_logits(shape, 7, dtype, seed)
    index = integers(7, *shape, seed=seed)
    mask = integers(2, *shape, seed=seed + 1) if masked else torch.ones_like(index)
    found = newer.selective_log_softmax_and_entropy(
        logits, index, differentiable, temperature, mask if masked else None
    )
    scaled = exact / temperature
    logprobs = scaled.log_softmax(-1).gather(-1, index[..., None])[..., 0] * mask
    entropy = defined_entropy(scaled) * mask
    expected = (logprobs, entropy if differentiable else entropy.detach())
    for ours, plain in zip(found, expected):
        assert ours.dtype == dtype and ours.requires_grad == plain.requires_grad
        close(ours, plain, 16 / temperature)
    outputs = [(ours, plain) for ours, plain in zip(found, expected) if ours.requires_grad]
    (of_ours,) = gradients([ours for ours, _ in outputs], [logits])
    (of_plain,) = gradients([plain for _, plain in outputs], [exact])
    close(of_ours, of_plain, 64 / temperature)


def test_nan_in_masked_rows_reaches_nothing() -> None:
    logits = normal(3, 5, seed=0)
    logits[1] = torch.nan
    logits.requires_grad_()
    mask = torch.tensor([1, 0, 1])
    both = newer.selective_log_softmax_and_entropy(
        logits, torch.tensor([0, -100, 4]), row_mask=mask
    )
    assert all(each.isfinite().all() and each[1] == 0 for each in both)
    (gradient,) = gradients(both, [logits])
    assert gradient.isfinite().all() and (gradient[1] == 0).all()


def test_what_does_not_fit_is_refused() -> None:
    logits, index = normal(2, 3, 5, seed=0), integers(5, 2, 3, seed=0)
    for function in (newer.selective_log_softmax, newer.selective_log_softmax_and_entropy):
        for temperature in (0.0, -1.0):
            with pytest.raises(ValueError, match="temperature"):
                function(logits, index, temperature=temperature)
        with pytest.raises(ValueError, match="row_mask has shape"):
            function(logits, index, row_mask=torch.ones(2))
        with pytest.raises(ValueError, match="targets holds -100"):
            function(logits, torch.full((2, 3), -100))


@given(
    *(SEEDS, DTYPES, st.integers(0, 5), st.integers(1, 9), TEMPERATURES),
    *(st.sampled_from([1.0, 0.25, 1.7]), st.booleans(), st.booleans()),
)
def test_the_head(
    seed: int,
    dtype: torch.dtype,
    rows: int,
    vocabulary: int,
    temperature: float,
    scale: float,
    with_bias: bool,
    with_entropy: bool,
) -> None:
    """On whole numbers: logits are exact whatever dtype they have been rounded to."""
    leaves = [normal(rows, 4, seed=seed), normal(vocabulary, 4, seed=seed + 1)]
    leaves += [normal(vocabulary, seed=seed + 2)] if with_bias else []
    leaves = [leaf.round().clamp(-4, 4).to(dtype).requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    targets = integers(vocabulary, rows, seed=seed)
    names = ("entropy",) if with_entropy else ("log_probs",)
    hidden, weight, bias = (*leaves, None)[:3]
    found = newer.ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, temperature, 5, None, scale, names
    )
    logits = F.linear(*exact) * scale / temperature
    expected = [logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0], defined_entropy(logits)]
    assert found[2:] == (None, None, None) and (found[1] is not None) == with_entropy
    outputs = [each for each in found if each is not None]
    # Logits are at most 68: their size, and a sum over them, is rounded in float32.
    roundings = 16 + 8 * 68 * scale / temperature
    for ours, plain in zip(outputs, expected):
        assert ours.dtype == torch.float32 and ours.shape == (rows,)
        close(ours, plain, roundings)
    if rows:
        pairs = zip(gradients(outputs, leaves), gradients(expected[: len(outputs)], exact), leaves)
        for ours, plain, leaf in pairs:
            assert ours.dtype == dtype == leaf.dtype
            size = float(plain.abs().max()) + 4 * rows * scale / temperature
            eps = max(torch.finfo(dtype).eps, roundings * torch.finfo(torch.float32).eps)
            torch.testing.assert_close(ours.double(), plain, rtol=0, atol=8 * eps * size)


def test_a_head_of_another_dtype_is_cast() -> None:
    """As `cast_lm_head_to_fp32` has it."""
    hidden, weight = normal(3, 4, seed=0), normal(7, 4, seed=1, dtype=torch.bfloat16)
    weight.requires_grad_()
    targets = integers(7, 3, seed=0)
    found = newer.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 5, None, 1.0, ())
    expected = F.linear(hidden.double(), weight.double()).log_softmax(-1)
    assert found[0] is not None
    close(found[0], expected.gather(-1, targets[:, None])[:, 0], 256)
    assert gradients([found[0]], [weight])[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "settings",
    [(30.0, 1.0, ()), (None, 0.0, ()), (None, 1.0, ("entropy", "is_top1"))],
    ids=["capped", "unscaled", "another output"],
)
def test_the_rest_is_left_to_trl(
    settings: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Theirs:
        @staticmethod
        def apply(*given: Any) -> tuple[Any, ...]:
            return given

    monkeypatch.setattr(newer, "_their_head", lambda: Theirs)
    given = (normal(3, 4, seed=0), normal(7, 4, seed=1), None, integers(7, 3, seed=0), 0.7, 5)
    assert newer.ChunkedLogProbFunction.apply(*given, *settings) == (*given, *settings)


# --- which patch ---


@pytest.mark.parametrize(
    ("version", "since"),
    [("1.12.0", "1.12"), ("1.12.3", "1.12"), ("1.16.0", "1.16"), ("1.20.1.dev0", "1.16")],
)
def test_the_version_decides(version: str, since: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patched: list[str] = []

    def note(self: Patch) -> list[str]:
        patched.append(self.peer.since)
        return []

    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(Patch, "patch", note)
    trl.patch()
    assert patched == [since]


@pytest.mark.parametrize("version", ["0.29.1", "1.11.0", "1.13.0", "1.15.0", "2.0"])
def test_any_other_version_is_refused_by_name(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    message = rf"trl is of version {version}; .* >=1.12,<1.13 or >=1.16,<2$"
    for refused in (trl.patch, lambda: trl.patched().__enter__()):
        with pytest.raises(trl.PatchError, match=message):
            refused()
    with pytest.raises(trl.PatchError, match="trl is not patched"):
        trl.unpatch()


def test_a_peer_that_is_missing() -> None:
    peers = [Peer("no-such-peer", "none", "1", "2"), Peer("no-such-peer", "none", "3", "4")]
    patch = PatchByVersion(*(Patch(peer, []) for peer in peers))
    with pytest.raises(trl.PatchError, match="for no-such-peer>=1,<2 or no-such-peer>=3,<4"):
        patch.patch()


# --- TRL's own ---


@pytest.fixture(scope="module")
def utils() -> ModuleType:
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("TRL is not installed")
    if not newer.PATCH.peer.fits(version):
        pytest.skip(f"TRL is of version {version}, not {newer.PATCH.peer.versions}")
    return pytest.importorskip("trl.trainer.utils")


FUNCTIONS = ["selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy"]


def test_patching_trl_and_back(utils: ModuleType) -> None:
    """The patch itself compares every function with TRL's."""
    kernels: Any = pytest.importorskip("trl.kernels")
    theirs = {name: getattr(utils, name) for name in FUNCTIONS}
    head = kernels.ChunkedLogProbFunction
    with trl.patched() as places:
        assert all(getattr(utils, name) is getattr(newer, name) for name in FUNCTIONS)
        assert kernels.ChunkedLogProbFunction is newer.ChunkedLogProbFunction
        assert utils._ChunkedLogProbFunction is newer.ChunkedLogProbFunction
        assert newer.PATCH.theirs(newer.ChunkedLogProbFunction) is head
        with pytest.raises(trl.PatchError, match="patched already"):
            trl.patch()
    assert {f"trl.trainer.utils.{name}" for name in FUNCTIONS} <= set(places)
    assert {name: getattr(utils, name) for name in FUNCTIONS} == theirs
    assert kernels.ChunkedLogProbFunction is head is utils._ChunkedLogProbFunction


@given(seed=SEEDS, dtype=DTYPES, temperature=TEMPERATURES, masked=st.booleans())
def test_trl_s_own(
    utils: ModuleType, seed: int, dtype: torch.dtype, temperature: float, masked: bool
) -> None:
    logits, index = normal(2, 5, 7, seed=seed, dtype=dtype), integers(7, 2, 5, seed=seed)
    mask = integers(2, 2, 5, seed=seed + 1) if masked else None
    options = {"temperature": temperature, "row_mask": mask}
    # In 16 bits TRL rounds after each step, on numbers of up to 8 / temperature.
    roundings = (16 if dtype.itemsize > 2 else 64) / temperature
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        found = getattr(newer, name)(logits, index, **options)
        expected = getattr(utils, name)(logits, index, **options)
        both = isinstance(found, tuple)
        for ours, plain in zip(*(found, expected) if both else ([found], [expected])):
            assert ours.dtype == plain.dtype
            close(ours, plain, roundings)
    close(newer.entropy_from_logits(logits), utils.entropy_from_logits(logits), roundings)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("outputs", [("log_probs", "entropy"), ("log_probs", "is_top1")])
def test_a_model_with_trl_s_fused_head(utils: ModuleType, outputs: tuple[str, ...]) -> None:
    """The latter is TRL's own under the patch, too."""
    tokens = integers(19, 3, 6, seed=0)
    labels = tokens.masked_fill(integers(3, 3, 6, seed=1) == 0, -100)

    def step() -> list[Tensor]:
        model = tiny_model()
        utils.add_fused_lm_head(model, temperature=0.7, outputs=outputs)
        found = model(input_ids=tokens, labels=labels, fused_lm_head=True)
        loss = found.loss if found.entropy is None else found.loss - 0.1 * found.entropy.sum()
        loss.backward()
        others = [each for each in (found.entropy, found.is_top1) if each is not None]
        weights = [parameter.grad for parameter in model.parameters()]
        return [found.log_probs, *others, *weights]

    expected = step()
    with trl.patched():
        found = step()
    for ours, plain in zip(found, expected):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
