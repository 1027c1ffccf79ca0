"""How far something learnt carries over: SPECS's Generalization Factor."""

from __future__ import annotations

from typing import Literal

Mode = Literal["raw", "relative"]


def generalization_factor(inside: float, outside: float, *, beta: float = 2.0) -> float:
    """F_beta of what holds in distribution (`inside`) and out of it (`outside`).

        GF = (1 + beta^2) I O / (beta^2 I + O)        (SPECS, arXiv 2510.25801)

    With beta above 1 `outside` counts more: GF(1, x) < GF(x, 1) for x < 1. GF(x, x) = x, and GF
    lies between the two. Both are in the unit that GF shall have: shares, or per cent.

    Deviation: the paper says nothing of a negative gain; what is not above 0 counts as 0, and then
    GF is 0. Raises ValueError where beta is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}, wanted a positive number")
    if inside <= 0 or outside <= 0:
        return 0.0
    # As the weighted harmonic mean: a product of two small shares would vanish.
    weight = beta * beta
    return (1 + weight) / (1 / inside + weight / outside)


def generalization_factors(
    now: tuple[float, float], first: tuple[float, float], *, beta: float = 2.0
) -> dict[Mode, float]:
    """Both readings of the paper's G. now, first: rates (inside, outside) of a model and of its
    base.

    raw: of the rates themselves. The paper's plots are that, though its text speaks of gains.
    relative: of the gains over `first`; a loss counts as no gain.
    """
    (inside, outside), (inside_first, outside_first) = now, first
    return {
        "raw": generalization_factor(inside, outside, beta=beta),
        "relative": generalization_factor(
            inside - inside_first, outside - outside_first, beta=beta
        ),
    }
