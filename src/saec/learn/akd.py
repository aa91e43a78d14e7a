"""Adapter-based knowledge distillation (CD-CCA, Wang et al., CVPR 2024): the loss.

    loss = weight CE(answer, label) + w_features L(query) + w_language L(language) + w_logits KL(teacher || student)
    L(h) = MSE(A h_s, h_t) + sum over three levels j of the mean |high_j(W(A h_s)) - high_j(W(h_t))|

``A`` is a learned projection to the teacher's width, ``W`` the wavelet transform along the tokens
(:mod:`saec.learn.wavelet`). Squares and absolute values are means over tokens (or coefficients) and width. Features are
in units of the root mean square of the teacher's, sample by sample, so that a weight means the same for any model.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from saec.config import DistillSettings
from saec.learn.features import Seen
from saec.learn.wavelet import wavedec


def projections(student: int, teacher: int, *, seed: int = 0) -> nn.ModuleDict:
    """Return the two A, ``query`` and ``language``, from one width to another: the identity where they are equal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.ModuleDict({name: nn.Linear(student, teacher, bias=False) for name in ("query", "language")})
        for linear in made.values():
            (nn.init.eye_ if student == teacher else nn.init.orthogonal_)(linear.weight)
    return made


def akd_terms(
    student: Seen, teacher: Seen, p_defect: Tensor, weight: Tensor, widths: nn.ModuleDict, settings: DistillSettings
) -> dict[str, Tensor]:
    """Return the weighted terms of the loss by name, each summed over the samples; a weight of 0 in ``settings`` leaves
    its term out.

    ``p_defect`` [B] are the labels, soft or 0 and 1, and ``weight`` [B] says how much each label counts, in the term of
    the answer alone: a part whose label counts for nothing still shows what the teacher sees in it. Where a label and
    the teacher's own answer are on different sides of one half, somebody knew better than the teacher, whatever the
    weight of the label: there its hidden states and logits teach nothing.

    The teacher's features must carry no gradient. Where it has another number of tokens than the student, its sequence
    is brought to the student's length: two square grids of visual tokens bilinearly over the grid, all else linearly
    along the sequence, ends on ends.
    """
    answer = -(p_defect * student.log_p[:, 1] + (1 - p_defect) * student.log_p[:, 0])
    believed = (p_defect >= 0.5) == (teacher.log_p[:, 1] >= teacher.log_p[:, 0])
    terms = {"answer": (weight * answer).sum()}
    if settings.weight_features:
        query = _distances(student.query, teacher.query, widths["query"], grid=True)
        terms["query"] = settings.weight_features * query.sum()
    if settings.weight_language:
        language = _distances(student.language, teacher.language, widths["language"], grid=False)
        terms["language"] = settings.weight_language * (believed * language).sum()
    if settings.weight_logits:
        divergence = (teacher.log_p.exp() * (teacher.log_p - student.log_p)).sum(1)
        terms["logits"] = settings.weight_logits * (believed * divergence).sum()
    return terms


def _distances(student: Sequence[Tensor], teacher: Sequence[Tensor], width: nn.Linear, *, grid: bool) -> Tensor:
    """Return L of each sample, [B]."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([feature_distance(width(own), resampled(aim, len(own), grid=grid)) for own, aim in pairs])


def feature_distance(own: Tensor, aim: Tensor) -> Tensor:
    """Return L of one sample from features [T, C] of equal shape, in units of the root mean square of ``aim``.

    The transform is linear, so that of the difference is taken once.
    """
    apart = (own - aim) / aim.square().mean().sqrt().clamp(min=1e-6)
    return torch.stack([apart.square().mean(), *(high.abs().mean() for high in wavedec(apart)[1:])]).sum()


def resampled(features: Tensor, length: int, *, grid: bool) -> Tensor:
    """Return features [T, C] as [length, C]; see :func:`akd_terms`."""
    old, new = isqrt(len(features)), isqrt(length)
    if len(features) == length:
        return features
    if grid and old * old == len(features) and new * new == length:
        image = features.T.reshape(1, -1, old, old)
        return interpolate(image, size=(new, new), mode="bilinear", antialias=new < old)[0].flatten(1).T
    return interpolate(features.T[None], size=length, mode="linear", align_corners=True)[0].T
