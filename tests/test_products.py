"""Float32 products on a CPU by oneDNN, also on machines where PyTorch's own would be taken."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn

from rlhf_kernels.backends import cpu, unavailable_reason
from rlhf_kernels.fast_layers import fast_layers
from rlhf_kernels.linear_layers import packed_for_sampling, use_fast_products
from rlhf_kernels.ops import products
from rlhf_kernels.ops.gated_mlp import gated_mlp

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN"
)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr("rlhf_kernels.linear_layers.onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "SMALL", 1)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_product(found: Tensor, left: Tensor, right: Tensor) -> None:
    """Each entry's rounding is below K·eps times the sum of its terms' sizes (Higham 2002, 3.1)."""
    left, right = left.double(), right.double()
    bound = left.shape[-1] * EPS * (left.abs() @ right.abs())
    assert found.dtype == torch.float32
    assert bool(((found.double() - left @ right).abs() <= bound).all())


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 5, 7), (63, 576, 192), (16, 64, 1)])
def test_products_are_exact_to_rounding_in_any_layout(m: int, k: int, n: int) -> None:
    left, right = normal(m, k, seed=1), normal(k, n, seed=2)
    layouts = [lambda x: x, lambda x: x.t().contiguous().t(), lambda x: x.repeat(1, 2)[:, ::2]]
    for of_left in layouts:
        for of_right in layouts:
            a, b = of_left(left), of_right(right)
            assert products.takes_onednn(a, b)
            assert_product(products.mm(a, b), a, b)


@pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 16), (17, 33), (504, 192), (0, 4), (4, 0)])
def test_transposes_are_copies(shape: tuple[int, int], threads: int) -> None:
    from rlhf_kernels import _cpu

    rows, columns = shape
    before, isa = torch.get_num_threads(), _cpu.isa()
    torch.set_num_threads(threads)
    try:
        for name in _cpu.isas():
            _cpu.use_isa(name)
            for x in (
                normal(rows, columns, seed=1),
                normal(rows, columns + 3, seed=2)[:, :columns],
            ):
                found = cpu.transposed(x)
                assert found.is_contiguous() and torch.equal(found, x.t())
    finally:
        torch.set_num_threads(before)
        _cpu.use_isa(isa)


def test_only_transposed_float32_is_copied_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    theirs = cpu.transposed
    monkeypatch.setattr(cpu, "transposed", lambda x: calls.append(x.shape) or theirs(x))
    x, y = normal(8, 12, seed=1), normal(8, 9, seed=2)
    products.mm(y.t(), x)
    assert calls == ([] if unavailable_reason("cpu") is not None else [(8, 9)])
    calls.clear()
    products.mm(x.t().contiguous(), y)
    products.mm(y.t().double(), x.double())
    assert calls == []


def test_shapes_that_do_not_fit_are_named() -> None:
    x, weight = normal(4, 6, seed=1), normal(3, 5, seed=2)
    for product in (products.linear, lambda x, weight: products.mm(x, weight.t())):
        with pytest.raises(RuntimeError, match="4x6 and 5x3"):
            product(x, weight)
    with pytest.raises(RuntimeError, match="4x6 and 5x3"):
        gated_mlp(x, weight, weight, weight)


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_linear_are_those_of_pytorch_in_float64(with_bias: bool) -> None:
    inputs = [normal(2, 5, 12, seed=1), normal(9, 12, seed=2)]
    inputs += [normal(9, seed=3)] if with_bias else []
    leaves = [x.requires_grad_() for x in inputs]
    upstream = normal(2, 5, 9, seed=4)
    found = torch.autograd.grad(products.linear(*leaves), leaves, upstream)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(nn.functional.linear(*wide), wide, upstream.double())
    x, weight, rows = wide[0].reshape(10, 12), wide[1], upstream.double().reshape(10, 9)
    sums = [rows.abs() @ weight.abs(), rows.abs().t() @ x.abs(), rows.abs().sum(0)]
    for ours, theirs, terms, count in zip(found, expected, sums, (9, 10, 10)):
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape
        bound = count * EPS * terms.reshape(theirs.shape)
        assert bool(((ours.double() - theirs).abs() <= bound).all())


def test_linear_is_a_registered_operator() -> None:
    x, weight = normal(4, 6, seed=1).requires_grad_(), normal(5, 6, seed=2).requires_grad_()
    torch.library.opcheck(torch.ops.rlhf_kernels.linear.default, (x, weight, None))
    torch.library.opcheck(torch.ops.rlhf_kernels.linear.default, (x, weight, normal(5, seed=3)))


def test_second_derivatives_raise() -> None:
    x, weight = normal(4, 6, seed=1).requires_grad_(), normal(5, 6, seed=2)
    (gradient,) = torch.autograd.grad(products.linear(x, weight).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


def test_other_types_and_autocast_are_left_to_pytorch() -> None:
    x, weight = normal(4, 6, seed=1), normal(5, 6, seed=2)
    for dtype in (torch.float64, torch.bfloat16):
        a, b = x.to(dtype), weight.to(dtype)
        assert torch.equal(products.linear(a, b), nn.functional.linear(a, b))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16


def test_nothing_and_no_rows_have_a_product() -> None:
    assert products.mm(normal(0, 6, seed=1), normal(6, 5, seed=2)).shape == (0, 5)
    assert products.linear(normal(2, 0, 6, seed=1), normal(5, 6, seed=2)).shape == (2, 0, 5)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Doubled(8, 5), nn.Linear(5, 3, bias=False))


def test_a_model_keeps_its_weights_values_and_subclasses(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_model(), normal(4, 6, seed=1)
    names, before = list(model.state_dict()), model(x)
    called = []
    plain = products.linear
    monkeypatch.setattr(
        "rlhf_kernels.linear_layers.linear", lambda *args: called.append(1) or plain(*args)
    )
    use_fast_products(model)
    torch.testing.assert_close(model(x), before)
    assert len(called) == 2 and list(model.state_dict()) == names


def test_a_forward_that_someone_else_has_put_there_stays() -> None:
    model = small_model()
    model[0].forward = theirs = lambda x: x
    use_fast_products(model)
    with fast_layers(model), packed_for_sampling(model, rows=4):
        assert model[0].forward is theirs and "forward" in vars(model[3])
    assert model[0].forward is theirs


def test_a_model_can_have_them_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_model(), normal(4, 6, seed=1)
    model(x).sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with fast_layers(model):
        assert "forward" in vars(model[0]) and "forward" not in vars(model[2])
        output = model(x)
    assert "forward" not in vars(model[0])
    output.sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_has_the_same_gradients() -> None:
    model, x = small_model(), normal(4, 6, seed=1)
    use_fast_products(model)
    model(x).square().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True)(x).square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)


def test_weights_packed_for_sampling_are_gone_afterwards() -> None:
    model, x = small_model(), normal(4, 6, seed=1)
    use_fast_products(model)
    with torch.no_grad():
        before, forwards = model(x), [layer.forward for layer in model]
        with packed_for_sampling(model, rows=4):
            torch.testing.assert_close(model(x), before)
            assert model[0].forward != forwards[0] and model[2].forward == forwards[2]
        assert [layer.forward for layer in model] == forwards
        model[0].weight.zero_()
        with packed_for_sampling(model, rows=4):
            assert not bool((model(x) == before).all())
    plain = small_model()
    with pytest.raises(KeyError), packed_for_sampling(plain, rows=4):
        raise KeyError
    assert "forward" not in vars(plain[0])


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 products here"
)
def test_bfloat16_weights_are_packed_too() -> None:
    """Also where autocast rounds what comes in; other types go past the packed weights."""
    layer, x = nn.Linear(64, 48).bfloat16(), normal(4, 64, seed=1)
    rounded, weight = x.bfloat16().double(), layer.weight.double()
    exact = rounded @ weight.t() + layer.bias.double()
    sizes = rounded.abs() @ weight.abs().t() + layer.bias.double().abs()
    # Summed in float32, rounded once.
    bound = exact.abs() * torch.finfo(torch.bfloat16).eps / 2 + 65 * EPS * sizes
    with torch.no_grad(), packed_for_sampling(layer, rows=4):
        assert "forward" in vars(layer)
        found = [layer(x.bfloat16())]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found += [layer(x), layer(x.bfloat16())]
        with pytest.raises(RuntimeError):  # as without packing
            layer(x.double())
    for output in found:
        assert output.dtype == torch.bfloat16
        assert bool(((output.double() - exact).abs() <= bound).all())


def test_compiled_layers_are_not_packed() -> None:
    model = small_model()
    model[3].compile()
    with packed_for_sampling(model, rows=4):
        assert "forward" not in vars(model[0]) and "forward" not in vars(model[3])
