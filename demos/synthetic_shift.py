"""The synthetic shift: train a linear model, shift its task, repair the model with a low-rank update.

    python demos/synthetic_shift.py                  full size: 1,001,000 weights, then 2,001
    python demos/synthetic_shift.py --quick          a small one, in seconds
    python demos/synthetic_shift.py --device gpu     the same code on the GPU

The task is y = X theta. Pre-training finds the whole of theta. Then every entry of theta grows by 1: a change of
rank 1, for a matrix of ones is a column of ones times a row of ones. So an update B A of rank 1 beside the frozen
weight must be enough, and what it learns must be a matrix of ones. `run` tells this from top to bottom.

Writes report.json and report.png. Exit codes: 0 done, 2 wrong usage, 4 diverged, 130 interrupted.
"""

import sys
import time

from showing import console, synthetic_shift as pages  # first: it says how to install minilora
from showing.divergence import Watch
from showing.progress import Progress

import minilora
import numpy

SETTINGS = {  # name: (full size, --quick, meaning). Full size is the article's.
    "n": (10_000, 3_200, "rows of data"),
    "d_in": (1001, 61, "inputs"),
    "d_out": (1000, 60, "outputs"),
    "r": (1, 1, "rank of the update"),
    "lora_alpha": (1.0, 1.0, "the update is scaled by lora_alpha / r"),
    "epochs": (100, 40, "epochs of each of the two trainings"),
    "batch_size": (128, 64, "rows in a batch"),
    "lr": (1e-3, 5e-3, "learning rate of Adam"),
}


def run(config, report):
    """The whole job. `rng` draws everything random on the host: one seed gives one run on every device."""
    rng = numpy.random.default_rng(config.seed)

    console.heading("1. Data: y = X theta")
    theta = rng.standard_normal((config.d_in, config.d_out))
    x, y = draw_data(theta, config, rng)
    print(f"X {x.shape}, theta {theta.shape}: all from N(0, 1)")

    console.heading("2. Pre-training: every weight is trained")
    base = minilora.nn.Linear(config.d_in, config.d_out, bias=False, dtype=config.dtype, rng=rng)
    print(minilora.summary(base).trainable_line)
    record = report["pretraining"] = {"trained": minilora.summary(base).trained}
    train("pre-training", base, base.parameters(), x, y, config, rng, record)
    print(pages.loss_table("pretraining", report))

    console.heading("3. Shift: theta + 1, and fresh X")
    x, y = draw_data(theta + 1.0, config, rng)
    report["base_loss_on_shifted"] = mean_loss(base, x, y)
    print(pages.base_line(report))

    console.heading("4. LoRA: the weight is frozen, A and B are trained")
    pretrained = base.weight.numpy()  # a copy
    layer = minilora.lora.adapt(base, r=config.r, lora_alpha=config.lora_alpha, init_lora_weights="gaussian", rng=rng)
    print(minilora.summary(layer).trainable_line)
    record = report["lora"] = {"trained": minilora.summary(layer).trained}
    if config.cache_base:
        # x W^T never changes, so it can be computed once: then y - x W^T is what the update alone has to give.
        print("cached frozen output: y - base(X) computed once, the update is trained against it")
        with minilora.no_grad():
            residual = y - base(x).data
        train("LoRA", layer.update, layer.parameters(), x, residual, config, rng, record)
    else:
        train("LoRA", layer, layer.parameters(), x, y, config, rng, record)
    print(pages.loss_table("lora", report))

    console.heading("5. What it learned: delta = (lora_alpha / r) B A")
    delta = minilora.to_host(layer.delta()).astype("float64")
    singular = numpy.linalg.svd(delta, compute_uv=False)
    rounding = singular[0] * max(delta.shape) * float(numpy.finfo(config.dtype).eps)
    report["delta"] = {
        "corner": delta[:5, :5].tolist(),
        "max_abs_error": float(abs(delta - 1.0).max()),
        "mean_abs_error": float(abs(delta - 1.0).mean()),
        "singular_values": singular[:12].tolist(),
        "rank": int((singular > rounding).sum()),
    }
    print(pages.delta_text(report))

    console.heading("6. Merge: W + delta in the place of W, and back")
    adapter_loss = mean_loss(layer, x, y)
    layer.merge()
    merged_loss = mean_loss(layer, x, y)
    layer.unmerge()
    report["merge"] = {
        "adapter_loss": adapter_loss,
        "merged_loss": merged_loss,
        "relative_difference": abs(merged_loss - adapter_loss) / adapter_loss if adapter_loss else 0.0,
        "base_restored_bit_for_bit": layer.weight.numpy().tobytes() == pretrained.tobytes(),
    }
    print(pages.merge_text(report))
    return delta


def draw_data(theta, config, rng):
    """X (n, d_in) from N(0, 1) and y = X theta (n, d_out), moved to the device once."""
    x = rng.standard_normal((config.n, config.d_in)).astype(config.dtype)
    return minilora.to_device(x), minilora.to_device(x @ theta.astype(config.dtype))


def draw_batches(config, rng):
    """The rows of one epoch's batches (steps, batch_size), moved at once; no row comes twice in a batch."""
    rows = [rng.choice(config.n, config.batch_size, replace=False) for _ in range(config.n // config.batch_size)]
    return minilora.to_device(numpy.stack(rows))


def train(label, predict, parameters, x, y, config, rng, record):
    """Adam on random batches. `record` grows with every epoch, so that an interrupted run leaves what is known."""
    loss_of = minilora.nn.MSELoss()
    optimizer = minilora.optim.Adam(parameters, lr=config.lr)
    measured = {round(config.epochs * k / 10) for k in range(1, 11)}  # the epochs at which all data is looked at
    steps = config.n // config.batch_size
    record.update(steps=0, seconds=0.0, steps_per_second=0.0, last_batch_loss=[], epochs=[], losses=[])
    watch = Watch(*console.gentler(config, SETTINGS, "lr", "lora_alpha"), unit="epoch")

    @minilora.record  # on a GPU one launch for the whole step
    def step(batch):
        loss = loss_of(predict(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    with Progress(label, config.epochs * steps, interval=0) as progress:
        for epoch in range(1, config.epochs + 1):
            began = time.perf_counter()
            for batch in draw_batches(config, rng):
                loss = step(batch)
            last = loss.item()  # sync point, the only one of an epoch
            record["seconds"] += time.perf_counter() - began
            record["steps"] += steps
            record["steps_per_second"] = record["steps"] / record["seconds"]
            record["last_batch_loss"].append(watch.check(last, epoch))
            shown = f"last batch {last:<9.4g}"
            if epoch in measured:
                loss_on_all = watch.check(mean_loss(predict, x, y), epoch)
                record["epochs"].append(epoch)
                record["losses"].append(loss_on_all)
                shown = f"all data   {loss_on_all:<9.4g}"
            progress.advance(steps, f"epoch {epoch:>{len(str(config.epochs))}}/{config.epochs}  {shown}")
    print(f"{record['steps']:,} steps in {record['seconds']:.1f} s, {record['steps_per_second']:.1f} steps/s")


@minilora.no_grad()
def mean_loss(predict, x, y, chunk=1000):
    """The mean squared error over all rows, `chunk` of them at a time to save memory."""
    loss_of = minilora.nn.MSELoss()
    total = sum(loss_of(predict(x[i:i + chunk]), y[i:i + chunk]) * len(x[i:i + chunk]) for i in range(0, len(x), chunk))
    return total.item() / len(x)


def parse():
    """The configuration, or exit code 2 with every problem on one line."""
    parser, config = console.configuration("synthetic_shift", __doc__.split("\n")[0], SETTINGS, more={
        "--dtype": {"choices": ["float32", "float64"], "default": "float32"},
        "--cache-base": {"action": "store_true", "help": "compute the frozen layer's output only once"}})
    problems = [f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}"
                for name in ("n", "d_in", "d_out", "r", "epochs", "batch_size") if getattr(config, name) < 1]
    if 1 <= min(config.d_in, config.d_out) < config.r:
        problems.append(f"--r {config.r} is more than min(--d-in, --d-out) = {min(config.d_in, config.d_out)}: "
                        "no update of that rank exists")
    if 1 <= config.n < config.batch_size:
        problems.append(f"--batch-size {config.batch_size} is more than the {config.n} rows of --n")
    console.refuse(parser, config, problems, positive=("lr",), nonzero=("lora_alpha",))
    return config


def main():
    config = parse()
    report = console.begun(
        config, dtype=config.dtype, full_size=all(getattr(config, name) == full for name, (full, _, _) in SETTINGS.items()),
        frozen_output="cached frozen output" if config.cache_base else "computed in every step")
    with console.reporting(report):
        print(console.title(pages.title(report)))
        with numpy.errstate(over="ignore", invalid="ignore"):  # the check of the loss says it better
            delta = run(config, report)
    print("\n" + pages.draw(report, delta))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main, "synthetic_shift.py"))
