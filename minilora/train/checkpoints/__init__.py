"""The whole state of a run on the disk, and back to the last bit.

    runs/mine/checkpoints/step-000120/
        state.safetensors    what is trained, the state of modules (dropout counters, running means), moments, the best weights
        state.json           the rest: step, losses, schedule, and what the run was made of

A run that is resumed ends with the bits of the run that was not interrupted, provided that it is the same run: so the
checkpoint also says what it belongs to (`identity`), and is refused with a list of all differences before anything changes.
Differences that are wanted, more steps say, are named: ``fit(..., resume=True, permit=["steps"])``.

    contents    a run as arrays and plain values, and back, all of it or nothing
    identity    what a checkpoint belongs to: settings, model, data, base, versions, the machine's arithmetic
    files       one checkpoint as a folder, with sums that find every damaged byte
    scan        those of a run: which is the newest, which stay
    lock        one process in a run's folder
    keeper      when to save during a run, what to do when it fails, and where it goes on
"""

from .keeper import Keeper, load_run, save_run

__all__ = ["Keeper", "load_run", "save_run"]
