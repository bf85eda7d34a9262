"""The version, apart from the package's public names: a file that writes it down needs none of them."""

__version__ = "0.1.0"
