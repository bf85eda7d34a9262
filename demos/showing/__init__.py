"""What the demos show, and how: the console, and a page for each demo, which has its texts and its picture.

`progress`, `report` and `divergence` know nothing of the demos: any loop can use them.
"""

import sys

try:
    import minilora  # noqa: F401
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed: run `python -m pip install -e .` in the folder that holds setup.cfg")
