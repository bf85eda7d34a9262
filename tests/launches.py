"""What one training step asks of a GPU, counted on the stand-in: launches, copies to the card, waits.

    python tests/launches.py        the table of docs/gpu.md

The number of launches depends on layers and blocks, not on widths: GPT-2 is narrow, and blocks are cut as in the full size; the
main job has its own widths, by which its loss is added up in two stages. What CuPy's own reductions start besides (CUB: two
kernels more for a sum of all numbers) is not counted.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import standin

import minilora
from minilora import lora, models
from minilora.kernels.gpu import attention as gpu_attention
from minilora.kernels.gpu import low_rank as gpu_low_rank
from minilora.kernels.gpu import rows as gpu_rows

HEADS, CLASSES = 12, 50  # in the narrow GPT-2


class Job(NamedTuple):
    """A step, and what it may cost: whoever adds a launch or a copy says here why."""

    make: Callable
    launches: int
    copies: int  # host to device


def main_job(adapted=True, cached=False):
    """The step of bench_step.py: draw rows, gather, forward, mean squared error, backward, Adam."""
    rng = numpy.random.default_rng(0)
    X, Y = (minilora.to_device(rng.standard_normal((200, n), "float32")) for n in (1001, 1000))
    layer = minilora.nn.Linear(1001, 1000, bias=False, rng=rng)
    if adapted:
        layer = minilora.lora.adapt(layer, r=1, lora_alpha=1)
    forward = layer.update if cached else layer
    optimizer = minilora.optim.Adam(layer.parameters())

    def step():
        rows = minilora.to_device(rng.integers(0, 200, 128))
        loss = minilora.ops.mse(forward(X[rows]), Y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def gpt2(adapted=True, batch=8, T=512, base=None, **options):
    """12 layers and 12 heads of one number each; 2 texts of T tokens, in blocks like those of `batch` texts and 50257 classes.

    Not one text: its heads are evenly spaced, and need not be moved. `counted` puts the sizes of the blocks back.
    """
    gpu_attention.SCORES //= batch // 2
    gpu_low_rank.CHUNK //= batch // 2
    gpu_low_rank.U_BY_CUBLAS //= batch // 2
    gpu_low_rank.ALL_BY_CUBLAS //= batch // 2
    gpu_rows.FusedLinearCrossEntropy.most = gpu_rows.FusedLinearCrossEntropy.most * CLASSES // (batch // 2 * 50257)
    config = minilora.nn.GPT2Config(vocab_size=CLASSES, n_positions=T, n_embd=HEADS, n_layer=12, n_head=HEADS)
    model = minilora.nn.GPT2(config, rng=0)
    if adapted:
        model.requires_grad(False)
        for block in model.h:
            block.attn.c_attn = minilora.lora.adapt(block.attn.c_attn, r=8, lora_alpha=16, **options)
    if base:
        minilora.quant.quantize(model, base)
        minilora.quant.half_products(model)
    optimizer = minilora.optim.Adam(model.parameters())
    ids = numpy.random.default_rng(0).integers(0, CLASSES, (2, T))

    def step():
        loss = model.loss(ids, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def unet():
    """16 images of 8 x 8 and 4 x 4; updates of every convolution of a residual block, and of attention's projections."""
    model = models.UNet(models.UNetConfig(block_out_channels=(8, 16), norm_num_groups=4), rng=0)
    model.requires_grad(False)
    lora.inject(model, lora.Config(r=4, target_modules=["conv1", "conv2", "to_q", "to_v"]), rng=0)
    optimizer, rng = minilora.optim.Adam([p for p in model.parameters() if p.trainable]), numpy.random.default_rng(0)
    x, noise = (minilora.to_device(rng.standard_normal((16, 1, 8, 8), "float32")) for _ in range(2))

    def step():
        loss = minilora.ops.mse(model(x, rng.integers(0, 1000, 16)), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


JOBS = {
    "main job, LoRA": Job(main_job, 9, 1),
    "main job, LoRA, cached frozen output": Job(lambda: main_job(cached=True), 8, 1),
    "main job, all weights": Job(lambda: main_job(adapted=False), 7, 1),
    "GPT-2 small, 8 x 512, LoRA": Job(gpt2, 596, 2),
    "GPT-2 small, 8 x 512, fused QKV LoRA": Job(lambda: gpt2(enable_lora=(True, False, True)), 595, 2),
    "GPT-2 small, 4 x 128, DoRA": Job(lambda: gpt2(batch=4, T=128, use_dora=True), 533, 2),
    "a small U-Net, LoRA of convolutions and attention": Job(unet, 673, 1),
    "GPT-2 small, 8 x 512, LoRA, bfloat16 base": Job(lambda: gpt2(base="bfloat16"), 703, 2),
    "GPT-2 small, 8 x 512, all weights": Job(lambda: gpt2(adapted=False), 722, 2),
    "GPT-2 small, 4 x 128, LoRA": Job(lambda: gpt2(batch=4, T=128), 437, 2),
}


@functools.cache
def counts_of(name):
    """`counted`, of a job of the table."""
    return counted(JOBS[name].make)


def counted(make):
    """`standin.Counts` of the second step: the first one makes what stays."""
    kept = gpu_attention.SCORES, gpu_rows.FusedLinearCrossEntropy.most
    thin = gpu_low_rank.CHUNK, gpu_low_rank.U_BY_CUBLAS, gpu_low_rank.ALL_BY_CUBLAS
    try:
        with standin.card():
            step = make()
            step()
            with standin.counting() as counts:
                step()
        return counts
    finally:
        gpu_attention.SCORES, gpu_rows.FusedLinearCrossEntropy.most = kept
        gpu_low_rank.CHUNK, gpu_low_rank.U_BY_CUBLAS, gpu_low_rank.ALL_BY_CUBLAS = thin


def rows():
    """The table of docs/gpu.md, a line for each job."""
    yield "| one step | launches | of these products | copies to the card | waits |"
    yield "|---|---:|---:|---:|---:|"
    for name in JOBS:
        counts = counts_of(name)
        products = sum(counts.calls[call] for call in ("dot", "matmul", "gemm"))
        yield f"| {name} | {counts.launches:,} | {products} | {counts.h2d} | {counts.syncs} |"


if __name__ == "__main__":
    print(*rows(), sep="\n")
