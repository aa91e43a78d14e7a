"""The wavelet transform of the distillation is PyWavelets' own, and tells nothing of what is constant."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the train extra is not installed")

import torch

from saec.learn.wavelet import HIGH, LOW, wavedec

# pywt.wavedec(x, "db6", mode="symmetric", level=3) of PyWavelets 1.8, coarsest first, nine digits
GOLDEN = {
    21: (
        "0.158004377 0.225549646 0.241434357 0.173755475 0.225094172 0.149955017 0.275581015 0.198963621 0.167587167 "
        "0.199408493 0.152074971 0.177175544",
        "-0.019995961 0.045351645 0.053798643 0.016264637 0.008246949 0.071237493 0.012348184 -0.014749743 "
        "-0.070650936 -0.019226991 0.009256966 -0.091252614",
        "-0.047166707 -0.009994208 -0.292460363 -0.072246105 0.27748338 0.33310908 -0.155277571 -0.287397819 "
        "-0.01103986 0.332628727 0.084425993 -0.286195786 -0.318350315",
        "0.128826987 -0.804484176 -0.044280604 0.163241321 0.556696473 0.410090895 0.448393934 0.437090302 "
        "-0.046753415 -0.373861241 -0.574759776 0.595241464 0.387032338 -0.0303816 -0.377524171 -0.6149283",
    ),
    5: (  # shorter than the filter
        "0.106842903 0.225095118 0.245142208 0.164075915 0.066519787 0.137543484 0.268120581 0.222742745 0.093875418 "
        "0.106842903",
        "0.013997047 -0.027467157 0.081175261 -0.020317206 -0.075340073 0.070218798 0.03139076 -0.087148948 "
        "0.013491519 0.013997047",
        "-0.045615489 -0.010047434 -0.292154431 -0.06805275 0.055351642 0.003989257 0.303192415 0.053336788 "
        "-0.045615489",
        "0.128826987 -0.804484176 -0.044280604 0.163241321 0.556696473 0.128826987 -0.804484176 -0.044280604",
    ),
}


def signal(length: int) -> torch.Tensor:
    return torch.tensor([((7 * i * i + 3 * i) % 11) / 11 - 0.3 for i in range(length)], dtype=torch.float64)


@pytest.mark.parametrize("length", GOLDEN)
def test_the_coefficients_are_those_of_pywavelets(length: int):
    found = wavedec(torch.stack([signal(length), -2 * signal(length)], dim=1))
    for bands, text in zip(found, GOLDEN[length], strict=True):
        golden = torch.tensor([float(number) for number in text.split()], dtype=torch.float64)
        assert bands[:, 0].tolist() == pytest.approx(golden.tolist(), abs=1e-9)
        assert torch.allclose(bands[:, 1], -2 * bands[:, 0])


def test_the_filters_are_orthonormal_and_have_six_vanishing_moments():
    low, high = torch.tensor(LOW, dtype=torch.float64), torch.tensor(HIGH, dtype=torch.float64)
    for shift in range(6):
        kept = len(LOW) - 2 * shift
        assert float(low[:kept] @ low[2 * shift :]) == pytest.approx(float(shift == 0), abs=1e-11)
        assert float(low[:kept] @ high[2 * shift :]) == pytest.approx(0, abs=1e-11)
    at = torch.arange(len(HIGH), dtype=torch.float64)
    for power in range(6):
        assert float((high * (at / 11) ** power).sum()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("length", [1, 2, 3, 12, 64, 89])
def test_the_high_bands_of_a_constant_are_zero_at_any_length(length: int):
    low, *highs = wavedec(torch.full((length, 3), 2.5))
    assert len(highs) == 3
    assert all(float(high.abs().max()) < 1e-5 for high in highs)
    assert low == pytest.approx(2.5 * 8**0.5, rel=1e-5)


def test_gradients_pass_through_every_level():
    x = signal(9).reshape(-1, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(wavedec(x)), x)
