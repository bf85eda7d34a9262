"""``python -m minilora.puzzles``."""

from .command import main

raise SystemExit(main())
