"""The ggml engine: GGUF files on the CPU, through the library that llama-cpp-python ships."""
