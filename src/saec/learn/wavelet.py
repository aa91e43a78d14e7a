"""The discrete wavelet transform along a sequence, differentiable: Daubechies' wavelet with six vanishing moments.

The cascade of filter banks is Mallat's (1989), the filter Daubechies' (Ten Lectures on Wavelets, 1992, table 6.1,
N = 6) in the digits of PyWavelets 1.8. This is its ``wavedec(x, "db6", mode="symmetric")``, for any length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv1d

LOW = (
    *(-0.0010773010853084796, 0.004777257510945511, 0.0005538422011614961, -0.03158203931748603),
    *(0.027522865530305727, 0.09750160558732304, -0.12976686756726194, -0.22626469396543983),
    *(0.31525035170919763, 0.7511339080210954, 0.49462389039845306, 0.11154074335010947),
)
"""The decomposition low-pass filter; the high-pass one is its quadrature mirror."""

HIGH = tuple(tap if at % 2 else -tap for at, tap in enumerate(reversed(LOW)))

_BANK = torch.tensor([LOW, HIGH], dtype=torch.float64).flip(1)[:, None]  # conv1d correlates: the filters are turned


def wavedec(x: Tensor, levels: int = 3) -> list[Tensor]:
    """Return the coarsest approximation and the high bands of ``x`` [T, C], the coarsest first, each [n, C].

    The sequence is mirrored at both ends, its last value doubled (half-sample symmetry), as often as the filter needs;
    so a level gives (T + 11) // 2 coefficients, and the high bands of a constant are 0 but for rounding.
    """
    bank = _BANK.to(x)
    low, highs = x.T[:, None], list[Tensor]()
    for _ in range(levels):
        both = conv1d(low[..., _mirrored(low.shape[-1], x.device)], bank, stride=2)
        low = both[:, :1]
        highs.append(both[:, 1].T)
    return [low[:, 0].T, *reversed(highs)]


def _mirrored(length: int, device: torch.device) -> Tensor:
    """Return which values stand in the extended sequence: ... 1 0 | 0 1 ... n-1 | n-1 n-2 ..."""
    taps = len(LOW)
    at = torch.arange(2 - taps, 2 * ((length + taps - 1) // 2), device=device) % (2 * length)
    return torch.minimum(at, 2 * length - 1 - at)
