"""A model as a folder of ONNX graphs over one file of weights: what lies in it, and what it may hold."""
