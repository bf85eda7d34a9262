"""Activation checkpointing on a GPT-2-small shape: time and memory of a LoRA step, with its blocks computed again and without.

12 layers, width 768, vocabulary 50257, batch 4 x 256, float32; LoRA of rank 8 on all linear layers of the blocks. Expected:
the forward pass is a third of the step, or less, as there is no dW: about 1.3 times as long. Kept is one input of
4 x 256 x 768 numbers (3 MB) for each of the 12 blocks, in place of all that attention, GELU, norms and adapters keep.
"""

import alternate
from alternate import compare, comparison_table, median, quartiles, run, table, timed
from bench_gpt2 import minilora_model, with_peak

alternate.WARM_UP = 1
SHAPE, R, ALPHA = (4, 256), 8, 16


def lora_step(again):
    import minilora
    import numpy
    model = minilora_model("cpu")
    minilora.lora.inject(model, minilora.lora.Config(r=R, lora_alpha=ALPHA, target_modules=["c_attn", "c_proj", "c_fc"]), rng=0)
    model.train()
    if again:
        minilora.nn.grad_checkpoint(model)
    ids = numpy.random.default_rng(0).integers(0, 50257, SHAPE)
    optimizer = minilora.optim.Adam(model.parameters())
    kept = []

    def step():
        loss = model.loss(ids, ids)
        if not kept:
            kept.append(minilora.engine.ledger(loss).nbytes / 2**20)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    measure = with_peak(timed(step))
    return lambda n: {**measure(n), "kept": kept[0]}


def everything_kept():
    return lora_step(False)


def computed_again():
    return lora_step(True)


SIDES = {"everything kept": everything_kept, "blocks computed again": computed_again}


def report(results):
    rows = []
    for name, rounds in results.items():
        low, high = quartiles(rounds)
        rows.append([name, f"{median(rounds):.3f}", f"{low:.3f} to {high:.3f}", f"{median(rounds, 'kept'):.1f}",
                     f"{median(rounds, 'peak'):.0f}"])
    print(table(["side", "s a step", "quartiles", "kept MB", "peak MB of the process"], rows) + "\n")
    comparisons = compare(results, [
        ("time", "blocks computed again", "everything kept", 1.35),
        ("kept for backward", "blocks computed again", "everything kept", 0.15, "kept"),
        ("peak memory of the process", "blocks computed again", "everything kept", None, "peak"),
    ])
    print(comparison_table(comparisons))
    return comparisons


if __name__ == "__main__":
    run(__file__, __doc__.split("\n")[0], SIDES, report, rounds=5, steps=2)
