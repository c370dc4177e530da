"""The hidden matrices of a model, which Muon trains, and the division of those that share a weight."""

import torch.nn as nn

from fastgpt.model.linear import Linear


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, tuple[int, ...]]:
    """The weights of the linear layers in the blocks of a `GPT`, each with the rows of the matrices that it packs.

    Embeddings and an output layer are not hidden: they lie outside the blocks, or are not linear layers. Vectors are no
    matrices.
    """
    return {
        layer.get_parameter("weight"): layer.parts or (layer.out_features,)
        for name, layer in model.named_modules()
        if name.startswith("h.") and isinstance(layer, Linear)
    }


def hidden_weights(model: nn.Module) -> int:
    """The numbers in the hidden matrices."""
    return sum(weight.numel() for weight in hidden_matrices(model))
