"""The exporters: models written as GGUF and ONNX."""
