"""What is trained: backbone, neck and head."""

import torch
from torch import Tensor, nn

from odcft.backbone import Backbone
from odcft.recipe import NeckRecipe


def make_neck(width: int, recipe: NeckRecipe) -> nn.Sequential:
    """{fc-bn-relu-dropout-fc-relu} (paper, sec. 3.2): backbone features (B, F) to (B, D).

    Layer sizes, the BN without affine parameters and the Kaiming initialisation are those of the official code; the
    paper gives only D = 256.
    """
    neck = nn.Sequential(
        nn.Linear(width, recipe.hidden),
        nn.BatchNorm1d(recipe.hidden, momentum=recipe.bn_momentum, affine=False),
        nn.ReLU(),
        nn.Dropout(recipe.dropout),
        nn.Linear(recipe.hidden, recipe.dim),
        nn.ReLU(),
    )
    for layer in neck:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return neck


class Model(nn.Module):
    """Backbone, neck and head: images (B, 3, H, W) to features (B, D) and logits (B, K)."""

    def __init__(self, backbone: Backbone, neck: nn.Module, dim: int, clusters: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = nn.Linear(dim, clusters)
        self._init_head()

    def _init_head(self) -> None:
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def new_head(self, optimizer: torch.optim.Optimizer, seed: int) -> None:
        """Start the head anew, and let the optimizer forget what it knew of it: the labels mean something else now."""
        torch.manual_seed(seed)
        self._init_head()
        for parameter in self.head.parameters():
            optimizer.state.pop(parameter, None)

    def body(self) -> list[nn.Parameter]:
        """What is trained besides the head."""
        return [*self.backbone.parameters(), *self.neck.parameters()]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), RGB in 0..1, normalised by the backbone, to features (B, D) and logits (B, K)."""
        features_BD = self.neck(self.backbone(images))
        return features_BD, self.head(features_BD)
