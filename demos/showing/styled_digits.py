"""The styles that image_styles.py gives to real digits: each a plain function of the ink, from 0 to 1."""

import numpy

from .real_digits import load_images


def neighbours(images, square):
    """The largest ink among the pixels around each: all eight, or the four that share a side."""
    padded = numpy.pad(images, ((0, 0), (1, 1), (1, 1)))
    size = images.shape[1]
    near = [padded[:, i:i + size, j:j + size] for i in range(3) for j in range(3) if square or (i - 1) * (j - 1) == 0]
    return numpy.max(near, axis=0)


def rows_moved(images, by):
    """Each row moved to the right by its own number of pixels, which may be a fraction: ink between two pixels is shared."""
    size = images.shape[2]
    moved = numpy.zeros_like(images)
    for i, shift in enumerate(by):
        places = numpy.arange(size) - shift
        left = numpy.floor(places).astype(int)
        part = (places - left).astype("float32")
        for place, share in ((left, 1.0 - part), (left + 1, part)):
            inside = (place >= 0) & (place < size)
            moved[:, i, inside] += share[inside] * images[:, i, place[inside]]
    return moved


def thick(images):
    """Strokes wider by a pixel on every side; of 8 x 8 pixels by two thirds of the ink, or there would be no hole left."""
    if images.shape[1] > 16:
        return neighbours(images, square=True)
    return numpy.maximum(images, 0.67 * neighbours(images, square=False))


def slanted(images):
    """Leaning to the right: each row half a pixel further than the one below, or 0.4 of one where there are many."""
    size = images.shape[1]
    return rows_moved(images, (0.5 if size <= 16 else 0.4) * ((size - 1) / 2 - numpy.arange(size)))


def outlined(images):
    """Hollow strokes: what widening a stroke by a pixel on every side adds to it."""
    return neighbours(images, square=True) - images


def wavy(images):
    """One writer's hand: rows swing to the left and to the right, twice over the height of the image."""
    size = images.shape[1]
    return rows_moved(images, 0.14 * size ** 0.9 * numpy.sin(4.0 * numpy.pi * (numpy.arange(size) + 0.5) / size))


STYLES = {"thick": thick, "slanted": slanted, "outlined": outlined, "wavy": wavy}


class Digits:
    """Every image plain and in each style, split once and for all: the split does not depend on --seed.

    `x[kind][part]` are images (n, 1, size, size), numbers from -1 (paper) to 1 (ink), and `y[part]` their digits, on the host.
    """

    def __init__(self, source, share=0.25):
        images, digits = load_images(source)
        rng = numpy.random.default_rng(0)
        self.size = images.shape[1]
        self.held_out = int(share * numpy.bincount(digits).min())
        test = numpy.concatenate([rng.permutation(numpy.flatnonzero(digits == d))[:self.held_out] for d in range(10)])
        rows = {"train": rng.permutation(numpy.setdiff1d(numpy.arange(len(digits)), test)), "test": test}
        kinds = {"plain": images, **{name: style(images) for name, style in STYLES.items()}}
        self.kinds, self.sizes = list(kinds), {part: len(chosen) for part, chosen in rows.items()}
        self.x = {kind: {part: (2.0 * all_of[chosen, None] - 1.0).astype("float32") for part, chosen in rows.items()}
                  for kind, all_of in kinds.items()}
        self.y = {part: digits[chosen] for part, chosen in rows.items()}

    def few(self, kind, count):
        """The first images of the training part, as many of each digit: what an adapter learns its style from."""
        chosen = numpy.concatenate([numpy.flatnonzero(self.y["train"] == d)[:count // 10] for d in range(10)])
        return self.x[kind]["train"][chosen], self.y["train"][chosen]
