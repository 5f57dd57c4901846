"""A finished run, written as the tools people use read it: MLX, transformers, llama.cpp and Ollama, the hub."""
