"""The functions of cublasLt that minilora calls, in the place of the loaded library.

Descriptors hold what they are told; whether it fits together is found out, as by the library itself, when the heuristic is
asked and when the product is. Seen with the library of version 13.1: a size of an attribute that is not its own is refused at
once, a value that means nothing is not.
"""
from __future__ import annotations

import ctypes
import itertools

import numpy as np

from .arrays import Address
from .counts import count, is_recorded, perform
from .cublas import BFLOAT16, INVALID, NOT_INITIALIZED, TF32, TYPES, _matrices, factor

INTERNAL_ERROR, NOT_SUPPORTED = 14, 15
SIZES = {"desc": {0: 4, 1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 4, 7: 4, 8: 8, 26: 4},  # bytes of each attribute
         "preference": {0: 4, 1: 8, 3: 4, 5: 4, 6: 4, 7: 4, 8: 4}}


class Light:
    """Checks its arguments, and computes with NumPy; every descriptor must be given back.

    Parameters
    ----------
    failing : dict of str to int
        The status that calls of this name return.
    answers : int
        So many algorithms the heuristic has.
    """

    def __init__(self, failing=None, answers=1):
        self.failing, self.answers = failing or {}, answers
        self.made, self.asked, self.calls = {}, 0, []
        self.kinds = []  # of every product: cudaDataType of its factors, cublasComputeType_t
        self._numbers = itertools.count(1000)

    def __getattr__(self, name):
        kind, _, verb = name.removeprefix("cublasLt").rpartition("Create")
        if name.startswith("cublasLt") and not verb and kind:
            return lambda *arguments: self.failing.get(name) or self._create(kind, *map(_plain, arguments))
        if name.startswith("cublasLt") and name.endswith("Destroy"):
            return self._destroy
        if name.startswith("cublasLt") and name.endswith("SetAttribute"):
            return lambda *arguments: self.failing.get(name) or self._set(*map(_plain, arguments))
        raise AttributeError(name)

    def _create(self, kind, place, *given):
        number = next(self._numbers)
        if kind == "MatmulDesc":
            compute, scale = given
            self.made[number] = {"kind": "desc", "compute": compute, "scale": scale, 3: 0, 4: 0, 7: 1, 8: 0}
        elif kind == "MatrixLayout":
            dtype, rows, columns, ld = given
            self.made[number] = {"kind": "layout", "type": dtype, "rows": rows, "columns": columns, "ld": ld}
        else:
            assert kind == "MatmulPreference" and not given
            self.made[number] = {"kind": "preference", 1: 0, **dict.fromkeys((5, 6, 7, 8), 256)}
        place._obj.value = number
        return 0

    def _destroy(self, made):
        del self.made[_plain(made)]
        return 0

    def _set(self, made, attribute, value, size):
        held = self.made[made]
        if SIZES[held["kind"]].get(attribute) != size or ctypes.sizeof(value._obj) != size:
            return INVALID
        held[attribute] = value._obj.value or 0
        return 0

    def _problem(self, operation, left, right, c, d):
        """The status that a combination deserves, and what it says."""
        held = [self.made[x] for x in (left, right, c, d)]
        if [x["kind"] for x in held] != ["layout"] * 4 or operation["kind"] != "desc":
            return INVALID
        a, b, c, d = held
        m, n = d["rows"], d["columns"]
        (rows_a, k), (other, columns_b) = ((x["rows"], x["columns"])[::-1 if operation[op] else 1]
                                           for x, op in ((a, 3), (b, 4)))
        fits = (rows_a == m and columns_b == n and other == k and (c["rows"], c["columns"]) == (m, n) and min(m, n, k) > 0
                and all(x["ld"] >= x["rows"] for x in held) and operation[3] in (0, 1) and operation[4] in (0, 1))
        if not fits or operation[7] == 4 and not operation[8]:  # a bias at no address
            return INVALID
        types = a["type"], b["type"], c["type"], d["type"], operation["scale"], operation["compute"]
        known = {(t, t, 0, 0, 0, 68) for t in (0, 2, BFLOAT16)} | {(0, 0, 0, 0, 0, TF32), (1, 1, 1, 1, 1, 70)}
        return 0 if types in known and operation[7] in (1, 4) else NOT_SUPPORTED

    def cublasLtMatmulAlgoGetHeuristic(self, handle, operation, left, right, c, d, preference, wanted, found, number):
        self.asked += 1
        if status := self.failing.get("cublasLtMatmulAlgoGetHeuristic"):
            return status
        if is_recorded():
            return INTERNAL_ERROR  # as in CUDA 13.3
        if not _plain(handle):
            return NOT_INITIALIZED
        operation, left, right, c, d, preference = map(_plain, (operation, left, right, c, d, preference))
        if status := self._problem(self.made[operation], left, right, c, d):
            return status
        assert self.made[preference]["kind"] == "preference" and wanted == 1
        number._obj.value = min(wanted, self.answers)
        if self.answers:
            aligned = [self.made[preference][attribute] for attribute in (5, 6, 7, 8)]
            found._obj.algorithm[:6] = [operation, self.made[preference][1], *aligned]
        return 0 if self.answers else NOT_SUPPORTED

    def cublasLtMatmul(self, *arguments):
        (handle, operation, alpha, a, left, b, right, beta, c, of_c, d, of_d, algorithm, workspace, size, stream) = map(
            _plain, arguments)
        if status := self.failing.get("cublasLtMatmul"):
            return status
        held = self.made[operation]
        if status := self._problem(held, left, right, of_c, of_d):
            return status
        kept_for, room, *aligned = algorithm._obj[:6]
        addresses = [a, b, c, d]
        if not handle or kept_for != operation or size < room or workspace % 16 or Address.known(workspace).root.nbytes < size:
            return INVALID
        if any(x % multiple for x, multiple in zip(addresses, aligned)) or (held[7] == 4 and held[8] % 16):
            raise AssertionError("misaligned address: a kernel would read what it must not")
        self.calls.append((self.made[left], self.made[right], self.made[of_d], stream))
        kind, compute = self.made[left]["type"], held["compute"]
        self.kinds.append((kind, compute))
        layouts = [self.made[x] for x in (left, right, of_d)]
        dtype = TYPES[layouts[2]["type"]][0]
        one, two, out = (_matrices(place, TYPES[x["type"]][0] if x["type"] != BFLOAT16 else np.uint16, x["rows"],
                                   x["columns"], x["ld"], 0, 1)[0] for place, x in zip((a, b, d), layouts))
        one, two = one.T if held[3] else one, two.T if held[4] else two
        bias = _matrices(held[8], dtype, out.shape[0], 1, out.shape[0], 0, 1)[0] if held[7] == 4 else None
        times, kept = alpha._obj.value, beta._obj.value

        def compute_now():
            with np.errstate(all="ignore"):
                product = np.dot(factor(two.T, kind, compute), factor(one.T, kind, compute)).T
                product = product if times == 1.0 else dtype(times) * product
                product = product if kept == 0.0 else product + dtype(kept) * out
                out[...] = product if bias is None else product + bias

        count("gemm", "launches")
        perform(compute_now)
        return 0


def _plain(argument):
    value = getattr(argument, "value", argument)
    return 0 if value is None else value
