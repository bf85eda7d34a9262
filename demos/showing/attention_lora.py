"""What attention_lora.py says and draws: texts, report.json, report.png. Nothing is trained or measured here."""

from . import console
from .colours import BLUE, DARK, GREEN, ORANGE

RELATIONS = ("place", "before", "tag")  # what a request asks for
WAYS = {"behind": "behind W", "beside": "beside W", "full": "all weights"}  # of training
LORA_WAYS = ("behind", "beside")

COLOURS = {"base": DARK, "behind": ORANGE, "beside": BLUE, "full": GREEN}


def title(report):
    c = report["config"]
    return (f"LoRA in attention: {c['tokens']} tokens of {report['width']} numbers, r = {c['r']}, "
            f"alpha = {c['lora_alpha']:g}, {report['dtype']} on {report['device']}, seed {c['seed']}")


def task_text(report):
    c, code = report["config"], report["code"]
    return (f"a token:     {code} numbers for its place, {code} for its tag,\n"
            f"             {c['content']} for its content, from N(0, 1)\n"
            f"a request:   {code} numbers for a place, or {code} for a tag; 0 elsewhere\n"
            f"the answer:  the content of the token asked for, the last {c['content']} numbers out\n"
            "the loss:    mean squared error; always to say 0 gives 1\n"
            f"             the mean of all contents: 1 - 1/{c['tokens']} = {1.0 - 1.0 / c['tokens']:.4f}")


def pretraining_text(report):
    record = report["pretraining"]
    return console.paragraph(
        f"{record['steps'][-1]} steps of Adam train {record['trained']:,} numbers. On {report['fresh_samples']} fresh "
        f"samples the loss falls from {record['losses'][0]:.4f} to {record['loss']:.5f}. "
        f"{record['right']:.1%} of the answers are closest to the content asked for; the token that has it gets "
        f"{record['attention']:.3f} of the attention, in the mean.")


def losses_table(record):
    """The losses of a task over the steps, and what was reached at the end."""
    runs = [record[way] for way in WAYS]
    rows = [(str(step), f"{record['base']['loss']:.5f}", *(f"{run['losses'][i]:.5f}" for run in runs))
            for i, step in enumerate(runs[0]["steps"])]
    ends = [record["base"], *runs]
    rows += [("right answers", *(f"{run['right']:.1%}" for run in ends)),
             ("attention there", *(f"{run['attention']:.3f}" for run in ends)),
             ("trained", "0", *(f"{run['trained']:,}" for run in runs))]
    return console.table(("step", "frozen base", *WAYS.values()), rows)


def before_text(report):
    record = report["before"]
    error = max(record[way]["map_error"] for way in WAYS)
    last = ("attention there: the mean attention on the token asked for, softmax(Q K^T / sqrt(d)) computed in NumPy. "
            f"With V and fc_out, these maps give the models' outputs to within {error:.0e}.")
    return ("behind W: K = W x + s B (A W x), lora.ProjectedAttention\n"
            "beside W: K = W x + s B (A x), lora.inject; V likewise. Loss on fresh samples:\n"
            f"{losses_table(record)}\n{console.paragraph(last)}")


def tag_text(report):
    record, whole, T = report["tag"], report["tag"]["largest_rank"], report["config"]["tokens"]
    loss, entry = record["first_task_loss"], record["largest_tag_entry"]
    first = (f"No tag was there in the pre-training. The {report['code']} columns of W_k and W_v that would read them are set "
             f"to 0, which the first task does not notice (loss {loss['base']:.4g}, now {loss['blind']:.4g}). Then tags come, "
             "and are asked for:")
    last = (f"Behind W the merged update is s B (A W): 0 where W is 0 (its largest entry there: {entry['behind']:.3g}; beside "
            f"W: {entry['beside']:.3g}). So K and V stay blind to tags, and can do no better than the mean of all contents: "
            f"1 - 1/{T} = {1.0 - 1.0 / T:.4f}, here {record['mean_of_contents_loss']:.4f}. With r = {whole['r']}, "
            f"{whole['trained']:,} numbers, the loss is {whole['loss']:.4f}, too. Beside W the update reads x itself.")
    return f"{console.paragraph(first)}\n{losses_table(record)}\n{console.paragraph(last)}"


def kept_text(report):
    rows = [(f"{record['kept']:g}", *(cell for way in LORA_WAYS for cell in (
        f"{record[way]['loss']:.5f}", f"{record[way]['right']:.1%}"))) for record in kept_records(report)]
    header = ("kept", *(cell for way in LORA_WAYS for cell in (WAYS[way], "right answers")))
    first = (f"Loss after {report['config']['steps']} steps, if W_k and W_v keep this much of the columns that read tags "
             "(1: as they were drawn):")
    return (f"{console.paragraph(first)}\n{console.table(header, rows)}\n"
            "Behind W, A reads W x, in which the tags are as weak as W makes them.\nBeside W it reads x.")


def kept_records(report):
    return [*report["kept"], {"kept": 0.0, **{way: report["tag"][way] for way in LORA_WAYS}}]


def merge_text(report):
    rows = []
    for relation in RELATIONS[1:]:
        for way in LORA_WAYS:
            merge = report[relation][way]["merge"]
            rows.append((relation, WAYS[way], f"{merge['adapter_loss']:.8f}", f"{merge['merged_loss']:.8f}",
                         f"{merge['relative_difference']:.1g}", yes(merge["base_unchanged"]),
                         yes(merge["base_restored_bit_for_bit"])))
    header = ("task", "update", "loss", "merged", "difference", "trained", "unmerged")
    return ("The updates become part of W_k and W_v, and leave them again.\n"
            "Is the base there bit for bit, when they are trained, and when unmerged?\n"
            f"{console.table(header, rows)}")


def yes(condition):
    return "yes" if condition else "NO"


# -- the picture ------------------------------------------------------------------------------------------------------


def draw(report):
    """Write report.png; the line to print at the end, also where matplotlib is missing."""
    first, second = ([lambda axes, column=column, relation=relation: draw_map(axes, report, relation, column)
                      for column in ("wanted", "base", *LORA_WAYS)] for relation in RELATIONS[1:])
    panels = [*first, *second,
              lambda axes: draw_losses(axes, report, "before"),
              lambda axes: draw_losses(axes, report, "tag"),
              lambda axes: draw_kept(axes, report), lambda axes: draw_trained(axes, report)]
    return console.picture(report, title(report), (11, 9.6), 3, 4, panels)


def draw_map(axes, report, relation, column):
    record, last = report[relation], LORA_WAYS[-1]
    name = {"before": ("Wanted:\nthe place before", "Frozen base:\ntrained on the place"),
            "tag": ("Wanted:\nthe tag that is named", "Frozen base:\ndoes not read tags")}[relation]
    if column == "wanted":
        weights = [[float(token == found) for token in range(len(record["found"]))] for found in record["found"]]
        name = name[0]
    else:
        weights = record[column]["map"]
        name = name[1] if column == "base" else f"LoRA {WAYS[column]}:\n{record[column]['right']:.1%} right"
    image = axes.imshow(weights, cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest")
    if column == last:
        axes.figure.colorbar(image, ax=axes, label="attention", fraction=0.046)
    axes.set(xlabel="token", ylabel="request" if column == "wanted" else "")
    axes.set_title(name, fontsize=11)


def draw_losses(axes, report, relation):
    record = report[relation]
    if relation == "tag":
        name = "Tags: behind W\nthe loss stays"
        draw_bound(axes, record)
    else:
        learned = all(record[way]["right"] > 0.95 for way in LORA_WAYS)
        name = f"The place before{':' if learned else ''}\n{'both placements learn it' if learned else ''}"
        axes.axhline(record["base"]["loss"], color=DARK, linewidth=1, linestyle="--", label="frozen base")
    for way, text in WAYS.items():
        run = record[way]
        axes.plot(run["curve"], color=COLOURS[way], linewidth=1, alpha=0.6)
        axes.plot(run["steps"], run["losses"], "o", color=COLOURS[way], markersize=5, label=text)
    axes.set(yscale="log", xlabel="step (points: fresh samples,\nlines: batches)", ylabel="mean squared error")
    axes.set_title(name, fontsize=11)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8.5, loc="upper right", bbox_to_anchor=(1.0, 0.95))  # below the line of the bound


def draw_bound(axes, record):
    axes.axhline(record["mean_of_contents_loss"], color="black", linewidth=1, linestyle="--", label="best without tags")


def draw_kept(axes, report):
    records = kept_records(report)
    places = range(len(records))
    draw_bound(axes, report["tag"])
    for way, marker in zip(LORA_WAYS, "so"):
        axes.plot(places, [record[way]["loss"] for record in records], marker + "-", color=COLOURS[way], markersize=7,
                  label=WAYS[way])
    axes.set_xticks(places, [f"{record['kept']:g}" for record in records])
    axes.set(yscale="log", xlabel="kept of the columns\nthat read tags", ylabel=f"loss after {report['config']['steps']} steps")
    losses = [record["behind"]["loss"] for record in records]
    slower = losses == sorted(losses) and losses[0] < losses[-1] / 2
    axes.set_title("The less W has left,\nthe slower behind W" if slower else "What W must have left", fontsize=11)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8.5, loc="lower right", bbox_to_anchor=(1.0, 0.1))


def draw_trained(axes, report):
    counts = [report["before"][way]["trained"] for way in WAYS]
    bars = axes.barh([WAYS[way] for way in WAYS], counts, color=[COLOURS[way] for way in WAYS])
    axes.bar_label(bars, [f" {count:,}" for count in counts], fontsize=11)
    axes.set_xlim(0, max(counts) * 1.8)
    axes.invert_yaxis()
    axes.set_title(f"LoRA trains {counts[0] / counts[-1]:.1%}\nas many numbers", fontsize=11)
    axes.set_xlabel("trained numbers")
