"""Rows of the table of operations (cases.py): low-rank updates of an embedding table and of a fused projection."""
from __future__ import annotations

import numpy as np
from cases import LEADING, ROWS, SIDE, Case, linear, lora_kept
from cases_norms import IDS, looked_up, plan_kept
from hypothesis import strategies as st

from minilora.lora.gradients.embedding import LoRAEmbedding, lora_embedding
from minilora.lora.gradients.fused import LoRAMergedLinear, LoRAMergedUpdate, lora_merged_linear, lora_merged_update
from minilora.lora.gradients.rows import AddRows, add_rows
from minilora.lora.gradients.tokens import TokenEmbedding, TokenHead, token_embedding, token_head

CASES: list[Case] = []


def case(name, op, call, formula, *shapes, **settings):
    CASES.append(Case(name, op, call, formula, shapes, products=True, **settings))


# -- embedding --------------------------------------------------------------------------------------------------------


def looked_up_in_sum(ids, s):
    """One-hot rows times the table with its update."""
    return lambda W, A, B: looked_up(ids)(W + s * np.einsum("jv,dj->vd", A, B))


def embedding_kept(ids):
    def kept(needs, W, A, B, y):
        needs_W, needs_A, needs_B = needs
        plan = plan_kept(ids)(needs, W, y)
        return (needs_W or needs_A) * plan + needs_A * B.size + needs_B * np.size(ids) * A.shape[0]
    return kept


for name, ids in IDS.items():
    case(f"lora_embedding {name}", LoRAEmbedding, lambda W, A, B, i=ids: lora_embedding(i, W, A, B, 2.0),
         looked_up_in_sum(ids, 2), (5, 3), (2, 5), (3, 2), affine=True, kept=embedding_kept(ids))
case("lora_embedding r=1", LoRAEmbedding, lambda W, A, B: lora_embedding([1, 0, 1], W, A, B, 0.375),
     looked_up_in_sum([1, 0, 1], 0.375), (2, 3), (1, 2), (3, 1), kept=embedding_kept([1, 0, 1]))


def many_of(W):
    return np.arange(19) ** 2 % len(W)


case("lora_embedding drawn", LoRAEmbedding, lambda W, A, B: lora_embedding(many_of(W), W, A, B, -1.5),
     lambda W, A, B: looked_up_in_sum(many_of(W), -1.5)(W, A, B), (7, 2), (3, 7), (2, 3),
     kept=embedding_kept(np.arange(19) ** 2 % 7),
     drawn=st.tuples(st.integers(1, 9), SIDE, SIDE).map(lambda d: ((d[0], d[1]), (d[2], d[0]), (d[1], d[2]))))


# -- replaced rows of a table -----------------------------------------------------------------------------------------


def with_rows(W, T, indices):
    """The table with its new rows, as products with 0 and 1."""
    chosen = np.zeros((len(W), len(T)))
    chosen[list(indices), np.arange(len(T))] = 1.0
    return W * (1.0 - chosen.sum(1, keepdims=True)) + chosen @ T


def tokens_kept(ids, indices):
    def kept(needs, W, T, y):
        flat = np.asarray(ids).reshape(-1)
        new = np.isin(flat, indices)
        return sum(needed * 2 * (2 * part.size + np.unique(part).size) for needed, part in zip(needs, (flat[~new], flat[new])))
    return kept


for name, ids in IDS.items():
    case(f"token_embedding {name}", TokenEmbedding, lambda W, T, i=ids: token_embedding(i, W, T, [4, 1]),
         lambda W, T, i=ids: looked_up(i)(with_rows(W, T, [4, 1])), (5, 3), (2, 3), affine=True, kept=tokens_kept(ids, [4, 1]))
case("token_embedding no rows", TokenEmbedding, lambda W, T: token_embedding([1, 0, 1], W, T, []),
     lambda W, T: looked_up([1, 0, 1])(W), (5, 3), (0, 3), affine=True, kept=tokens_kept([1, 0, 1], []))
case("token_embedding all rows", TokenEmbedding, lambda W, T: token_embedding([1, 0, 1], W, T, [1, 0]),
     lambda W, T: looked_up([1, 0, 1])(with_rows(W, T, [1, 0])), (2, 3), (2, 3), affine=True,
     kept=tokens_kept([1, 0, 1], [0, 1]))


def ending(W, T):
    """The last rows of a table, the last first."""
    return np.arange(len(W))[::-1][:len(T)]


case("token_embedding drawn", TokenEmbedding, lambda W, T: token_embedding(many_of(W), W, T, ending(W, T)),
     lambda W, T: looked_up(many_of(W))(with_rows(W, T, ending(W, T))), (7, 2), (3, 2), affine=True,
     kept=tokens_kept(np.arange(19) ** 2 % 7, [4, 5, 6]),
     drawn=st.tuples(st.integers(1, 9), st.integers(0, 3), SIDE).map(lambda d: ((d[0], d[2]), (min(d[:2]), d[2]))))


def head_kept(needs, h, W, T, y):
    needs_h, needs_W, needs_T = needs
    return (needs_W or needs_T) * h.size + needs_h * (W.size + T.size) + 2 * len(T)


for name, leading in (("", (4,)), (" 3-D", (2, 3)), (" one row", ())):
    case(f"token_head{name}", TokenHead, lambda h, W, T: token_head(h, W, T, [4, 1]),
         lambda h, W, T: h @ with_rows(W, T, [4, 1]).T, (*leading, 3), (5, 3), (2, 3), affine=True, kept=head_kept)
case("token_head no rows", TokenHead, lambda h, W, T: token_head(h, W, T, []), lambda h, W, T: h @ W.T, (4, 3), (5, 3), (0, 3),
     affine=True, kept=head_kept)
case("token_head drawn", TokenHead, lambda h, W, T: token_head(h, W, T, ending(W, T)),
     lambda h, W, T: h @ with_rows(W, T, ending(W, T)).T, (4, 2), (7, 2), (3, 2), affine=True, kept=head_kept,
     drawn=st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(0, 3), SIDE).map(
         lambda d: ((d[0], d[3]), (d[1], d[3]), (min(d[1:3]), d[3]))))


# -- fused projections --------------------------------------------------------------------------------------------------


def slot_by_slot(s, enable_lora):
    """The layer with the update of each slot merged into the rows of the weight that are the slot's."""
    def formula(x, W, *rest):
        *b, A, B = rest
        o, r = len(W) // len(enable_lora), B.shape[1]
        parts, update_of = [], iter(range(len(enable_lora)))
        for i, enabled in enumerate(enable_lora):
            part = W[i * o:(i + 1) * o]
            if enabled:
                e = next(update_of)
                part = part + s * np.einsum("kj,ji->ki", B[e * o:(e + 1) * o], A[e * r:(e + 1) * r])
            parts.append(part)
        return linear(x, np.concatenate(parts), *b)
    return formula


def shapes_of(x, o, r, enable_lora):
    out, m = o * len(enable_lora), sum(enable_lora)
    return x, (out, x[-1]), (out,), (r * m, x[-1]), (o * m, r)


QV = (True, False, True)
for name, x in ROWS.items():
    case(f"lora_merged_linear {name}", LoRAMergedLinear, lambda *a: lora_merged_linear(*a, 2.0, QV), slot_by_slot(2, QV),
         *shapes_of(x, 2, 2, QV), affine=True, kept=lora_kept,
         drawn=st.tuples(LEADING, SIDE, SIDE, SIDE).map(lambda d: shapes_of((*d[0], d[1]), d[2], d[3], QV))
         if name == "matrix" else None)
for enable_lora, o, r in [((True,), 3, 2), ((True, True, True), 1, 1), ((False, True), 2, 3)]:
    case(f"lora_merged_linear {enable_lora}", LoRAMergedLinear, lambda *a, e=enable_lora: lora_merged_linear(*a, 0.375, e),
         slot_by_slot(0.375, enable_lora), *shapes_of((5, 4), o, r, enable_lora), kept=lora_kept)
x, W, _, A, B = shapes_of((5, 4), 2, 2, QV)
case("lora_merged_linear without bias", LoRAMergedLinear, lambda x, W, A, B: lora_merged_linear(x, W, None, A, B, 2.0, QV),
     slot_by_slot(2, QV), x, W, A, B, affine=True, kept=lora_kept)


def update_by_slot(s, enable_lora):
    def formula(x, A, B):
        W = np.zeros((len(B) // sum(enable_lora) * len(enable_lora), x.shape[-1]), x.dtype)
        return slot_by_slot(s, enable_lora)(x, W, A, B)
    return formula


def updates(s, enable_lora):
    return lambda x, A, B: lora_merged_update(x, A, B, s, enable_lora, B.shape[0] // sum(enable_lora) * len(enable_lora))


def update_kept(needs, x, A, B, y):
    needs_x, needs_A, needs_B = needs
    z = x.size // x.shape[-1] * A.shape[0]
    return needs_A * x.size + needs_B * z + needs_x * A.size + (needs_x or needs_A) * B.size


def without_weight(x, o, r, enable_lora):
    x, _, _, A, B = shapes_of(x, o, r, enable_lora)
    return x, A, B


for name, x in ROWS.items():
    case(f"lora_merged_update {name}", LoRAMergedUpdate, updates(2.0, QV), update_by_slot(2, QV), *without_weight(x, 2, 2, QV),
         affine=True, kept=update_kept, drawn=st.tuples(LEADING, SIDE, SIDE, SIDE).map(
             lambda d: without_weight((*d[0], d[1]), d[2], d[3], QV)) if name == "matrix" else None)
for enable_lora, o, r in [((True,), 3, 2), ((True, True, False, True), 1, 1), ((False, True), 2, 3)]:
    case(f"lora_merged_update {enable_lora}", LoRAMergedUpdate, updates(0.375, enable_lora), update_by_slot(0.375, enable_lora),
         *without_weight((5, 4), o, r, enable_lora), kept=update_kept)


# -- rows of a mixed batch ----------------------------------------------------------------------------------------------


def added(*places):
    def formula(y, *d):
        y = y.copy()
        for rows, more in zip(places, d):
            np.add.at(y, rows, more)
        return y
    return formula


for name, places in {"runs": ([1, 2], [0]), "scattered": ([3, 0], [2]), "all rows": ([0, 1, 2, 3],), "none": ()}.items():
    CASES.append(Case(f"add_rows {name}", AddRows, lambda y, *d, p=places: add_rows(y, d, [np.array(rows) for rows in p]),
                      added(*places), ((4, 2, 3), *((len(rows), 2, 3) for rows in places)), affine=True))
