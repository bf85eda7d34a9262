"""One training step of a GPT-2-small shape, random weights: LoRA in minilora against transformers + peft on the CPU.

12 layers, width 768, 12 heads, vocabulary 50257, batch 4 x 128, float32; LoRA of rank 8 on c_attn (12 times 8 (768 + 2304)
numbers), Adam with its defaults, no dropout. A step: forward, cross-entropy, backward, Adam. Besides: full fine-tuning in
minilora, which shows what LoRA spares, and the matrix products of the LoRA step alone, which nothing can go below.

How the sides alternate, and why in processes of their own: alternate.py. The peak is that of each side's process.
"""

import functools
import resource

import alternate
import numpy
from alternate import compare, comparison_table, median, quartiles, recorded, run, table, timed

LAYERS, D, HEADS, VOCABULARY, BATCH, TIME, R, ALPHA = 12, 768, 12, 50257, 4, 128, 8, 16
POSITIONS = 1024
alternate.WARM_UP = 1  # a step takes a second


def tokens():
    return numpy.random.default_rng(0).integers(0, VOCABULARY, (BATCH, TIME))


def with_peak(run, held=None):
    """Each turn's figures with the peak memory of the process and, if `held` tells it, what the card holds; MB."""
    def measured(n):
        figures = {**run(n), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}  # KB on Linux
        return figures if held is None else {**figures, "held": held() / 2**20}
    return measured


# -- minilora ---------------------------------------------------------------------------------------------------------


def minilora_model(device):
    import minilora
    minilora.use(device)
    config = minilora.nn.GPT2Config(vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=D, n_layer=LAYERS, n_head=HEADS)
    return minilora.nn.GPT2(config, rng=0)


def minilora_steps(model, device, recorded=False):
    import minilora
    ids = tokens()
    optimizer = minilora.optim.Adam(model.parameters())

    def with_ids(ids):
        loss = model.loss(ids, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    step = functools.partial(minilora.record(with_ids) if recorded else with_ids, ids)

    def held():
        import cupy
        plays = step.func._plays.values() if recorded else ()  # graphs have their memory in a pool of their own
        own = sum(play.pool.total_bytes() for play in plays)
        return cupy.get_default_memory_pool().total_bytes() + own

    def kept():
        last[0] = step()

    last = [None]
    return with_peak(timed(kept, minilora.synchronize, lambda: last[0].item()), held if device == "gpu" else None)


def minilora_lora(device="cpu", recorded=False, tf32=False, base=None):
    """With `base` "bfloat16", the frozen weights are held in it, and multiplied as they are where a card can."""
    import minilora
    if tf32:
        minilora.use(device, tf32=True)
    model = minilora_model(device).requires_grad(False)
    for block in model.h:
        block.attn.c_attn = minilora.lora.adapt(block.attn.c_attn, r=R, lora_alpha=ALPHA)
    if base:
        minilora.quant.quantize(model, base)
        minilora.quant.half_products(model)
    return minilora_steps(model, device, recorded)


def minilora_full(device="cpu"):
    return minilora_steps(minilora_model(device), device)


# -- transformers and peft --------------------------------------------------------------------------------------------


def peft_lora(device="cpu", graph=False, tf32=False, base=None, autocast=False):
    """With `base` "bfloat16", the base model is in it, beside adapters in float32; autocast is that to bfloat16."""
    import peft
    import torch
    import transformers
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=D, n_layer=LAYERS, n_head=HEADS,
                                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    if tf32:
        torch.set_float32_matmul_precision("high")
    model = transformers.GPT2LMHeadModel(config).to(getattr(torch, base or "float32"))
    model = peft.get_peft_model(model, peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["c_attn"], fan_in_fan_out=True))
    model.to(device)
    ids = torch.from_numpy(tokens()).to(device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], capturable=graph)
    model.train()

    def step():
        nonlocal loss
        with torch.autocast(device, torch.bfloat16, autocast, cache_enabled=not graph):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    loss = None
    if graph:
        step = recorded(step)
    if device == "cuda":
        return with_peak(timed(step, torch.cuda.synchronize, lambda: loss.item()), torch.cuda.max_memory_reserved)
    return with_peak(timed(step, loss=lambda: loss.item()))


# -- floor ------------------------------------------------------------------------------------------------------------


def products():
    """The big products of the LoRA step as (m, k, n, times): forward, and dx where a gradient goes down."""
    N, linears = BATCH * TIME, [(D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)]
    sizes = [(N, i, o, LAYERS) for i, o in linears] + [(N, D, VOCABULARY, 1)]
    return sizes + [(m, o, i, times - (o == 3 * D)) for m, i, o, times in sizes]  # no dx below the first c_attn


def products_alone():
    rng = numpy.random.default_rng(0)
    operands = [(rng.standard_normal((m, k), dtype="float32"), rng.standard_normal((k, n), dtype="float32"),
                 numpy.empty((m, n), "float32"), times) for m, k, n, times in products()]

    def step():
        for a, b, out, times in operands:
            for _ in range(times):
                numpy.dot(a, b, out=out)

    return with_peak(timed(step))


SIDES = {
    "minilora, LoRA": minilora_lora,
    "transformers + peft, LoRA": peft_lora,
    "minilora, full fine-tuning": minilora_full,
    "NumPy, the big products alone": products_alone,
}


def report(results):
    gflop = sum(2e-9 * m * k * n * times for m, k, n, times in products())
    rows = []
    for name, rounds in results.items():
        low, high = quartiles(rounds)
        rows.append([name, f"{median(rounds):.3f}", f"{low:.3f} to {high:.3f}", f"{median(rounds, 'peak'):.0f}"])
    print(table(["side", "s a step", "quartiles", "peak MB"], rows) + "\n")
    print(f"the big products of the LoRA step: {gflop:.0f} GFLOP\n")
    comparisons = compare(results, [
        ("LoRA / transformers + peft", "minilora, LoRA", "transformers + peft, LoRA", 0.95),
        ("LoRA / transformers + peft, peak memory", "minilora, LoRA", "transformers + peft, LoRA", 0.50, "peak"),
        ("big products / LoRA step", "NumPy, the big products alone", "minilora, LoRA", None),
        ("LoRA / full fine-tuning", "minilora, LoRA", "minilora, full fine-tuning", None),
        ("LoRA / full fine-tuning, peak memory", "minilora, LoRA", "minilora, full fine-tuning", None, "peak"),
    ])
    print(comparison_table(comparisons))
    return comparisons


if __name__ == "__main__":
    run(__file__, __doc__.split("\n")[0], SIDES, report, rounds=6, steps=3)
