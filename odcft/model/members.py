"""One network, or several that share one clustering and so constrain each other (Collaborative ODC).

The slides of Zhan et al. ("Collaborative Online Deep Clustering") name the members and their results: DC, ROT (also
predicts rotations), CLS (classifies mixed images by the clustering). They do not say how the members work together, so
this design is ours:

- The samples memory holds the members' features side by side, each normalised and divided by the square root of their
  number, so that every member has the same weight in distances. From there on it is ODC: one K-Means, one label per
  image, updated in every step.
- The label supervises the head of every member. A member with `rotation` also predicts by how many quarter turns a
  copy of the image was rotated; one with `mixup` also classifies mixtures of two images by both labels.

A single member with neither is ODC, bit for bit; every run of ODC and DC is a run with one member.

Shapes: B batch, K clusters, F backbone, D a member's embedding, M members.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odcft import seeds
from odcft.backbone.frozen_stages import freeze_stages
from odcft.backbone.network import Backbone
from odcft.backbone.one_pixel_maps import skip_padding
from odcft.clustering.methods import METHODS
from odcft.data.augmentation import augment_batch
from odcft.data.batches import Batch
from odcft.distributed import dist
from odcft.model.losses import losses
from odcft.model.neck_and_head import Model, Output, make_neck
from odcft.model.views import Views, with_copies
from odcft.plan import Plan


class Members(nn.Module):
    """The networks that are trained together: one, or those of CODC.

    Args:
        models: one for each member.
        plan: of the run.
    """

    def __init__(self, models: list[Model], plan: Plan) -> None:
        super().__init__()
        self.members = nn.ModuleList(models)
        self.plan = plan

    def __iter__(self) -> Iterator[Model]:
        return iter(self.members)  # type: ignore[arg-type]

    def body(self) -> list[nn.Parameter]:
        """Parameters of all backbones and necks."""
        return [parameter for model in self for parameter in model.body()]

    def heads(self) -> list[nn.Parameter]:
        """Parameters of all heads."""
        return [parameter for model in self for parameter in model.heads()]

    def new_heads(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Reinitialise all heads before a step, because the labels have changed their meaning."""
        for member, model in enumerate(self):
            model.new_head(optimizer, self.plan.seed, member, step)

    def views(self, batch: Batch, step: int, device: torch.device) -> Views:
        """A batch as the members see it: augmented on the device, with the copies that any of them needs."""
        plan, stream = self.plan, (dist.rank(), step)
        pixels = batch.pixels.to(device, non_blocking=True)
        images = augment_batch(pixels, plan.augment, seeds.generator(plan.seed, "augmentation", *stream))
        if plan.optim.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return with_copies(images, plan.codc, seeds.generator(plan.seed, "copies", *stream))

    def forward(
        self, images: Tensor, rotated: Tensor | None = None, mixed: Tensor | None = None, head_apart: bool = False
    ) -> list[Output]:
        """The output of each member."""
        return [member(images, rotated, mixed, head_apart) for member in self.members]

    def losses(
        self, outputs: list[Output], views: Views, label_B: Tensor, weight_K: Tensor, whole_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Call `losses` with the weights from the plan."""
        return losses(outputs, self.plan.codc, label_B, weight_K, views, whole_B)


# ---------------------------------------------------------------- making the networks


def make_necks(backbones: list[Backbone], plan: Plan) -> tuple[list[nn.Module], int]:
    """A neck for each member, and the length D of its output; for DC the identity, and D is the backbone's width."""
    if not METHODS[plan.method].HAS_NECK:
        return [nn.Identity() for _ in backbones], backbones[0].width
    necks: list[nn.Module] = []
    for member, backbone in enumerate(backbones):
        with seeds.seeded_init(plan.seed, "neck", member):
            necks.append(make_neck(backbone.width, plan.neck))
    return necks, plan.neck.dim


def make_members(backbones: list[Backbone], necks: list[nn.Module], dim: int, plan: Plan) -> Members:
    """Backbones and necks with new heads, as one network on the device."""
    models = []
    for backbone in backbones:
        freeze_stages(backbone, plan.optim.freeze)
        if plan.optim.skip_padding:
            skip_padding(backbone)
    for member, (backbone, neck, weights) in enumerate(zip(backbones, necks, plan.codc.members, strict=True)):
        with seeds.seeded_init(plan.seed, "head", member):
            models.append(Model(backbone, neck, dim, plan.memory.clusters, weights))
    network = Members(models, plan).to(dist.this_device())
    if plan.optim.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def on_all_ranks(network: Members, device: torch.device, say: Callable[[str], None] = lambda line: None) -> nn.Module:
    """Wrap the network for data-parallel training on all ranks.

    With several ranks this does a throwaway backward pass. After the first one, torch sorts the gradients into the
    buckets it exchanges, which decides in which order three or more ranks add them up. A resumed run must start from
    the same buckets as an uninterrupted one.

    Args:
        network: the members.
        device: of this rank.
        say: announces torch.compile, which works silently for minutes in the first step.
    """
    plan = network.plan
    if plan.optim.compile:
        say("Compiling   the network by torch.compile (optim.compile): the first step can take minutes …")
        for member in network:
            member.backbone.compile()  # in place: the names of its tensors stay
    # Not the necks, as in the official code.
    model = dist.data_parallel(network, device, [m.backbone for m in network] if plan.optim.sync_bn == "on" else [])
    if dist.world_size() == 1:
        return model
    images = torch.zeros(2, plan.data.bands, plan.data.size, plan.data.size, device=device)
    views = with_copies(images, plan.codc, torch.Generator())
    model.eval()  # so that the running statistics do not change
    with plan.autocast(device):
        outputs = model(views.images, views.rotated, views.mixed)
    label_B, weight_K = (
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.ones(plan.memory.clusters, device=device),
    )
    network.losses(outputs, views, label_B, weight_K)[0].backward()
    model.zero_grad()
    model.train()
    return model


# ---------------------------------------------------------------- their joint features


def joint_features(features: list[Tensor]) -> Tensor:
    """Concatenate the members' neck outputs, each normalised: M of (B, D) to (B, M * D). A single one is not changed.

    Eq. 2 normalises the whole, so that each member's part has length 1 / sqrt(M).
    """
    if len(features) == 1:
        return features[0]
    return torch.cat([F.normalize(features_BD.float(), dim=1, eps=1e-10) for features_BD in features], 1)
