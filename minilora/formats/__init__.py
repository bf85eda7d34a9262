"""Files in and out: tensors of checkpoints, and adapters in the dialects of other programs. Files are untrusted input.

    tensors    names, shapes and numbers: safetensors, mapped and not copied; written in one piece or not at all
    adapters   an adapter file as a value, without a model: PEFT's folders, and the other dialects
    placing    that value and a model: which module is meant, load and save

Nothing here is imported by `import minilora`; each room is read when it is used.
"""
