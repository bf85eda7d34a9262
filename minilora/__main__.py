"""``python -m minilora``: the same as the command ``minilora``."""

from .cli.main import main

raise SystemExit(main())
