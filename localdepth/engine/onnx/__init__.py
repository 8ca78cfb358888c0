"""The ONNX Runtime engine: folders of graphs on the CPU, with nothing to compile."""
