"""ONNX graphs of looped models: one emitter for every family and every product, over one file of weights."""
