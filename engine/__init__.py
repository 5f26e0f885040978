"""Bundles, ONNX sessions, features, samplers, posteriors and the tasks: generate, fill, split."""
