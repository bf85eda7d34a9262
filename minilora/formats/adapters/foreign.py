"""Files of other methods, and of LoRA in dialects that minilora does not read: named, so that nobody guesses what they are."""

from __future__ import annotations

import re

from .dialect import Source

__all__ = ["AS_PREFIX", "foreign"]

TO_LORA = "peft.convert_to_lora makes a LoRA of it by an SVD of each layer, in the program that can load it"
AS_PREFIX = "as an adapter of weights; minilora.formats.load_prefix(model, path) loads it"
RETRAIN = "load it in the program that trained it, or train a LoRA in its place"

# What a key holds; the method; what to do about it. The first that hits counts.
METHODS = (
    (r"\.hada_[wt][12](_[ab])?$", "LoHa (LyCORIS): a product, entry by entry, of two low-rank matrices", TO_LORA),
    (r"\.lokr_([wt][12](_[ab])?|t2)$", "LoKr (LyCORIS): a Kronecker product", TO_LORA),
    (r"\.lora_E$", "AdaLoRA: D = B diag(E) A with ranks of its own", TO_LORA),
    (r"(^|\.)vera_(lambda_[bd]|A|B)$", "VeRA: shared random factors, scaled by trained vectors", TO_LORA),
    (r"\.ia3_l$|\.on_input$", "IA3: activations multiplied by a trained vector", RETRAIN),
    (r"\.boft_[RsPQ]$", "BOFT: the weight turned by butterfly factors", RETRAIN),
    (r"\.oft_([Rrs]|blocks|diag)(\.weight)?$", "OFT: the weight turned by an orthogonal matrix", RETRAIN),
    (r"\.fourierft_spectrum$", "FourierFT: a few frequencies of the update", TO_LORA),
    (r"(^|\.)prompt_embeddings$|\.prompt_encoder\.", "prompt or prefix tuning: no weight is changed", AS_PREFIX),
    (r"\.(a1|a2|b1|b2)\.weight$", "GLoRA (LyCORIS)", TO_LORA),
    (r"\.diff(_b)?$", "whole differences of weights (LyCORIS 'full', or kohya's extraction)",
     "add them to the weights, or lora.extract a low-rank update from the two checkpoints"),
    (r"^[^.:]+:\d+:(down|up)$", "LoRA in the dialect of cloneofsimo/lora, with layers numbered and not named",
     "kohya-ss/sd-scripts and diffusers have scripts that convert it to safetensors with names"),
    (r"\.lora_[ab]_(scales|biases)$", "mlx-lm's adapters with quantised factors", "write them without to_quantized"),
    (r"\.lora_[ab]\.weight$", "LoRA in torchtune's dialect, whose queries and keys are in another order",
     "let torchtune write PEFT's dialect: save_adapter_weights_only with its HF checkpointer"),
    (r"\.parametrizations\.[^.]+\.\d+\.lora_[AB]$", "LoRA in minLoRA's dialect",
     "rename <module>.parametrizations.weight.0.lora_A to <module>.lora_A, and read it as loralib's dialect"),
    (r"\.lora_(mid|down\.mid)\.weight$", "LoCon with a Tucker core (lora_mid, LyCORIS use_tucker)", TO_LORA),
)


def foreign(source: Source) -> str | None:
    """One sentence that names the method of a file that minilora does not read, and what can be done; None for the others.

    Parameters
    ----------
    source : Source
        Only its keys are looked at.

    Examples
    --------
    >>> from pathlib import Path
    >>> print(foreign(Source(Path("x.safetensors"), {"fc.lokr_w1": 0}, {}, None)))
    x.safetensors: fc.lokr_w1 is of LoKr (LyCORIS): a Kronecker product. minilora does not read it: peft.convert_to_lora \
makes a LoRA of it by an SVD of each layer, in the program that can load it
    """
    for pattern, method, cure in METHODS:
        found = [key for key in source.tensors if re.search(pattern, key)]
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            colon = "" if cure is AS_PREFIX else ":"
            return f"{source.path}: {found[0]}{more} is of {method}. minilora does not read it{colon} {cure}"
    return None
