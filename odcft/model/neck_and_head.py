"""The network that is trained: backbone, neck and head.

In the paper's words, f is backbone and neck (its "head layer", sec. 3.2), and g_w, the linear classifier, is our head.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from odcft import seeds
from odcft.backbone.network import Backbone
from odcft.recipe import MemberRecipe, NeckRecipe


def make_neck(width: int, recipe: NeckRecipe) -> nn.Sequential:
    """{fc-bn-relu-dropout-fc-relu} (paper, sec. 3.2): backbone features (B, F) to (B, D).

    Layer sizes, the BN without affine parameters and the Kaiming initialisation are those of the official code; the
    paper gives only D = 256. With `neck.hidden` 0 it is {fc-relu}.
    """
    layers: list[nn.Module] = []
    if recipe.hidden:
        layers = [
            nn.Linear(width, recipe.hidden),
            nn.BatchNorm1d(recipe.hidden, momentum=recipe.bn_momentum, affine=False),
            nn.ReLU(),
            nn.Dropout(recipe.dropout),
        ]
    layers.append(nn.Linear(recipe.hidden or width, recipe.dim))
    neck = nn.Sequential(*layers, *([nn.ReLU()] if recipe.relu else []))
    for layer in neck:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return neck


class Output(NamedTuple):
    """The output of a model for a batch."""

    features_BD: Tensor  # the output of the neck
    logits_BK: Tensor
    rotation_logits_B4: Tensor | None = None  # of rotated copies
    mixed_logits_BK: Tensor | None = None  # of mixed copies


class Model(nn.Module):
    """Backbone, neck and head, and a second head on the backbone for a member of CODC that predicts rotations.

    Args:
        backbone: images to features of `backbone.width`.
        neck: maps those features to `dim`; the identity for DC.
        dim: D.
        clusters: K.
        member: which losses a member of CODC has; by default only the clustering loss.
    """

    def __init__(
        self, backbone: Backbone, neck: nn.Module, dim: int, clusters: int, member: MemberRecipe | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = nn.Linear(dim, clusters)
        self._init_head()
        self.turn_head = nn.Linear(backbone.width, 4) if member and member.rotation else None
        self.uses_mixup = bool(member and member.mixup)

    def _init_head(self) -> None:
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def new_head(self, optimizer: torch.optim.Optimizer, seed: int, member: int, step: int) -> None:
        """Reinitialise the head and drop its optimizer state, because the labels have changed their meaning.

        Args:
            optimizer: of the run.
            seed: of the run.
            member: the index of this network.
            step: the first step with the new labels.
        """
        with seeds.seeded_init(seed, "new head", member, step):
            self._init_head()
        for parameter in self.head.parameters():
            optimizer.state.pop(parameter, None)

    def heads(self) -> list[nn.Parameter]:
        """The parameters of the heads."""
        rotation = self.turn_head.parameters() if self.turn_head else ()
        return [*self.head.parameters(), *rotation]

    def body(self) -> list[nn.Parameter]:
        """The parameters of backbone and neck."""
        return [*self.backbone.parameters(), *self.neck.parameters()]

    def forward(
        self, images: Tensor, rotated: Tensor | None = None, mixed: Tensor | None = None, head_apart: bool = False
    ) -> Output:
        """Run images, RGB in 0..1, and copies of them through the network in one pass.

        Args:
            images: (B, 3, H, W).
            rotated: as many; ignored without a rotation head.
            mixed: as many; ignored by a member without mixup.
            head_apart: the head learns the labels, but backbone and neck do not learn from the head.
        """
        rotated, mixed = rotated if self.turn_head else None, mixed if self.uses_mixup else None
        if rotated is None and mixed is None:
            features_BD = self.neck(self.backbone(images))
            return Output(features_BD, self.head(features_BD.detach() if head_apart else features_BD))
        B = len(images)
        all_XF = self.backbone(torch.cat([part for part in (images, mixed, rotated) if part is not None]))
        rotation_logits_B4 = self.turn_head(all_XF[-B:]) if self.turn_head else None
        features_XD = self.neck(all_XF[: 2 * B] if mixed is not None else all_XF[:B])
        logits_XK = self.head(features_XD)
        return Output(features_XD[:B], logits_XK[:B], rotation_logits_B4, logits_XK[B:] if mixed is not None else None)
