"""Other libraries: their live models on our ops, their registries, and PyTorch's own extension points."""
