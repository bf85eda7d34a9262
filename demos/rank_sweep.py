"""Rank, alpha and initialisation of LoRA, on a task whose true rank is known.

    python demos/rank_sweep.py                  an update of rank 4 for 48 x 64 weights
    python demos/rank_sweep.py --quick          a smaller one
    python demos/rank_sweep.py --k 6 --noise 0.3 --device gpu

A frozen layer W meets data that ask for W + D*, where D* has rank k: y = x (W + D*)^T + noise. Three questions:
how small a loss does LoRA of rank r reach, what does alpha do to the speed, and how must A and B start?

The first has an exact answer to compare with. X is whitened, X^T X = n I, so that the mean squared error of an update D
is |D - F|^2 / d_out plus what no weight can explain, where F is the least-squares update: no data are left in it. By
Eckart and Young, the best D of rank r is the SVD of F cut after r values, and its loss is the sum of the squared
singular values cut off, divided by d_out. On fresh data the same holds with D* in the place of F, and noise^2 remains.

Writes report.json and report.png. Exit codes: 0 done, 2 wrong usage, 4 diverged, 130 interrupted.
"""

import math
import statistics
import sys

from showing import console, rank_sweep as pages  # first: it says how to install minilora
from showing.divergence import Watch
from showing.progress import Progress

import minilora
import numpy

SETTINGS = {  # name: (full size, --quick, meaning)
    "n": (1000, 300, "rows of data"),
    "d_in": (64, 24, "inputs"),
    "d_out": (48, 16, "outputs"),
    "k": (4, 2, "rank of the true update"),
    "noise": (0.1, 0.1, "standard deviation of the noise in y"),
    "lora_alpha": (4.0, 2.0, "the update is scaled by lora_alpha / r"),
    "steps": (400, 200, "steps of each training, on all rows"),
    "lr": (0.01, 0.02, "learning rate of Adam"),
}
ALPHAS = (1 / 16, 1 / 4, 1, 4, 16, 64, 256)  # times lora_alpha
INITS = ("A uniform, B = 0", "A gaussian, B = 0", "A = 0, B uniform", "both uniform", "both 0")  # first: the default
REPEATS = 3  # draws of A and B where speeds are compared
CLOSE = 1.05  # a training has arrived when its loss is at most this times the best one of its rank


class Task:
    """A frozen layer, data that ask for an update of rank k, and the best losses of every rank."""

    def __init__(self, config):
        rng = numpy.random.default_rng(config.seed)
        self.config = config
        sizes = numpy.sqrt(config.d_out / numpy.arange(1, config.k + 1))  # the i-th adds 1 / i to the base's loss
        self.true_update = orthonormal(rng, config.d_out, config.k) * sizes @ orthonormal(rng, config.d_in, config.k).T
        self.base = minilora.nn.Linear(config.d_in, config.d_out, bias=False, rng=rng)
        W = self.base.weight.numpy()
        x = orthonormal(rng, config.n, config.d_in) * math.sqrt(config.n)
        y = x @ (W + self.true_update).T + config.noise * rng.standard_normal((config.n, config.d_out))
        self.x, self.y = minilora.to_device(x.astype("float32")), minilora.to_device(y.astype("float32"))
        self.fitted_update = y.T @ x / config.n - W  # least squares: without whitening, times (X^T X / n)^-1
        self.unexplained = float(numpy.square(y - x @ (W + self.fitted_update).T).mean())
        self.floor = config.noise ** 2
        self.true_values, self.fitted_values = (numpy.linalg.svd(update, compute_uv=False)
                                                for update in (self.true_update, self.fitted_update))

    def best_training_loss(self, r):
        """Of all updates of rank r: Eckart and Young's bound."""
        return self.unexplained + float(numpy.square(self.fitted_values[r:]).sum()) / self.config.d_out

    def best_fresh_loss(self, r):
        return self.floor + float(numpy.square(self.true_values[r:]).sum()) / self.config.d_out

    def fresh_loss(self, update):
        """The expected loss on data never seen. It needs no data, since the truth is known."""
        return self.floor + float(numpy.square(update - self.true_update).sum()) / self.config.d_out

    def layer(self, r, lora_alpha, init=INITS[0], repeat=0):
        """LoRA beside the frozen layer. Equal r and repeat give equal draws."""
        rng = numpy.random.default_rng((self.config.seed, 1 + repeat))
        layer = minilora.lora.adapt(self.base, r=r, lora_alpha=lora_alpha, rng=rng,
                                    init_lora_weights="gaussian" if init == "A gaussian, B = 0" else True)
        if init in ("A = 0, B uniform", "both 0"):
            layer.lora_A.data = layer.lora_A.data * 0.0
        if init in ("A = 0, B uniform", "both uniform"):
            B = rng.uniform(-1.0, 1.0, layer.lora_B.shape) / math.sqrt(r)  # a new Linear(r, d_out) draws so
            layer.lora_B.data = minilora.to_device(B.astype("float32"))
        return layer


def orthonormal(rng, rows, columns):
    """Random orthonormal columns (rows, columns)."""
    return numpy.linalg.qr(rng.standard_normal((rows, columns)))[0]


def train(layer, task, lr):
    """Adam on all rows in every step, without the luck of a batch. Gives what the report says of a training."""
    loss_of = minilora.nn.MSELoss()
    optimizer = minilora.optim.Adam(layer.parameters(), lr=lr)
    losses = []
    for _ in range(task.config.steps):
        loss = loss_of(layer(task.x), task.y)
        losses.append(loss.data)  # on the device: nothing waits for a number before the training is over
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with minilora.no_grad():
        losses.append(loss_of(layer(task.x), task.y).data)
    watch = Watch(*console.gentler(task.config, SETTINGS, "lr", "lora_alpha"),
                  f"with r = {layer.r} and s = {layer.scaling:g} the loss")
    curve = [watch.check(float(minilora.to_host(loss)), step) for step, loss in enumerate(losses)]
    base, best = task.best_training_loss(0), task.best_training_loss(layer.r)
    return {
        "r": layer.r, "lora_alpha": layer.lora_alpha, "scaling": layer.scaling,
        "training_loss": curve[-1], "best_training_loss": best,
        "fresh_loss": task.fresh_loss(minilora.to_host(layer.delta())),
        "best_fresh_loss": task.best_fresh_loss(layer.r),
        "steps_to_halfway": first_below(curve, (base + best) / 2), "steps_to_best": first_below(curve, CLOSE * best),
        "curve": curve,
    }


def first_below(curve, loss):
    """The number of steps after which a loss is reached; None if never."""
    return next((step for step, value in enumerate(curve) if value <= loss), None)


def median(steps):
    """The middle one, where None (never) is longer than any; so the median may be None."""
    middle = statistics.median_high(math.inf if step is None else step for step in steps)
    return None if middle == math.inf else middle


def run(config, report):
    """The whole job, in four comparisons. The report grows with every training."""
    task = Task(config)
    some, all_values = config.k, min(config.d_in, config.d_out)

    console.heading("1. The task: a frozen layer W, and data that ask for W + D*")
    report["task"] = {
        "singular_values": task.true_values.tolist(), "floor": task.floor, "weights": config.d_in * config.d_out,
        "frozen": {"training_loss": task.best_training_loss(0), "fresh_loss": task.best_fresh_loss(0)},
        "least_squares": {"training_loss": task.unexplained, "fresh_loss": task.fresh_loss(task.fitted_update)},
    }
    print(pages.task_text(report))

    console.heading("2. Rank: how small does the loss get?")
    ranks = sorted({*range(1, some + 1), *(min(r, all_values) for r in (some + some // 2, 2 * some, 4 * some))})
    records = report["ranks"] = []
    with Progress("ranks", len(ranks) * config.steps, interval=0) as progress:
        for r in ranks:
            layer = task.layer(r, config.lora_alpha)
            records.append({"trained": minilora.summary(layer).trained, **train(layer, task, config.lr)})
            del records[-1]["curve"]  # drawn for alpha and the starts only
            progress.advance(config.steps, f"r = {r:<3} loss {records[-1]['training_loss']:<8.4g}")
    print(pages.rank_table(report))

    console.heading(f"3. Alpha: what does it do to the speed? r = {some}")
    records = report["alphas"] = []
    with Progress("alphas", (len(ALPHAS) + 1) * config.steps, interval=0) as progress:
        for factor in ALPHAS:
            alpha = factor * config.lora_alpha
            records.append(train(task.layer(some, alpha), task, config.lr))
            progress.advance(config.steps, f"alpha = {alpha:<6g} loss {records[-1]['training_loss']:<8.4g}")
        twin = task.layer(some, 4 * config.lora_alpha)
        twin.lora_A.data = twin.lora_A.data * 0.5
        report["twin"] = train(twin, task, config.lr / 2)
        progress.advance(config.steps, f"its twin       loss {report['twin']['training_loss']:<8.4g}")
    plain = records[ALPHAS.index(1)]
    report["twin"]["difference"] = max(abs(a / b - 1.0) for a, b in zip(report["twin"]["curve"], plain["curve"]))
    print(pages.alpha_table(report))

    console.heading("4. The scaling rule: alpha / r or alpha / sqrt(r)?")
    records = report["rules"] = []
    ranks = sorted({min(factor * some, all_values) for factor in (1, 2, 4, 8, 12)})
    with Progress("rules", 2 * len(ranks) * REPEATS * config.steps, interval=0) as progress:
        for r in ranks:
            for rule in pages.RULES:
                s = minilora.lora.scaling(config.lora_alpha, r, use_rslora=rule == "alpha / sqrt(r)")
                layers = [task.layer(r, s * r, repeat=i) for i in range(REPEATS)]  # alpha = s r, as alpha / r = s
                runs = [train(layer, task, config.lr) for layer in layers]
                records.append({"rule": rule, "r": r, "scaling": s, **repeated(runs)})
                progress.advance(REPEATS * config.steps, f"r = {r:<3} s = {rule:<16}  loss {runs[0]['curve'][-1]:.4g}")
    print(pages.rule_table(report))

    console.heading(f"5. How A and B start: r = {some}")
    records = report["inits"] = []
    with Progress("starts", len(INITS) * REPEATS * config.steps, interval=0) as progress:
        for init in INITS:
            runs = [train(task.layer(some, config.lora_alpha, init, i), task, config.lr) for i in range(REPEATS)]
            records.append({"init": init, "curves": [run["curve"] for run in runs], **repeated(runs)})
            progress.advance(REPEATS * config.steps, f"{init:<17}  loss {runs[0]['curve'][-1]:.4g}")
    print(pages.init_table(report))


def repeated(runs):
    """What several draws of A and B have in common."""
    return {"steps_to_halfway": median(run["steps_to_halfway"] for run in runs),
            "steps_to_best": median(run["steps_to_best"] for run in runs),
            "all_steps_to_best": [run["steps_to_best"] for run in runs],
            "training_losses": [run["training_loss"] for run in runs]}


def parse():
    """The configuration, or exit code 2 with every problem on one line."""
    parser, config = console.configuration("rank_sweep", __doc__.split("\n")[0], SETTINGS)
    problems = [f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}"
                for name in ("n", "d_in", "d_out", "k", "steps") if getattr(config, name) < 1]
    if 1 <= min(config.d_in, config.d_out) < config.k:
        problems.append(f"--k {config.k} is more than min(--d-in, --d-out) = {min(config.d_in, config.d_out)}: "
                        "no update of that rank exists")
    if 1 <= config.n <= config.d_in:
        problems.append(f"--n {config.n} must be more than --d-in {config.d_in}: else W alone can fit all the noise")
    if not 0.01 <= config.noise <= 100.0:  # less drowns in the rounding of float32
        problems.append(f"--noise must be from 0.01 to 100, got {config.noise:g}")
    console.refuse(parser, config, problems, positive=("lora_alpha", "lr"))
    return config


def main():
    config = parse()
    report = console.begun(config, repeats=REPEATS, close=CLOSE)
    with console.reporting(report):
        print(console.title(pages.title(report)))
        with numpy.errstate(over="ignore", invalid="ignore"):  # the check of the loss says it better
            run(config, report)
    print("\n" + pages.draw(report))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main, "rank_sweep.py"))
