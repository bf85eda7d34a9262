"""Principal angles between the spaces that two updates read, or write."""

from __future__ import annotations

import numpy

from ...backend import to_host
from ...errors import ShapeError
from .factors import LowRank
from .subspaces import directions

__all__ = ["principal_angles"]


def principal_angles(one: LowRank, two: LowRank, of: str = "V") -> numpy.ndarray:
    """The angles between the subspaces of two updates, as many as the smaller has dimensions.

    With orthonormal bases U1 (n, p) and U2 (n, q), p >= q, the singular values of U1^T U2 are the cosines of the angles, and
    those of U2 - U1 (U1^T U2), what is left of U2 outside of the first space, their sines. A small angle is lost in its cosine,
    1 - angle^2 / 2, and a right one in its sine: each angle is taken from the one that has it.

    Parameters
    ----------
    one, two : LowRank
        Of one layer; the ranks may differ.
    of : "A", "B", "V" or "U"
        As in `subspace_similarity`: V is the space of inputs that D reads, U that of outputs that it writes.

    Returns
    -------
    numpy.ndarray of float64
        In radians, smallest first: 0 for a shared direction, pi / 2 for one at right angles to all of the other space.

    Raises
    ------
    ShapeError
        If the spaces are of different dimensions.
    StateError
        If one of the updates is 0 and has no directions, or holds NaN or inf.

    Notes
    -----
    Source: Bjorck and Golub 1973, "Numerical methods for computing angles between linear subspaces".

    Examples
    --------
    >>> import numpy
    >>> one = LowRank(A=numpy.eye(3)[:2], B=numpy.eye(2))
    >>> two = LowRank(A=numpy.array([[1.0, 0.0, 1.0]]), B=numpy.ones((2, 1)))
    >>> numpy.degrees(principal_angles(one, two)).round(9)
    array([45.])
    """
    U1, U2 = directions(one, of), directions(two, of)
    if len(U1) != len(U2):
        raise ShapeError(f"principal_angles: updates of shapes {one.shape} and {two.shape}: {of} lives in {len(U1)} and "
                         f"{len(U2)} dimensions")
    if U1.shape[1] < U2.shape[1]:
        U1, U2 = U2, U1
    xp = one.device.exact
    inside = xp.dot(U1.T, U2)
    cosines = to_host(xp.linalg.svd(inside, compute_uv=False))
    sines = to_host(xp.linalg.svd(U2 - xp.dot(U1, inside), compute_uv=False))[::-1]
    angles: numpy.ndarray = numpy.where(cosines ** 2 < 0.5, numpy.arccos(numpy.clip(cosines, 0, 1)),
                                        numpy.arcsin(numpy.clip(sines, 0, 1)))
    return angles
