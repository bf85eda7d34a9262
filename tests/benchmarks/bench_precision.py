"""What half precision loses, and what mixed precision saves: the figures of docs/precision.md.

First real digits (scikit-learn's 1,797, 8 x 8): a small network with a norm, trained whole by Adam, in float32, in mixed
precision with and without a scaled loss, and in float16 alone, with moments in float32 and with all of Adam in float16; several
seeds. Once in batches of 127, once with all 1,400 rows in a batch, where the gradients of a mean are smaller. Then a
GPT-2 of width 384: bytes kept for backward and seconds of a LoRA step, in alternating runs, as ratios.

    python tests/benchmarks/bench_precision.py [--quick] [--json FILE]
"""
import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import minilora  # noqa: E402
from minilora import engine, lora, models, nn, ops, optim  # noqa: E402
from minilora.half import mixed  # noqa: E402

WAYS = {  # name: (dtype of the weights, mixed, first scale, all of Adam in float16)
    "float32": ("float32", False, 1.0, False),
    "mixed, loss scaled": ("float32", True, 2.0 ** 16, False),
    "mixed, not scaled": ("float32", True, 1.0, False),
    "float16, moments in float32": ("float16", False, 1.0, False),
    "float16, Adam too": ("float16", False, 1.0, True),
}


def adam_in_half(parameters, state, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8):
    """Adam as it stands in the paper, every number of it in float16."""
    half = np.float16
    state["t"] = t = state.get("t", 0) + 1
    for i, p in enumerate(parameters):
        m, v = state.setdefault(i, (np.zeros_like(p.data), np.zeros_like(p.data)))
        m[...] = half(beta1) * m + half(1 - beta1) * p.grad
        v[...] = half(beta2) * v + half(1 - beta2) * (p.grad * p.grad)
        p.data[...] -= half(lr) * (m / half(1 - beta1 ** t)) / (np.sqrt(v / half(1 - beta2 ** t)) + half(eps))


def digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    x, y = (found.data[order] / 16.0).astype("float32"), found.target[order]
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def network(seed, dtype):
    rng = np.random.default_rng(seed)
    return nn.Sequential(nn.Linear(64, 128, rng=rng), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 128, rng=rng), nn.GELU(),
                         nn.Linear(128, 10, rng=rng)).to(dtype=dtype)


def trained(way, seed, steps, batches):
    """One run: the losses at its end, and what was lost on the way. An epoch is cut into so many batches."""
    dtype, mixing, scale, alone = WAYS[way]
    (x, y), (test_x, test_y) = digits()
    model = network(seed, dtype)
    parameters = list(model.parameters())
    optimizer = None if alone else optim.Adam(parameters, lr=1e-3)
    scaling = optim.LossScale(scale, growth_steps=200 if scale > 1 else 10 ** 9)
    rng, state, zeros = np.random.default_rng(seed), {}, []

    def loss_of(rows, labels):
        return ops.cross_entropy(model(minilora.tensor(rows, model[0].weight.dtype)), labels)

    for step in range(steps):
        if step % batches == 0:
            cut = np.array_split(rng.permutation(len(x)), batches)
        rows = cut[step % batches]
        for p in parameters:
            p.grad = None
        with np.errstate(all="ignore"), mixed(mixing):
            scaling.scaled(loss_of(x[rows], y[rows])).backward()
            if step >= steps - 10:
                zeros.append(float(np.mean(parameters[3].grad == 0)))
            if alone:
                adam_in_half(parameters, state)
            elif scale > 1:
                scaling.unscale(optimizer)
                scaling.step(optimizer, optimizer.clip_grad_norm(1e30))
            else:
                optimizer.step()
    wide = model.to(dtype="float32")
    with np.errstate(all="ignore"), minilora.no_grad():
        right = wide(minilora.tensor(test_x)).data.argmax(axis=1) == test_y
        return {"loss": loss_of(x, y).item(), "accuracy": float(right.mean()), "skipped": scaling.skipped,
                "zeros": statistics.mean(zeros)}


def shape(quick):
    """The GPT-2 of a LoRA step: small enough for two busy cores, wide enough for products to count."""
    width, layers, heads = (128, 2, 4) if quick else (384, 6, 6)
    return dict(n_embd=width, n_layer=layers, n_head=heads, vocab_size=2000, n_positions=128)


def gpt2_steps(quick):
    """Steps of the same model in full and in mixed precision, in turn."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 2000, (4, 128))
    model = models.GPT2(models.GPT2Config(**shape(quick)), rng=0)
    lora.inject(model, lora.Config(r=8, lora_alpha=16, target_modules="all-linear"), rng=0)
    optimizer = optim.Adam(model.parameters(), lr=1e-4)
    seconds, kept = {False: [], True: []}, {}
    for turn in range(3 if quick else 9):
        for mixing in (False, True) if turn % 2 else (True, False):
            began = time.process_time()
            scaling = optim.LossScale(2.0 ** 12)
            optimizer.zero_grad()
            with mixed(mixing):
                loss = model(ids, labels=ids)
                kept[mixing] = engine.ledger(loss).nbytes
                scaling.scaled(loss).backward()
                scaling.unscale(optimizer)
                norm = optimizer.clip_grad_norm(1.0)
            scaling.step(optimizer, norm)
            if turn:
                seconds[mixing].append(time.process_time() - began)
    ratios = sorted(b / a for a, b in zip(seconds[False], seconds[True]))
    return {"kept": {"full": kept[False], "mixed": kept[True], "ratio": kept[True] / kept[False]},
            "seconds": {"full": statistics.median(seconds[False]), "mixed": statistics.median(seconds[True]),
                        "ratio": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seeds, steps = (1, 30) if args.quick else (3, 600)
    figures = {"numpy": np.__version__, "processor": platform.machine(), "steps": steps, "digits": {}}
    for batches in (11, 1):
        title = f"digits, {steps} steps of {1400 // batches} rows"
        print(f"\n{title:<34} {'training loss':>20} {'test accuracy':>14} {'skipped':>8} {'zeros in dW':>12}")
        for way in WAYS:
            runs = [trained(way, seed, steps, batches) for seed in range(seeds)]
            losses = [run["loss"] for run in runs]
            figures["digits"][f"{way}, {batches} batches"] = runs
            accuracy, skipped, zeros = (statistics.mean(run[key] for run in runs) for key in ("accuracy", "skipped", "zeros"))
            print(f"{way:<34} {min(losses):>8.2e} to {max(losses):>8.2e} {accuracy:>14.2%} {skipped:>8.1f} {zeros:>12.1%}",
                  flush=True)
    figures["gpt2"] = found = gpt2_steps(args.quick)
    print(f"\nGPT-2, {shape(args.quick)}, batch 4 x 128, LoRA r = 8 on all linear layers")
    print(f"kept for backward   full {found['kept']['full'] / 1e6:.1f} MB, mixed {found['kept']['mixed'] / 1e6:.1f} MB: "
          f"{found['kept']['ratio']:.3f}")
    print(f"processor time      full {found['seconds']['full']:.3f} s, mixed {found['seconds']['mixed']:.3f} s: "
          f"{found['seconds']['ratio']:.2f} ({found['seconds']['least']:.2f} to {found['seconds']['most']:.2f})")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
