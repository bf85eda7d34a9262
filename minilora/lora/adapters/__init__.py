"""The named adapters of a whole model: match, inject, activate, mix, merge, remove, hot-swap, loralib's three calls."""
