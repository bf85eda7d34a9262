"""What synthetic_shift.py says and draws: texts, report.json, report.png. Nothing is trained or measured here."""

from . import console
from .colours import BLUE, GREY, ORANGE

# Loss on all data, of the article "LoRA with a minimal example" (R torch) and of the same program rerun with PyTorch.
EPOCHS = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
ARTICLE = {
    "pretraining": [577.075, 312.2, 155.055, 68.49202, 25.68243,
                    7.620944, 1.607114, 0.2077137, 0.01392935, 0.0004785107],
    "lora": [798.6073, 485.8804, 257.3518, 118.4895, 46.34769,
             14.46207, 3.185689, 0.4264134, 0.02732975, 0.001300132],
}
PYTORCH = {
    "pretraining": [578.6, 314.0, 156.5, 69.4, 26.1, 7.80, 1.66, 0.215, 0.0143, 0.00044],
    "lora": [820.8, 515.0, 284.9, 141.4, 60.5, 21.3, 5.65, 0.983, 0.0923, 0.0045],
}
ARTICLE_BASE_LOSS = 992.673


def title(report):
    c = report["config"]
    cached = ", cached frozen output" if c["cache_base"] else ""
    return (f"Synthetic shift: {c['n']:,} rows, {c['d_in']} inputs, {c['d_out']} outputs, rank {c['r']}, "
            f"{c['dtype']} on {report['device']}, seed {c['seed']}{cached}")


def loss_table(phase, report):
    ours = [f"{loss:.6g}" for loss in report[phase]["losses"]]
    if report["full_size"]:
        columns = [map("{:.7g}".format, ARTICLE[phase]), map("{:g}".format, PYTORCH[phase]), ours]
        return "loss on all data\n" + console.table(("epoch", "article", "PyTorch rerun", "ours"),
                                                    list(zip(map(str, EPOCHS), *columns)))
    rows = list(zip(map(str, report[phase]["epochs"]), ours))
    return "loss on all data (the article's figures are for full size)\n" + console.table(("epoch", "ours"), rows)


def base_line(report):
    article = f", article {ARTICLE_BASE_LOSS:g}" if report["full_size"] else ""
    return console.paragraph(f"loss of the base on the shifted data: {report['base_loss_on_shifted']:.6g} "
                             f"(expected d_in = {report['config']['d_in']}{article})")


def delta_text(report):
    delta, rank = report["delta"], report["delta"]["rank"]
    lines = ["delta[:5, :5], where the shift is 1 everywhere:"]
    lines += ["  " + "  ".join(f"{value:8.5f}" for value in row) for row in delta["corner"]]
    lines += [f"|delta - 1|: mean {delta['mean_abs_error']:.2e}, largest {delta['max_abs_error']:.2e}"]
    values = [f"{value:.4g}" for value in delta["singular_values"]]
    more = ["..."] if len(values) > rank + 2 else []
    lines += [f"singular values: {'  '.join(values[:rank + 2] + more)}   (rank {rank})"]
    return "\n".join(lines)


def merge_text(report):
    merge = report["merge"]
    return (f"loss with the adapter beside W:  {merge['adapter_loss']:.8g}\n"
            f"loss merged into W:              {merge['merged_loss']:.8g}"
            f"   (relative difference {merge['relative_difference']:.1e})\n"
            f"after unmerge, W is bit for bit the pre-trained weight: "
            f"{'yes' if merge['base_restored_bit_for_bit'] else 'NO'}")


def draw(report, delta):
    """Write report.png; the line to print at the end, also where matplotlib is missing."""
    return console.picture(report, title(report), (11, 8.2), 2, 2, [
        lambda axes: draw_losses(axes, report), lambda axes: draw_delta(axes, delta),
        lambda axes: draw_singular_values(axes, report), lambda axes: draw_trained(axes, report)])


def draw_losses(axes, report):
    for phase, colour, marker, name in (("pretraining", BLUE, "o", "pre-training"),
                                        ("lora", ORANGE, "s", "LoRA after the shift")):
        record = report[phase]
        epochs = range(1, len(record["last_batch_loss"]) + 1)
        axes.plot(epochs, record["last_batch_loss"], color=colour, linewidth=1, alpha=0.6)
        axes.plot(record["epochs"], record["losses"], marker, color=colour, markersize=5, label=name)
        if report["full_size"]:
            axes.plot(EPOCHS, ARTICLE[phase], marker, markerfacecolor="none", markeredgecolor="black", markersize=9,
                      label=f"the article: {name}")
    axes.set_yscale("log")
    axes.set_title("The loss falls to {:.1g}; after the shift, to {:.1g}".format(
        *(report[phase]["losses"][-1] for phase in ("pretraining", "lora"))))
    axes.set_xlabel("epoch (points: all data, lines: the epoch's last batch)")
    axes.set_ylabel("mean squared error")
    axes.grid(True, alpha=0.3)
    axes.legend(loc="lower left", fontsize=9)


def draw_delta(axes, delta):
    corner = delta[:40, :40] - 1.0
    limit = max(abs(corner).max(), 1e-12)
    image = axes.imshow(corner, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="delta - 1")
    axes.set_title(f"The learned delta is 1 everywhere, within {abs(delta - 1.0).max():.1g}")
    axes.set_xlabel(f"input (the first {corner.shape[1]} of {delta.shape[1]})")
    axes.set_ylabel(f"output (the first {corner.shape[0]} of {delta.shape[0]})")


def draw_singular_values(axes, report):
    values = report["delta"]["singular_values"]
    r = report["config"]["r"]
    least = (values[0] or 1.0) * 1e-17
    shown = [max(value, least) for value in values]  # a log axis has no 0
    for first, part, colour, name in ((1, shown[:r], ORANGE, f"the first r = {r}"),
                                      (r + 1, shown[r:], GREY, "the others: rounding errors")):
        places = range(first, first + len(part))
        axes.plot(places, part, "o", color=colour, markersize=8, label=name)
    axes.set_yscale("log")
    axes.set_xticks(range(1, len(values) + 1))
    axes.set_title(f"Singular values of delta: its rank is {report['delta']['rank']}")
    axes.set_xlabel("number of the singular value")
    axes.set_ylabel("singular value")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=9)


def draw_trained(axes, report):
    counts = [report["pretraining"]["trained"], report["lora"]["trained"]]
    bars = axes.barh(["all weights", "LoRA"], counts, 0.6, color=[BLUE, ORANGE])
    share = counts[1] / counts[0]
    words = f" {counts[1]:,}: {share:.1%} of them" + (",\n a bar too short to see" if share < 0.005 else "")
    axes.bar_label(bars, [f" {counts[0]:,}", words], fontsize=11)
    axes.set_xlim(0, max(counts) * 1.35)  # room for the larger count
    axes.locator_params(axis="x", nbins=4)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(f"LoRA trains {share:.1%} as many numbers")
    axes.set_xlabel("trained numbers (a linear scale)")
