"""The command line: ``minilora VERB ...``, one file a verb; a verb imports what it needs when it runs."""
