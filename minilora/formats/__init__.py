"""Files in and out: tensors of checkpoints, and adapters in the dialects of other programs. Files are untrusted input.

    tensors    names, shapes and numbers: safetensors, mapped and not copied; written in one piece or not at all
    adapters   an adapter file as a value, without a model: PEFT's folders, and the other dialects
    placing    that value and a model: which module is meant, load and save
    merging    that value and the files of a base: merged as a stream, and unmerged, without a model
    subspaces  a model in d numbers: v, and the seed that all the rest follows from
    sentences  what the files of sentence-transformers say
    algebra    such values added, compressed, compared, converted, and made of two checkpoints

Nothing here is imported by `import minilora`; each room is read when it is used.
"""

from typing import TYPE_CHECKING

from ..later import later

if TYPE_CHECKING:
    from .adapters.peft.virtual import SavedPrefix, read_prefix
    from .adapters.reading import read_adapter
    from .adapters.saved import SavedAdapter, TokenRows, Update
    from .adapters.writing import write_adapter
    from .algebra.combine import combine
    from .algebra.convert import convert
    from .algebra.difference import difference
    from .algebra.extract import extract_files
    from .algebra.resize import resize
    from .merging.merge import merge_files
    from .merging.unmerge import unmerge_files
    from .merging.verify import verify_files
    from .placing.loading import load_adapter
    from .placing.prefixes import LoadedPrefix, load_prefix, save_prefix
    from .placing.report import LoadReport
    from .placing.saving import save_adapter, saved_adapter
    from .subspaces import load_subspace, save_subspace
    from .tensors.reading import load_state, open_state
    from .tensors.writing import save_state

__all__ = [
    "LoadReport", "LoadedPrefix", "SavedAdapter", "SavedPrefix", "TokenRows", "Update", "combine", "convert", "difference",
    "extract_files", "load_adapter", "load_prefix", "load_state", "load_subspace", "merge_files", "open_state",
    "read_adapter", "read_prefix", "resize", "save_adapter", "save_prefix", "save_state", "save_subspace", "saved_adapter",
    "unmerge_files", "verify_files", "write_adapter",
]

__getattr__, __dir__ = later(globals(), {
    "adapters.peft.virtual": "SavedPrefix read_prefix",
    "adapters.reading": "read_adapter",
    "adapters.saved": "SavedAdapter TokenRows Update",
    "adapters.writing": "write_adapter",
    "merging.merge": "merge_files",
    "merging.unmerge": "unmerge_files",
    "merging.verify": "verify_files",
    "algebra.combine": "combine",
    "algebra.convert": "convert",
    "algebra.difference": "difference",
    "algebra.extract": "extract_files",
    "algebra.resize": "resize",
    "placing.loading": "load_adapter",
    "placing.prefixes": "LoadedPrefix load_prefix save_prefix",
    "placing.report": "LoadReport",
    "placing.saving": "save_adapter saved_adapter",
    "subspaces": "load_subspace save_subspace",
    "tensors.reading": "load_state open_state",
    "tensors.writing": "save_state",
})
