"""A device that is not the CPU, for tests: ggml's RPC backend, served by a second process over loopback."""
