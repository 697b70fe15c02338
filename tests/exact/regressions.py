"""Where regressions of each sample rest, and logistic ones of each pair, on the grid of grid.py (EXACT_TESTS 4.3).

Samples are those of the reference, x0 ~ p. With W = u - v_ref and δ = v - v_ref the error of the velocity falls by

    g = w(t) (2 δ W - δ²)

of which CRD and PAR make the reward itself, DPO a margin and KTO a gain. None of this uses rlalign's losses.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit

from .grid import EDGE, KNOTS, LEVELS, REFERENCE, SIGMAS, Array, Given, T, exact, samples

MIDDLE = slice(4, 8)  # levels that are trained: t from 0.68 to 0.86 ...
PAIRED = slice(5, 7)  # ... and with pairs, which need more samples: 0.75 and 0.81
NOTHING: Array = np.zeros((LEVELS, KNOTS))


def per_sample(given: Given, beta: float, weights: Array, centred: bool, importance: bool) -> Array:
    """[N, X] δ at the minimum of E[(β (g - m) - s)² | x_t], s = ``given.reward``, w(t) = ``weights`` [N].

    ``centred``: m = E g over everything, else 0. ``importance``: each row counts e^g, taken as a number.
    """
    w, s = weights[:, None, None], given.reward
    missed, table, middle = given.u - REFERENCE[..., None], NOTHING, 0.0
    for _ in range(30):
        gain = w * (2 * table[..., None] * missed - table[..., None] ** 2)
        if centred:
            middle = float((given.density * given.mean(gain))[MIDDLE].sum() / len(T[MIDDLE]))
        count = np.exp(gain) if importance else np.ones_like(gain)
        a = -(beta * middle + s)  # what is squared: a + 2 β w W δ - β w δ²
        mean = [given.mean(count * part) for part in (missed * a, missed**2, a + 0 * missed, missed)]
        b, alike = beta * weights[:, None], given.mean(count)
        table = np.vectorize(lowest)(
            b**2 * alike, -4 * b**2 * mean[3], 4 * b**2 * mean[1] - 2 * b * mean[2], 4 * b * mean[0]
        )
    return table


def lowest(fourth: float, third: float, second: float, first: float) -> float:
    """Where the polynomial is lowest."""
    roots = np.roots([4 * fourth, 3 * third, 2 * second, first])
    real = roots[np.abs(roots.imag) < 1e-9].real
    return float(real[np.argmin(np.polyval([fourth, third, second, first, 0.0], real))])


# --- pairs that share their time and their noise


@dataclass(frozen=True, slots=True)
class Pairs:
    """Members of pairs at one level, and how likely each pair is; a wins with the chance σ(s_a - s_b)."""

    hats: tuple[csr_array, csr_array]  # [n, X] each: which knots a member lies between
    missed: tuple[Array, Array]  # [n] W of each
    chance: Array  # [n] that a wins
    weight: Array  # [n] sums to 1

    def gains(self, delta: Array) -> list[Array]:
        """[n] g of each member."""
        values = [hats @ delta for hats in self.hats]
        return [2 * value * W - value**2 for value, W in zip(values, self.missed, strict=True)]

    def slopes(self, delta: Array, of_gains: list[Array]) -> Array:
        """[X] a derivative by both gains as one by δ."""
        values = [hats @ delta for hats in self.hats]
        parts = zip(self.hats, values, self.missed, of_gains, strict=True)
        return sum((hats.T @ (slope * 2 * (W - value)) for hats, value, W, slope in parts), np.zeros(KNOTS))


def pairs_at(level: int, slope: float) -> Pairs:
    """By quadrature over the noises that both started from, and over the one that they share; s = slope x0."""
    nodes, noise, t = np.linspace(-4, 4, 37), np.linspace(-4, 4, 31), SIGMAS[level]
    mass, share = np.exp(-(nodes**2) / 2), np.exp(-(noise**2) / 2)
    x0 = samples(NOTHING, nodes)
    a, b = np.triu_indices(len(nodes))
    twice = np.where(a == b, 1, 2)  # (a, b) and (b, a) say the same
    weight = (twice * mass[a] * mass[b] / mass.sum() ** 2)[:, None] * share / share.sum()
    first, second = ((1 - t) * x0[one][:, None] + t * noise for one in (a, b))
    kept = weight.flatten() > 1e-8
    hats, missed = [], []
    for x, one in ((first, a), (second, b)):
        flat = x.flatten()[kept]
        u = (noise - x0[one][:, None]).flatten()[kept]
        hats.append(hats_at(flat))
        missed.append(u - exact(flat, float(t)))
    chance = expit(slope * (x0[a] - x0[b]))[:, None] + 0 * noise
    return Pairs((hats[0], hats[1]), (missed[0], missed[1]), chance.flatten()[kept], weight.flatten()[kept])


def hats_at(x: Array) -> csr_array:
    """[n, X]: the shares of the two knots around each x."""
    place = np.clip((x + EDGE) / (2 * EDGE) * (KNOTS - 1), 0, KNOTS - 1)
    left = np.minimum(np.floor(place), KNOTS - 2).astype(int)
    rows, share = np.arange(len(x)), place - left
    entries = np.concatenate([1 - share, share]), (np.tile(rows, 2), np.concatenate([left, left + 1]))
    return csr_array(entries, shape=(len(x), KNOTS))


def softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def dpo(slope: float, beta: float, form: Literal["sigmoid", "ipo"] = "sigmoid") -> Array:
    """[N, X] δ at the minimum of  -E log σ(h),  h = (β/2) (g_winner - g_loser), or of  E (h/β - 1/(2β))²."""
    table = NOTHING.copy()
    for level in range(LEVELS)[PAIRED]:
        pairs = pairs_at(level, slope)

        def loss(delta: Array, pairs: Pairs = pairs) -> tuple[float, Array]:
            one, two = pairs.gains(delta)
            h, p = beta / 2 * (one - two), pairs.chance
            if form == "ipo":
                m = 1 / 2  # of h
                value = (pairs.weight * (p * (h - m) ** 2 + (1 - p) * (h + m) ** 2)).sum() / beta**2
                by_h = pairs.weight * 2 * (h - (2 * p - 1) * m) / beta**2 * beta / 2
            else:
                value = (pairs.weight * (p * softplus(-h) + (1 - p) * softplus(h))).sum()
                by_h = pairs.weight * (expit(h) - p) * beta / 2
            return float(value), pairs.slopes(delta, [by_h, -by_h])

        table[level] = lbfgs(loss, table[level])
    return table


def kto(slope: float, beta: float, liked: float) -> Array:
    """[N, X] δ where  E λ (1 - σ(± β (g - z)))  is lowest for its own z = max(0, mean of the pair's g)."""
    table = NOTHING.copy()
    for level in range(LEVELS)[PAIRED]:
        pairs = pairs_at(level, slope)
        for _ in range(6):
            one, two = pairs.gains(table[level])
            z = np.maximum(0, (one + two) / 2)

            def loss(delta: Array, pairs: Pairs = pairs, z: Array = z) -> tuple[float, Array]:
                value, slopes = 0.0, list[Array]()
                for gain, chance in zip(pairs.gains(delta), (pairs.chance, 1 - pairs.chance), strict=True):
                    up = expit(beta * (gain - z))
                    value += float((pairs.weight * (liked * chance * (1 - up) + (1 - chance) * up)).sum()) / 2
                    slopes.append(pairs.weight * beta * up * (1 - up) * (1 - chance - liked * chance) / 2)
                return value, pairs.slopes(delta, slopes)

            table[level] = lbfgs(loss, table[level])
    return table


def lbfgs(loss: object, start: Array) -> Array:
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200, "ftol": 1e-10, "gtol": 1e-8})
    return found.x
