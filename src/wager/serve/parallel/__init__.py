"""One model over several processes: pipeline stages, each with its own layers, and tensor-parallel shards of layers."""
