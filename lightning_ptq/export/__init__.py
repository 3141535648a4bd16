"""Ways out of the library: packed files, ONNX files, and programs of torch."""
