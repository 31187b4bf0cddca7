"""The decoder's last layer against its reference, in the interpreter and compiled."""

import pytest
import torch
import torch.nn.functional as F

from kernels import sdf_head
from kernels.conv import reference as reference_conv
from tests.kernel_inputs import DEVICE, assert_no_worse
from tests.kernels.compiled_launches import compiled_launches

torch.set_num_threads(1)


def random_inputs(N, C, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(C, N, generator=generator).T * 3  # not contiguous
    w, b = torch.randn(C, generator=generator) / C**0.5, torch.randn(1, generator=generator)
    return [t.to(DEVICE, dtype) for t in (x, w, b)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("N", "C"), [(0, 8), (1, 32), (63, 1), (5000, 32), (400, 40)]
)  # 5000: programs of 2048 rows
def test_value_and_gradients_match_the_reference(N, C, dtype):
    inputs = random_inputs(N, C, dtype)

    def kernel(*args):
        return sdf_head(*args, backend="triton")

    assert_no_worse(kernel, reference_conv.sdf_head, inputs, ["x", "weight", "bias"])


def test_the_reference_equals_torch():
    x, w, b = (t.double() for t in random_inputs(50, 8, torch.float32))
    torch.testing.assert_close(
        sdf_head(x, w, b, backend="reference"), torch.tanh(F.linear(F.silu(x), w[None], b))[:, 0]
    )


def test_large_inputs_saturate_and_stay_finite():
    x = torch.tensor([[300.0], [-300.0], [0.0]], device=DEVICE, requires_grad=True)
    w, b = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    y = sdf_head(x, w, b, backend="triton")
    y.sum().backward()
    assert y.tolist() == [1.0, 0.0, 0.0]
    assert sdf_head(x, -w, b, backend="triton")[0] == -1.0
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_NC": torch.zeros(3)}, r"x_NC must be floating \[N, C\]"),
        (
            {"weight_C": torch.zeros(3)},
            r"weight_C must be \[4\] in x_NC's dtype or float32 on cpu, got torch.float32 \[3\]",
        ),
        ({"bias_1": torch.zeros(1).half()}, r"bias_1 must be \[1\].*got torch.float16"),
        ({"x_NC": torch.zeros(2, 4).double()}, "x_NC must be one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    inputs = {
        "x_NC": torch.zeros(2, 4),
        "weight_C": torch.zeros(4),
        "bias_1": torch.zeros(1),
    } | change
    with pytest.raises(ValueError, match=message):
        sdf_head(**inputs, backend="triton")


@pytest.mark.parametrize("arch", ["80", "90"])
def test_it_compiles_without_spills(arch):
    launches = compiled_launches("-m", "tests.kernels.conv.compile_sdf_head", arch, "bfloat16", 32)
    assert [launch["name"] for launch in launches] == ["_head_fwd", "_head_bwd"]
    assert all(launch["spilled"] == 0 and launch["shared"] < 16384 for launch in launches)


@pytest.mark.gpu
def test_bf16_on_the_gpu():
    inputs = random_inputs(100_003, 32, torch.bfloat16)
    assert_no_worse(sdf_head, reference_conv.sdf_head, inputs, ["x", "weight", "bias"])
