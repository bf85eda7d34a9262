"""Print the coefficients of minilora/ops/erf.py.

    python tests/data/make_erf_table.py

A tool for the maintainers: it needs mpmath, the library does not.

R(t) = e^(t^2/2) Phi(-t) falls smoothly from 1/2 to 1 / (t sqrt(2 pi)), so a quotient P/Q with one degree more below fits
the whole half line. u = (t - c) / (t + c) maps [0, 40] into [-1, 1); the 2n unknown coefficients (Q's leading one is 1)
are found from P(t_i) = R(t_i) Q(t_i) at the 2n points t_i that belong to Chebyshev points of u, of the kind that has one end,
t = 0, among them: so P(0) / Q(0) is 1/2. These equations are linear; they are solved with 60 digits. Interpolation at
Chebyshev points is close to the best fit in u, and c is taken where the largest relative error is least.
"""
import mpmath as mp

mp.mp.dps = 60
END = mp.mpf(40)


def R(t):
    return mp.exp(t * t / 2) * mp.erfc(t / mp.sqrt(2)) / 2


def fit(n, c):
    """P and Q, from the lowest coefficient up, of degrees n - 1 and n."""
    top = (END - c) / (END + c)
    cosines = [mp.cos(2 * mp.pi * i / (4 * n - 1)) for i in range(2 * n)]
    us = [top - (top + 1) * (1 + x) / 2 for x in cosines]
    ts = [c * (1 + u) / (1 - u) for u in us]
    rows = [[t ** j for j in range(n)] + [-R(t) * t ** j for j in range(n)] for t in ts]
    solution = mp.lu_solve(mp.matrix(rows), mp.matrix([R(t) * t ** n for t in ts]))
    return list(solution[:n]), [*solution[n:], mp.mpf(1)]


def error(P, Q):
    ts = [END * (mp.mpf(i) / 500) ** 2 for i in range(501)]
    return max(abs(mp.polyval(P[::-1], t) / mp.polyval(Q[::-1], t) / R(t) - 1) for t in ts)


for n in (5, 10):
    least, c = min((error(*fit(n, mp.mpf(k) / 8)), mp.mpf(k) / 8) for k in range(20, 36))
    P, Q = fit(n, c)
    print(f"n = {n}, c = {mp.nstr(c, 4)}: largest relative error {mp.nstr(least, 2)}")
    for name, coefficients in (("P", P), ("Q", Q)):
        print(f"  {name} = {', '.join(repr(float(a)) for a in coefficients)}")
