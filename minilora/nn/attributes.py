"""What may be assigned to an attribute of a module, and where names that it lacks lead: those of PyTorch and PEFT to ours."""

from __future__ import annotations

from typing import Any

from ..calls import called, misfit, refused
from ..errors import DTypeError, MiniloraError

__all__ = ["FLAGS", "Made", "lacking", "placed", "refuse_shadow", "refuse_swap"]

# What a user of PyTorch types, and what does it here.
OURS = {
    "add_module": "setattr(module, name, child): an attribute is enough",
    "append": "a list of modules as an attribute, self.blocks = [...]",
    "apply": "for path, module in model.named_modules(): ...",
    "bfloat16": "model.to(dtype=...)",
    "buffers": "model.named_state()",
    "cpu": "model.to('cpu')",
    "cuda": "model.to('gpu')",
    "double": "model.to(dtype='float64')",
    "float": "model.to(dtype='float32')",
    "get_parameter": "dict(model.named_parameters())[path]",
    "get_submodule": "dict(model.named_modules())[path]",
    "half": "model.to(dtype='float16')",
    "modules": "model.named_modules()",
    "named_buffers": "model.named_state()",
    "named_children": "model.children()",
    "register_buffer": "self.mask = array, and state_names = ('mask',) in the class",
    "register_module": "setattr(module, name, child): an attribute is enough",
    "register_parameter": "self.weight = minilora.Parameter(array): an attribute is enough",
    "requires_grad_": "model.requires_grad(False), or True",
    "register_forward_hook": "no hooks: write a forward of your own, or a module around it",
    "zero_grad": "optimizer.zero_grad()",
    "device": "next(model.parameters()).device.name",
    "dtype": "next(model.parameters()).dtype",
    "gradient_checkpointing_enable": "minilora.nn.grad_checkpoint(model)",
    "num_parameters": "minilora.summary(model)",
    "get_input_embeddings": "dict(model.named_modules())[path]",
    "enable_input_require_grads": "nothing to do: a block that is computed again needs no gradient of its input",
    "register_full_backward_hook": "no hooks: minilora.draw(loss) shows the gradients",
    "save_state_dict": "minilora.formats.save_state(path, model.state_dict())",
}
# What a user of PEFT and transformers asks of a model, and the function that does it here.
OURS.update({
    "active_adapters": "minilora.lora.status(model)",
    "add_adapter": "minilora.lora.inject(model, config, name)",
    "add_weighted_adapter": "minilora.lora.combine_adapters(updates, weights)",
    "delete_adapter": "minilora.lora.remove(model, name)",
    "disable_adapter": "with minilora.lora.disabled(model): ...",
    "generate": "minilora.models.generate(model, ids, max_new_tokens)",
    "get_base_model": "the model itself, which is no wrapper",
    "get_layer_status": "minilora.lora.status(model)",
    "get_model_status": "minilora.lora.status(model)",
    "load_adapter": "minilora.formats.load_adapter(model, folder, name)",
    "merge_adapter": "minilora.lora.merge(model)",
    "merge_and_unload": "minilora.lora.bake(model)",
    "print_trainable_parameters": "print(minilora.summary(model).trainable_line)",
    "save_pretrained": "minilora.formats.save_adapter(model, folder), and for whole models minilora.models.save(model, folder)",
    "set_adapter": "minilora.lora.activate(model, name)",
    "unload": "minilora.lora.remove(model, name)",
    "unmerge_adapter": "minilora.lora.unmerge(model)",
})
FLAGS = ("requires_grad", "trainable")  # assigned to a module, they would do nothing


def lacking(module: Any, name: str) -> AttributeError:
    """The error for an attribute that a module lacks; for one that PyTorch or PEFT has, with ours."""
    ours = f": minilora has {OURS[name]}" if name in OURS else ""
    return AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}{ours}", name=name, obj=module)


class Made:
    """The base of `Module`, for those whose class has no ``__init__``: what is given to them is refused with a reason."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        mro = type(self).__mro__
        if mro[mro.index(Made) + 1] is object and (args or kwargs):
            raise refused(called(type(self)), [], args, kwargs)
        super().__init__(*args, **kwargs)


def placed(module: Any, error: Exception, args: Any, kwargs: Any) -> None:
    """Give the error of a module's call the path of the module in which it arose; raise another if the arguments do not fit."""
    told = misfit(module.forward, args, kwargs, error, type(module).__name__) if isinstance(error, TypeError) else error
    try:
        if isinstance(told, MiniloraError):
            # The innermost module marks the error; each one outside of it knows a longer part of the path.
            told.origin = told.origin or module
            told.path = next((name for name, m in module.named_modules() if m is told.origin), "")
        if told is not error:
            raise told from None
    finally:
        del told  # a frame that holds its error is a circle, and keeps the model


def refuse_swap(module: Any, name: str, old: Any, value: Any) -> None:
    """Raise `DTypeError`: a parameter or module would be lost to something that is neither."""
    owner, kind = type(module).__name__, type(old).__name__
    if hasattr(old, "trainable"):
        raise DTypeError(f"{owner}.{name} is a {kind}, and would be lost to a {type(value).__name__}, which is not trained or "
                         f"saved: to change its numbers, write into its array, .{name}.data[...] -= x or "
                         f".{name}.data[...] = x with numbers or an array x; to replace it, assign a minilora.Parameter")
    raise DTypeError(f"{owner}.{name} is a module, {kind}, and would be lost to a {type(value).__name__}: assign a module or "
                     f"None; for anything else, del .{name} first")


def refuse_shadow(module: Any, name: str, value: Any) -> None:
    """Raise `DTypeError`: a method, or a flag that nobody reads, would be set."""
    owner = type(module).__name__
    if name in FLAGS:
        if name != "requires_grad" and hasattr(type(module), name):  # a class of its own with such an attribute
            return
        raise DTypeError(f"{owner}.{name} = {value!r} would do nothing: call .requires_grad({bool(value)}) for all parameters "
                         f"inside, or set p.trainable = {bool(value)} for one")
    raise DTypeError(f"{name} is a method of every module, and {owner}.{name} = {type(value).__name__} would hide it: call it, "
                     f".{name}(...), or choose another name")
