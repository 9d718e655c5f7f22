"""The toy world: drawings in the formats of every dataset, small weights, and the preset."""

from xsam import former_names

__getattr__ = former_names(build_tokenizer="xsam.toy.weights", write_weights="xsam.toy.weights")
