"""Fits the polynomials of src/simd/math.rs.

Each is a weighted minimax fit, found by Lawson's iteratively reweighted least squares on Chebyshev points against mpmath
values; the weight turns the error of the fitted piece into relative error of the final function. Rounding to f32 is part of
the fit: coefficients are rounded one at a time, the others refitted after each, and a seeded search over neighbouring f32
values polishes the result. Prints Rust constants, lowest degree first, and the relative error they leave, in units of 2^-24.

    pip install numpy mpmath && python reference/fit_elementary.py
"""

import mpmath as mp
import numpy as np

mp.mp.dps = 30
ROOT_HALF = 1 / mp.sqrt(2)
# 1/√(2π), in f32: the limit of a Q(a) below.
LIMIT = float(np.float32(1 / mp.sqrt(2 * mp.pi)))


def chebyshev_points(low, high, count=400):
    angles = np.pi * (np.arange(count) + 0.5) / count
    return (low + high) / 2 - (high - low) / 2 * np.cos(angles)


def values(function, points):
    return np.array([float(function(mp.mpf(p))) for p in points])


def lawson(columns, target, weight, rounds=120):
    """Coefficients c that minimise max |weight (columns c - target)|."""
    share = np.full(len(target), 1 / len(target))
    best = (np.inf, None)
    for _ in range(rounds):
        row = np.sqrt(share) * weight
        scale = np.linalg.norm(columns * row[:, None], axis=0)
        c = np.linalg.lstsq(columns * row[:, None] / scale, target * row, rcond=None)[0] / scale
        error = np.abs(weight * (columns @ c - target))
        if error.max() < best[0]:
            best = (error.max(), c)
        share = share * error
        share /= share.sum()
    return best[1]


def polynomial(c, t):
    return np.polyval(c[::-1], t)


def fit(t, target, weight, top, bottom=0, constant=1.0):
    """f32 coefficients of P(t) / R(t) ≈ target, P of degree `top`, R of degree `bottom` with R(0) = `constant`."""
    fixed = {("R", 0): float(np.float32(constant))}
    keys = [("R", i) for i in range(1, bottom + 1)] + [("P", i) for i in range(top + 1)]

    def split(c):
        return [c[("P", i)] for i in range(top + 1)], [c[("R", i)] for i in range(bottom + 1)]

    def error(c):
        p, r = split(c)
        return np.abs(weight * (polynomial(p, t) / polynomial(r, t) - target)).max()

    def refit():
        free = [k for k in keys if k not in fixed]
        denominator = np.ones_like(t)
        for _ in range(12 if bottom else 1):
            column = {k: t ** k[1] if k[0] == "P" else -target * t ** k[1] for k in keys}
            known = fixed[("R", 0)] * target - sum(fixed[k] * column[k] for k in keys if k in fixed)
            c = dict(fixed)
            c.update(zip(free, lawson(np.stack([column[k] for k in free], 1), known, weight / denominator)))
            denominator = polynomial(split(c)[1], t)
        return c

    for key in keys:
        fixed[key] = float(np.float32(refit()[key]))
    best, least = dict(fixed), error(fixed)
    random = np.random.default_rng(1)
    for _ in range(5000):
        trial = dict(best)
        for _ in range(random.integers(1, 4)):
            key = keys[random.integers(len(keys))]
            trial[key] = float(np.nextafter(np.float32(trial[key]), np.float32(random.choice([-99.0, 99.0]))))
        if error(trial) < least:
            best, least = trial, error(trial)
    return *split(best), least


def show(name, c, least):
    numbers = ", ".join(np.format_float_scientific(np.float32(x), unique=True, trim="0") for x in c)
    print(f"const {name}: [f32; {len(c)}] = [{numbers}]; // {least * 2**24:.3f}")


def main():
    # e^r = 1 + r + r² P(r) for |r| ≤ ½ ln 2 (and a little more, for n is rounded from an f32 product).
    t = chebyshev_points(-0.3467, 0.3467)
    p, _, least = fit(t, values(lambda r: (mp.expm1(r) - r) / r**2, t), t**2 / np.exp(t), 4)
    show("EXP", p, least)

    # erf(x) = x + x P(x²) near 0.
    x = chebyshev_points(0, ERF_SPLIT)
    erf = values(mp.erf, x)
    p, _, least = fit(x * x, erf / x - 1, x / erf, 5)
    show("ERF_NEAR", p, least)
    # erf(x) = 1 - e^P(x) above.
    x = chebyshev_points(ERF_SPLIT, 4)
    p, _, least = fit(x, values(lambda z: mp.log(mp.erfc(z)), x), values(lambda z: mp.erfc(z) / mp.erf(z), x), 6)
    show("ERF_FAR", p, least)

    # tanh(x) = x + x³ P(x²) near 0.
    x = chebyshev_points(0, TANH_SPLIT)
    tanh = values(mp.tanh, x)
    cubic = values(lambda z: (mp.tanh(z) - z) / z**3, x)
    p, _, least = fit(x * x, cubic, x**3 / tanh, 4)
    show("TANH_NEAR", p, least)

    # x Φ(x) = ½ x + h P(h) with h = -x²/2 near 0, weighted for the negative side, where it is smallest.
    a = chebyshev_points(0, GELU_SPLIT)
    odd = values(lambda z: mp.erf(z * ROOT_HALF) / z, a)
    p, _, least = fit(-a * a / 2, -odd, a / (1 - a * odd), 4)
    show("GELU_NEAR", p, least)
    # a Φ(-a) = e^(-a²/2) (1/√(2π) - P(a) / R(a)) above. R(0) is free; this one puts R and P just below powers of two where
    # their rounding counts most, next to the split.
    a = GELU_SPLIT + (14.5 - GELU_SPLIT) * chebyshev_points(0, 1) ** 2
    mills = values(lambda z: z * mp.erfc(z * ROOT_HALF) / 2 * mp.exp(z * z / 2), a)
    p, r, least = fit(a, LIMIT - mills, 1 / mills, 3, 5, 0.725)
    show("GELU_FAR", p, least)
    show("GELU_FAR_DIVISOR", r, least)


# Where the formulas meet; the same numbers stand in math.rs.
ERF_SPLIT = 0.9
TANH_SPLIT = 0.55
GELU_SPLIT = 0.86

if __name__ == "__main__":
    main()
