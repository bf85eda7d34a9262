"""PEFT's folders: adapter_config.json beside adapter_model.safetensors.

    keys       the names of tensors: module path, and which part of an adapter it is
    settings   adapter_config.json and lora.Config
    reading    tensors and config as a SavedAdapter
    writing    and back
    folder     the dialect: all of it together
"""
