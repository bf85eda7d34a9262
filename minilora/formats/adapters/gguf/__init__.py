"""llama.cpp's dialect: adapters as GGUF files."""
