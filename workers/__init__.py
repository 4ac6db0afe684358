"""Tokens in, tokens out: model, kernels, cache and engine. Nothing here knows of gRPC messages or of text."""
