"""What rank does fine-tuning need? Section 7 of the LoRA paper, on adapters of a real model.

    python demos/film_reviews.py --model WHEEL --data ARCHIVE --sides query_value --out runs/r8
    python demos/film_reviews.py --model WHEEL --data ARCHIVE --sides query_value --r 64 --out runs/r64
    python demos/film_reviews.py --model WHEEL --data ARCHIVE --sides query_value --r 64 --seed 1 --out runs/r64_1
    python demos/rank_analysis.py --model runs/r8/model --small runs/r8/adapters/query_value \\
        --large runs/r64/adapters/query_value --again runs/r64_1/adapters/query_value
    python demos/rank_analysis.py --quick          trains three small ones itself, in seconds, on what it makes up

Three adapters of one model are compared, layer by layer: one of a small rank, one of a large rank, and one of the large rank
from another seed. How much of the small one's subspace lies in the large one's? What do two seeds learn alike? How much would
random subspaces share? And does an update repeat what the weight has already, or does it bring out something else? Compared are
the rows of A, as in the paper, and the right-singular vectors of the whole update D = s B A, which do not depend on how D is
split into factors, and not on what A began with. Beside the figures stand the paper's, of another model and another task.

`minilora inspect ADAPTER --analysis --against ADAPTER --base MODEL` prints the same tables for adapters of any model.

Writes report.json and report.png. Exit codes: 0 done, 2 wrong usage or a file is missing, 4 diverged, 130 interrupted.
"""

import os
import re
import sys
from types import SimpleNamespace

from showing import console, rank_analysis as pages  # first: it says how to install minilora
from showing.film_data import read_encoder

import minilora
import numpy
from minilora import formats, lora, models
from minilora.errors import ConfigError

SETTINGS = {  # name: (full size, --quick, meaning)
    "layer": (3, 1, "the layer of the model whose pictures are drawn, from 0"),
}
ADAPTERS = ("small", "large", "again")
RANKS = {"small": 2, "large": 16, "again": 16}  # of those that --quick trains
PATH = re.compile(r".*\blayers?\.(\d+)\.(?:.*\.)?(query|value)")  # layer, and which weight
SIDES = {"A": "rows of A", "V": "right-singular vectors of D"}


def updates_of(folder):
    """The linear updates of query and value: (layer, weight) to its path and `lora.LowRank`, in float64."""
    saved, found = formats.read_adapter(folder), {}
    for path, one in saved.updates.items():
        place = PATH.fullmatch(path)
        if place and one.kind == "linear":
            A, B = (numpy.asarray(factor, "float64") for factor in (one.A, one.B))
            found[int(place[1]), place[2]] = path, lora.LowRank(A=A, B=B, s=one.s)
    if not found:
        raise ConfigError(f"{folder}: the adapter has no update of a query or a value: those are compared here")
    return found


def weights_of(folder, paths):
    """The frozen weights that updates belong to, by path."""
    modules = dict(models.load(folder, head="base").named_modules())
    missing = [path for path in paths if path not in modules]
    if missing:
        raise ConfigError(f"{folder}: the model has no {missing[0]}, of which the adapters have an update: is it another "
                          "model?")
    return {path: numpy.asarray(minilora.to_host(modules[path].weight.data), "float64") for path in paths}


def similarities(one, two, rng):
    """phi(i, j) of two updates, for A and for D; beside it that of two Gaussian matrices of the same shapes."""
    result = lora.analyse(one, two, sides=list(SIDES))["similarity"]
    for side, found in result.items():
        gauss = [lora.LowRank(A=rng.standard_normal(D.A.shape), B=rng.standard_normal(D.B.shape)) for D in (one, two)]
        found["random"] = lora.subspace_similarity(*gauss, side).grid
    return result


def run(config, report, adapters, folder):
    """The whole job. The report grows with every part."""
    console.heading("1. Three adapters of one model")
    places = sorted(set.intersection(*map(set, adapters.values())))
    if not places:
        raise ConfigError("the three adapters have no layer in common")
    if config.layer not in {layer for layer, _ in places}:
        raise ConfigError(f"--layer {config.layer}: the adapters share the layers "
                          f"{', '.join(map(str, sorted({layer for layer, _ in places})))}")
    report["adapters"] = {name: about(found) for name, found in adapters.items()}
    print(pages.adapters_table(report))

    console.heading("2. The same directions? phi(i, j) between adapters")
    report["similarities"] = []
    for layer, weight in places:
        small, large, again = (adapters[name][layer, weight][1] for name in ADAPTERS)
        rng = numpy.random.default_rng((config.seed, layer, weight == "value"))
        report["similarities"].append({"layer": layer, "weight": weight, "small_large": similarities(small, large, rng),
                                       "two_seeds": similarities(large, again, rng)})
    print(pages.similarity_table(report))

    console.heading("3. What an update amplifies")
    weights = weights_of(folder, {adapters["small"][place][0] for place in places})
    report["amplification"] = []
    for place in places:
        path = adapters["small"][place][0]
        found = {name: lora.analyse(adapters[name][place][1], W=weights[path])["amplification"]
                 for name in ("small", "large")}
        report["amplification"].append({"layer": place[0], "weight": place[1], **found})
    print(pages.amplification_table(report))


def about(found):
    """An adapter in figures: rank, scaling, and of each update the norm and the ranks that it really uses."""
    rows = [{"layer": layer, "weight": weight, **lora.analyse(D)} for (layer, weight), (_, D) in sorted(found.items())]
    first = next(iter(found.values()))[1]
    return {"r": first.r, "s": first.s, "updates": rows}


def trained_here(config):
    """Three small adapters, trained now by film_reviews.py on what it makes up; their folders, and that of the model."""
    import film_reviews  # here: only --quick needs it

    fixed = {name: quick for name, (_, quick, _) in film_reviews.SETTINGS.items()}
    folder, films = film_reviews.made_up_encoder(os.path.join(config.out, "model"), 0)
    places = {}
    for number, (name, r) in enumerate(RANKS.items()):
        out = os.path.join(config.out, name)
        settings = SimpleNamespace(**{**fixed, "r": r, "seed": config.seed + (name == "again"), "out": out})
        film_reviews.fit("query_value", film_reviews.classifier(folder, settings), films, settings, out)
        places[name] = os.path.join(out, "adapters", "query_value")
    return places, folder


def parse():
    """The configuration, or exit code 2 with every problem on one line."""
    more = {"--model": dict(metavar="PATH", help="the model: its folder, or the wheel that film_reviews.py takes"),
            "--small": dict(metavar="DIR", help="the adapter of a small rank"),
            "--large": dict(metavar="DIR", help="one of a large rank"),
            "--again": dict(metavar="DIR", help="one of that rank from another seed")}
    parser, config = console.configuration("rank_analysis", __doc__.split("\n")[0], SETTINGS,
                                           "of random subspaces; with --quick of the trainings too", more)
    given = [name for name in ("model", *ADAPTERS) if getattr(config, name) is not None]
    problems = [f"--layer must not be negative, got {config.layer}"] if config.layer < 0 else []
    if config.quick and given:
        problems.append(f"--quick trains its own adapters: leave out --{given[0]}, or --quick")
    elif not config.quick and len(given) < 4:
        missing = ", ".join(f"--{name}" for name in ("model", *ADAPTERS) if name not in given)
        problems.append(f"missing: {missing}. film_reviews.py makes the adapters: the first lines of this file say how; or "
                        "--quick")
    console.refuse(parser, config, problems)
    return config


def main():
    config = parse()
    if config.device is not None:
        minilora.use(config.device)  # for the trainings of --quick; the analysis is done on the host
    report = {"config": vars(config), "versions": console.versions()}
    with console.reporting(report):
        if config.quick:
            places, folder = trained_here(config)
        else:
            places = {name: getattr(config, name) for name in ADAPTERS}
            folder, _ = read_encoder(config.model, os.path.join(config.out, "model"))
        adapters = {name: updates_of(place) for name, place in places.items()}
        print(console.title(pages.title(report)))
        run(config, report, adapters, folder)
    print("\n" + pages.draw(report))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main, "rank_analysis.py"))
