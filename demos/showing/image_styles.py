"""What image_styles.py says and draws: texts, report.json, report.png, styles.png. Nothing is trained or measured here."""

import os

import numpy

from . import console
from .colours import BLUE, GREEN, GREY, ORANGE, PINK

COLOURS = {"thick": BLUE, "slanted": ORANGE, "outlined": GREEN, "wavy": PINK}
DASHES = {"thick": "-", "slanted": "--", "outlined": "-.", "wavy": ":"}


def title(report):
    c = report["config"]
    return (f"Styles of digits: LoRA of rank {c['r']} on convolutions and attention, {c['few']} images and {c['steps']} steps "
            f"each, {report['dtype']} on {report['device']}, seed {c['seed']}")


def percent(share):
    return f"{100.0 * share:.0f} %"


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def styles_of(report):
    return report["data"]["kinds"][1:]


def data_text(report):
    data = report["data"]
    return (f"{data['what']}: {data['train']:,} to train on, {data['test']:,} held out\n"
            f"kinds: {', '.join(data['kinds'])}\nThe base sees plain ones only.")


def base_text(report):
    base = report["base"]
    file = os.path.basename(base["file"])
    made = (f"read from {file}" if base["cached"] else
            f"trained in {base['seconds']:.0f} s, the loss of its last steps {base['losses'][-1]:.3f},\nkept as {file}")
    return f"{base['weights']:,} weights, channels {base['channels']}\n{made}"


def judges_table(report):
    kinds = report["data"]["kinds"]
    rows = [(name, *(percent(judge["right"][kind]) for kind in kinds), percent(mean(judge["right"].values())))
            for name, judge in report["judges"].items()]
    return ("held-out real images of each kind of which style, and digit, is read right:\n"
            + console.table(("judge of", *kinds, "mean"), rows))


def styles_table(report):
    rows = [(style, f"{made['trained']:,}", f"{made['losses'][0]:.3f}", f"{made['losses'][-1]:.3f}", f"{made['seconds']:.0f} s")
            for style, made in report["styles"].items()]
    share = next(iter(report["styles"].values()))["trained"] / report["base"]["weights"]
    return (console.table(("style", "numbers trained", "loss, first steps", "last steps", "time"), rows)
            + f"\nAn adapter has {share:.1%} of the base's numbers.")


def shown_rows(report):
    """Name in the table, and in report["samples"], of the base, of each style at its full strength, and of the mixtures."""
    styles = styles_of(report)
    mixtures = [name for name in report["samples"] if " + " in name]
    return [("base", "base"), *((style, f"{style} 1") for style in styles), *((name, name) for name in mixtures)]


def samples_table(report):
    kinds, judged = report["data"]["kinds"], 10 * report["config"]["judged"]
    rows = [(name, *(percent(report["samples"][key]["style"][kind]) for kind in kinds),
             percent(report["samples"][key]["digit"])) for name, key in shown_rows(report)]
    own = [report["samples"][f"{style} 1"] for style in styles_of(report)]
    learned = mean(record["style"][style] for style, record in zip(styles_of(report), own))
    lesson = (f"{judged} samples a row, all from the same noise. On average {percent(learned)} of an adapter's samples are "
              f"taken for its style, where real images of the styles are read right in "
              f"{percent(mean(report['judges']['style']['right'][style] for style in styles_of(report)))}; "
              f"{percent(mean(record['digit'] for record in own))} show the digit that was asked for, of the base's "
              f"{percent(report['samples']['base']['digit'])}.")
    return ("samples by the style that they are taken for, and digits read as asked:\n"
            + console.table(("drawn by", *kinds, "digit"), rows) + "\n" + console.paragraph(lesson))


def strengths(report, style):
    """(strength, record) of one style, from 0 on."""
    return [(float(key.split(" ")[1]), record) for key, record in report["samples"].items()
            if key.split(" ")[0] == style and "+" not in key]


def strengths_table(report):
    styles = styles_of(report)
    header = ("strength", *(f"{s:g}" for s, _ in strengths(report, styles[0])))
    rows = [(style, *(percent(record["style"][style]) for _, record in strengths(report, style))) for style in styles]
    rows += [(f"{style}: digit", *(percent(record["digit"]) for _, record in strengths(report, style))) for style in styles]
    same = "yes" if report["strength_0_is_the_base"] else "NO"
    return ("taken for the style, and below read as the digit that was asked for:\n" + console.table(header, rows)
            + f"\nat strength 0 the images are the base's, bit for bit: {same}")


def files_table(report):
    def word(equal):
        return "yes" if equal else "NO"
    rows = [(dialect, f"{record['bytes']:,}", word(record["single_equal"]), word(record["mixture_equal"]))
            for dialect, record in report["files"].items()]
    mixture = report["mixture_of_the_files"]
    said = report["another_base"] or "NOTHING: it was taken"
    return (console.table(("dialect", "bytes", "one style equal", "mixture equal"), rows) + "\n"
            + console.paragraph("Equal: drawn by a new model that read the files, bit for bit; the mixture is "
                                f"{mixture['name']} at {' and '.join(f'{w:g}' for w in mixture['weights'])}.") + "\n"
            + console.paragraph(f"On a base with other weights: {said}", "  "))


# -- the pictures -----------------------------------------------------------------------------------------------------


def draw(report, images, few, amounts):
    """Write report.png and styles.png; the lines to print at the end, also where matplotlib is missing."""
    told = console.picture(report, title(report), (11, 10), 2, 2, [
        lambda axes: draw_rows(axes, report, images), lambda axes: draw_strengths(axes, report, images, amounts),
        lambda axes: draw_shares(axes, report), lambda axes: draw_digits(axes, report)])
    if "report.png" in told:
        text = "What each adapter learned from (left), and what it draws at strength 1 (right)"
        console.picture(report, text, (11, 3.2), 1, 2, [
            lambda axes: draw_few(axes, report, few), lambda axes: draw_styles(axes, report, images)], name="styles.png")
        told += " and styles.png"
    return told


def tiles(axes, rows, names, text):
    """Rows of images (n, size, size) side by side, with gaps of an eighth of their size."""
    size, columns = rows[0].shape[-1], max(map(len, rows))
    step = size + max(1, size // 8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            axes.imshow(image, extent=(step * j, step * j + size, step * i + size, step * i), cmap="gray_r", vmin=-1.0,
                        vmax=1.0, interpolation="nearest")
    axes.set(xlim=(-1, step * columns), ylim=(step * len(rows), -1))
    axes.set_xticks([])
    axes.set_yticks([step * i + size / 2 for i in range(len(rows))], names)
    axes.set_facecolor("#dddddd")
    plain(axes, text)


def plain(axes, text):
    """A title, and neither frame nor ticks."""
    axes.set_title(text, fontsize=13)
    axes.tick_params(length=0, labelsize=11)
    axes.spines[:].set_visible(False)


def one_of_each(report, samples):
    """The first sample of each digit."""
    return samples[::report["config"]["judged"], 0]


def draw_rows(axes, report, images):
    rows = shown_rows(report)
    tiles(axes, [one_of_each(report, images[key]) for _, key in rows], [name.replace(" + ", " +\n") for name, _ in rows],
          "One base, its adapters, and mixtures:\nthe same noise in every row")


def draw_strengths(axes, report, images, amounts):
    """For each style two digits, at every strength."""
    rows, names = [], []
    for style in styles_of(report):
        for digit in (3, 5):
            rows.append(numpy.stack([one_of_each(report, images[f"{style} {s:g}"])[digit] for s in amounts]))
            names.append(style if digit == 3 else "")
    tiles(axes, rows, names, "Strength of the adapter")
    size = rows[0].shape[-1]
    step = size + max(1, size // 8)
    axes.set_xticks([step * j + size / 2 for j in range(len(amounts))], [f"{s:g}" for s in amounts])


def curves(axes, report, share, text):
    for style in styles_of(report):
        points = strengths(report, style)
        axes.plot([s for s, _ in points], [100.0 * share(record, style) for _, record in points], DASHES.get(style, "-"),
                  color=COLOURS.get(style), marker="o", linewidth=2, label=style)
    axes.set(ylim=(-4, 104), xlabel="strength")
    axes.legend(fontsize=11, frameon=False)
    axes.grid(alpha=0.3)
    axes.set_title(text, fontsize=13)


def draw_shares(axes, report):
    curves(axes, report, lambda record, style: record["style"][style], "% of the samples taken\nfor the adapter's style")


def draw_digits(axes, report):
    curves(axes, report, lambda record, style: record["digit"], "% of the samples read\nas the digit that was asked for")
    axes.axhline(100.0 * report["samples"]["base"]["digit"], color=GREY, linewidth=1)


def draw_few(axes, report, few):
    per_digit = report["config"]["few"] // 10
    tiles(axes, [images[::per_digit, 0] for images in few.values()], list(few),
          f"Real digits in the style: 10 of {10 * per_digit}")


def draw_styles(axes, report, images):
    tiles(axes, [one_of_each(report, images[f"{style} 1"]) for style in styles_of(report)], styles_of(report), "Samples")
