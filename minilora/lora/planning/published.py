"""The figures that papers and tutorials give for LoRA, computed by the planner, and where they do not follow exactly."""

from __future__ import annotations

from typing import NamedTuple

from ...nn.linear import check_size
from ...shown import shown
from ..config import Config
from .costs import Storage
from .human import human
from .plan import Plan, plan

__all__ = ["Figure", "gpt3", "gpt_shapes", "published_figures"]

Entry = tuple[str, tuple[int, ...], int, str]


def gpt_shapes(layers: int, width: int, vocabulary: int, context: int) -> list[Entry]:
    """The parameters of a GPT-2 or GPT-3 model as `plan` takes them: four square matrices and a 4 x MLP a layer.

    All linear layers have biases, all norms scale and shift, and the output head is the token embedding.

    Examples
    --------
    >>> shapes = gpt_shapes(layers=12, width=768, vocabulary=50257, context=1024)
    >>> plan(shapes, Config(r=1, target_modules=["q_proj"])).full.total  # GPT-2 small
    124439808
    """
    for name, value in (("layers", layers), ("width", width), ("vocabulary", vocabulary), ("context", context)):
        check_size(name, value)
    square, vector = (width, width), (width,)
    matrices = [(f"attn.{name}", square) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    matrices += [("mlp.up", (4 * width, width)), ("mlp.down", (width, 4 * width))]
    entries: list[Entry] = [("wte", (vocabulary, width), 1, "Embedding"), ("wpe", (context, width), 1, "Embedding")]
    for name, shape in matrices:
        entries += [(f"h.*.{name}", shape, layers, ""), (f"h.*.{name}.bias", shape[:1], layers, "")]
    for norm in ("ln_1", "ln_2"):
        entries += [(f"h.*.{norm}.{part}", vector, layers, "") for part in ("weight", "bias")]
    return entries + [("ln_f.weight", vector, 1, ""), ("ln_f.bias", vector, 1, "")]


def gpt3() -> list[Entry]:
    """GPT-3 175B: 96 layers of width 12288, 50257 tokens, 2048 positions (Brown et al. 2020, arXiv 2005.14165, table 2.1)."""
    return gpt_shapes(layers=96, width=12288, vocabulary=50257, context=2048)


@shown
class Figure(NamedTuple):
    """A figure of a source: what it says, what the planner computes under the assumptions told, and why they differ."""

    source: str
    says: str
    computed: float
    line: str

    def __str__(self) -> str:
        return f"{self.source}: {self.says}. {self.line}"


HALF = Storage.of("float16")
RESUMABLE = HALF._replace(saved=6)  # a checkpoint that holds Adam's m and v beside the weights


def _gpt3(ranks: dict[str, int], storage: Storage = HALF) -> Plan:
    return plan(gpt3(), Config(target_modules=list(ranks), rank_pattern=ranks), dtype=storage)


def published_figures() -> tuple[Figure, ...]:
    """Compute the figures that papers give for LoRA's sizes. Print them with ``print(*published_figures(), sep="\\n")``.

    Examples
    --------
    >>> print(published_figures()[-1])
    the R torch article: 2,001 trained numbers, 1/500 of the base. r = 1 beside 1000 x 1001: 2,001 of 1,001,000, 1/500
    """
    qv = _gpt3({"q_proj": 4, "v_proj": 4})
    return (*_trained(qv), *_checkpoints(qv), *_memory(qv), _speed(qv), *_small())


def _trained(qv: Plan) -> list[Figure]:
    seven = _gpt3({"q_proj": 4, "v_proj": 3})
    rank = qv.lora.trained // 8  # one rank of one matrix in all layers
    total = qv.full.total
    return [
        Figure("the dimensions of GPT-3", "175 B parameters", total,
               f"12 x 96 x 12288^2 in matrices, with embeddings, biases and norms {total:,}. The LoRA paper's table has "
               "175,255.8 M, which these dimensions do not give; with an output head of its own they give "
               f"{(total + 50257 * 12288) / 1e6:,.1f} M"),
        Figure("the LoRA paper, abstract", "10,000 x fewer trained parameters", qv.fewer_trained,
               f"r = 4 on W_q and W_v: 96 x 2 x 4 x (12288 + 12288) = {qv.lora.trained:,} numbers, {qv.fewer_trained:,.0f} x "
               f"fewer; r = 4 on W_q and 3 on W_v: {seven.lora.trained:,}, {seven.fewer_trained:,.0f} x. 10,000 is rounded"),
        Figure("the tutorial", "175 B to 17.5 M trained", 17.5e6 / rank,
               f"175 B divided by 10,000: one rank of one matrix costs {rank:,} numbers in all layers, so 17.5 M are "
               f"{17.5e6 / rank:.2f} ranks, which no uniform config has; 7 give {7 * rank / 1e6:.1f} M, 8 (r = 4 on W_q and "
               f"W_v) {8 * rank / 1e6:.1f} M"),
    ]


def _checkpoints(qv: Plan) -> list[Figure]:
    one = _gpt3({"q_proj": 1, "v_proj": 1}, RESUMABLE)
    return [
        Figure("the LoRA paper, section 4.2", "checkpoint from 350 GB to 35 MB", qv.lora.checkpoint,
               f"float16, r = 4 on W_q and W_v: {human(qv.full.checkpoint)} to {human(qv.lora.checkpoint)} "
               f"({qv.lora.checkpoint / 2**20:.1f} MiB); 35 MB is 350 GB / 10,000"),
        Figure("the tutorial", "checkpoint from 1 TB to 25 MB", one.lora.checkpoint,
               "40,000 x, so another config than 350 GB to 35 MB, and it does not say which. Nearest: r = 1 on W_q and W_v, "
               f"float16 weights saved with Adam's m and v (6 bytes a number): {human(one.full.checkpoint)} to "
               f"{human(one.lora.checkpoint)}, {one.smaller_checkpoint:,.0f} x. float32 weights alone are "
               f"{human(4 * one.full.total)}"),
    ]


def _memory(qv: Plan) -> list[Figure]:
    ranks = {"q_proj": 4, "v_proj": 4}
    no_gradients = _gpt3(ranks, HALF._replace(gradient=0))
    mixed = _gpt3(ranks, HALF._replace(trained=6, moment=4))
    return [
        Figure("the LoRA paper, abstract", "3 x less memory, with Adam", no_gradients.less_memory,
               f"weights, m and v in float16, gradients used up at once: {human(no_gradients.full.memory)} to "
               f"{human(no_gradients.lora.memory)}, {no_gradients.less_memory:.2f} x"),
        Figure("the LoRA paper, section 4.2", "from 1.2 TB to 350 GB", qv.less_memory,
               f"3.43 x. 1.2 TB are {1.2e12 / qv.full.total:.1f} bytes a number, between {human(no_gradients.full.memory)} "
               f"without and {human(qv.full.memory)} with gradients, all in float16 (then {qv.less_memory:.2f} x); 350 GB are "
               "the float16 weights. With float32 copies, m and v of what is trained, as in mixed precision: "
               f"{human(mixed.full.memory)} to {human(mixed.lora.memory)}, {mixed.less_memory:.2f} x"),
    ]


def _speed(qv: Plan) -> Figure:
    flops = [costs.forward + costs.backward for costs in (qv.full, qv.lora)]
    return Figure("the LoRA paper, section 4.2", "training 25 % faster", flops[0] / flops[1],
                  f"dW is not formed: {flops[0] / flops[1]:.2f} x fewer FLOPs in the products with weights; the rest of "
                  "a step, such as attention's own products, costs the same in both")


def _small() -> list[Figure]:
    square = plan([("W", (200, 200))], Config(r=20, target_modules=["W"]))
    shift = plan([("theta", (1000, 1001))], Config(r=1, lora_alpha=1, target_modules=["theta"]))
    full, a, b = square.full.trained, square.adapters[0].a, square.adapters[0].b
    return [
        Figure("the article with attention code", "80 % saved at n = m = 200, k = 20", 1 - 1 / square.fewer_trained,
               f"{full:,} numbers in W; {a:,} in A, {b:,} in B: {full - a - b:,} saved, {100 * (full - a - b) / full:.0f} %"),
        Figure("the R torch article", "2,001 trained numbers, 1/500 of the base", shift.lora.trained,
               f"r = 1 beside 1000 x 1001: {shift.lora.trained:,} of {shift.full.trained:,}, 1/{shift.fewer_trained:.0f}"),
    ]
