"""A batch in parts: the same samples, the same memory rows, and the gradients that the parts should have."""

import pytest
import torch
from torch import nn

from odcft import train
from odcft.backbone.load import load_backbone
from odcft.clustering import odc
from odcft.model import backpropagation as module
from odcft.model.backpropagation import backpropagate
from odcft.model.members import make_members, make_necks
from odcft.model.views import with_copies
from odcft.plan import fill_autos
from odcft.recipe import load_recipe
from odcft.run import snapshot_files
from odcft.train import fine_tune

B, K = 12, 5
PLAIN, COPIES = "[{cluster: 1}]", "[{cluster: 1, rotation: 0.5}]"
MIXED = "[{cluster: 0.5, mixup: 1}]"


@pytest.fixture
def doubles(monkeypatch):
    """Everything in float64: `float()` is for what has fewer bits."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.to(torch.promote_types(self.dtype, torch.float32)))


def members(parts, kinds, *, norm):
    plan = fill_autos(
        load_recipe("odc_small", [f"optim.accumulate={parts}", f"codc.members={kinds}", "data.size=32"]),
        clusters=K,
    )
    torch.manual_seed(0)
    backbones = [load_backbone("scratch:test_resnet").backbone]
    network = make_members(backbones, *make_necks(backbones, plan), plan).double()
    if not norm:  # as a network without batch norm
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.eval()
                layer.train = lambda mode=True, layer=layer: layer
    return network.train() if norm else network


def batch(plan):
    draw = torch.Generator().manual_seed(3)
    images = torch.rand(B, 3, 32, 32, generator=draw, dtype=torch.float64)
    label_B = torch.randint(K, (B,), generator=draw)
    return with_copies(images, plan.codc, draw), label_B, torch.rand(K, generator=draw, dtype=torch.float64) + 0.1


def gradients(network, *args, **options):
    network.zero_grad()
    found = backpropagate(network, network, *args, **options)
    return [p.grad.clone() for p in network.parameters()], found


@pytest.mark.parametrize("kinds", [PLAIN, COPIES, MIXED])
def test_without_batch_norm_the_gradients_are_those_of_the_whole_batch(doubles, kinds):
    whole, parted = (members(parts, kinds, norm=False) for parts in (1, 5))  # 5: parts of 3 and 2 images
    views, label_B, weight_K = batch(whole.plan)
    expected, (features, *losses, _) = gradients(whole, views, label_B, weight_K)
    found, (features_of_parts, *losses_of_parts, _) = gradients(parted, views, label_B, weight_K)
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(expected, found, strict=True))
    assert torch.allclose(features, features_of_parts, rtol=1e-9)
    assert all(torch.allclose(one, other, rtol=1e-9) for one, other in zip(losses, losses_of_parts, strict=True))


def test_with_batch_norm_they_are_the_mean_over_as_many_ranks(doubles):
    """Ranks divide by the weights of their own images, so they agree where all clusters weigh the same."""
    parted, single = members(4, PLAIN, norm=True), members(1, PLAIN, norm=True)
    views, label_B, _ = batch(parted.plan)
    found, _ = gradients(parted, views, label_B, torch.ones(K, dtype=torch.float64))
    of_ranks = []
    for part, of_part in zip(views.parts(4), label_B.tensor_split(4), strict=True):
        of_ranks.append(gradients(single, part, of_part, torch.ones(K, dtype=torch.float64))[0])
    for one, *of_each in zip(found, *of_ranks, strict=True):
        assert torch.allclose(one, torch.stack(of_each).mean(0), rtol=1e-9, atol=1e-12)
    whole, _ = gradients(single, views, label_B, torch.ones(K, dtype=torch.float64))
    assert not all(torch.allclose(one, other, rtol=1e-3) for one, other in zip(found, whole, strict=True))


def test_gradients_are_multiplied_by_the_factor_and_the_loss_is_not(doubles):
    network = members(3, PLAIN, norm=False)
    plain, (_, loss, *_) = gradients(network, *batch(network.plan))
    scaled, (_, same_loss, *_) = gradients(network, *batch(network.plan), factor=1024.0)
    assert all(torch.allclose(1024 * one, other, rtol=1e-9) for one, other in zip(plain, scaled, strict=True))
    assert torch.equal(loss, same_loss)


@pytest.mark.parametrize("share", [1, 0.25])
def test_images_find_their_entries_and_the_head_may_learn_apart(doubles, share):
    whole, parted = (members(parts, PLAIN, norm=False) for parts in (1, 5))
    views, label_B, weight_K = batch(whole.plan)
    entry_BD = torch.randn(B, whole.plan.neck.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    to_find = odc.EntriesToFind(entry_BD, share)
    expected, (features_BD, loss, logged, instances) = gradients(whole, views, label_B, weight_K, to_find)
    found, (_, loss_of_parts, _, instances_of_parts) = gradients(parted, views, label_B, weight_K, to_find)
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(expected, found, strict=True))
    (model,) = whole
    cosine_BB = nn.functional.normalize(features_BD) @ nn.functional.normalize(entry_BD).T
    finding = -(cosine_BB / 0.1).log_softmax(1).diagonal().mean()
    assert torch.allclose(loss, share * finding + (logged if share == 1 else (1 - share) * logged), rtol=1e-9)
    assert torch.allclose(loss_of_parts, loss, rtol=1e-9)
    assert torch.allclose(instances, finding, rtol=1e-9)
    assert torch.allclose(instances_of_parts, finding, rtol=1e-9)

    def alone(of_instances, head_sees):
        whole.zero_grad()
        features_BD = model(views.images).features_BD
        cosine_BB = nn.functional.normalize(features_BD) @ nn.functional.normalize(entry_BD).T
        of_labels = nn.functional.cross_entropy(model.head(head_sees(features_BD)), label_B, weight_K)
        instances = -(cosine_BB / 0.1).log_softmax(1).diagonal().mean()
        (of_instances * instances + (1 if of_instances == 1 else 1 - of_instances) * of_labels).backward()
        return [parameter.grad for parameter in whole.parameters()]

    alone = alone(share, torch.detach if share == 1 else lambda features_BD: features_BD)
    assert all(torch.allclose(one, other, rtol=1e-8, atol=1e-12) for one, other in zip(expected, alone, strict=True))


@pytest.mark.parametrize("parts", [1, 2])
def test_an_image_finds_its_entry_among_those_of_all_ranks_of_which_one_has_fewer_images(doubles, on_threads, parts):
    """An unreadable image is missing in the batch of its rank."""
    whole, *of_ranks = (members(count, PLAIN, norm=False) for count in (1, parts, parts))
    views, label_B, weight_K = batch(whole.plan)
    entry_BD = torch.randn(B, whole.plan.neck.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, (features_BD, *_) = gradients(whole, views, label_B, weight_K)
    cosine_BB = nn.functional.normalize(features_BD) @ nn.functional.normalize(entry_BD).T
    finding_B = -(cosine_BB / 0.1).log_softmax(1).diagonal()

    def work():
        mine = slice(0, 7) if module.dist.rank() == 0 else slice(7, B)
        network, to_find = of_ranks[module.dist.rank()], odc.EntriesToFind(entry_BD[mine], 0.5)
        my_views = views._replace(images=views.images[mine])
        found, (_, loss, logged, _) = gradients(network, my_views, label_B[mine], weight_K, to_find)
        assert torch.allclose(loss, (finding_B[mine].mean() + logged) / 2, rtol=1e-9)
        return found

    for found in on_threads(2, work):
        assert all(gradient.isfinite().all() for gradient in found)


def test_ranks_exchange_gradients_with_the_last_part_only(monkeypatch):
    now = []
    whole = module.dist.exchanging_gradients
    monkeypatch.setattr(module.dist, "exchanging_gradients", lambda model, last: now.append(last) or whole(model, last))
    network = members(3, PLAIN, norm=False).float()
    views, label_B, weight_K = batch(network.plan)
    backpropagate(network, network, views._replace(images=views.images.float()), label_B, weight_K.float())
    assert now == [False, False, True]


def run(folder, inputs, name, *overrides, **options):
    quick = ["optim.batch_size=16", "neck.hidden=16", "neck.dim=8", "log.tensorboard=false", "log.snapshot_share=1"]
    recipe = load_recipe("small", [*quick, "optim.epochs=2", "memory.clusters=4", "memory.min_cluster=2", *overrides])
    fine_tune(*inputs, folder / name, recipe, **options)
    return snapshot_files.load(sorted((folder / name / "checkpoints").glob("step-*"))[-1])


@pytest.fixture
def inputs(tmp_path, make_checkpoint, make_images):
    return str(make_checkpoint(tmp_path / "c.pth")), str(make_images(tmp_path / "images", 32))


def test_accumulation_updates_the_same_memory_rows_and_counts_whole_steps(tmp_path, inputs, monkeypatch):
    seen = {}
    for name, parts in (("one", 1), ("four", 4)):
        updates = seen[name] = []

        def update(clusters, row_B, features_BD, step, updates=updates, whole=odc.update):
            updates.append((step, row_B.tolist(), tuple(features_BD.shape)))
            return whole(clusters, row_B, features_BD, step)

        monkeypatch.setattr(train.METHODS["odc"], "update", update)
        snapshot = run(tmp_path, inputs, name, f"optim.accumulate={parts}")
        monkeypatch.undo()
        assert snapshot.about["step"] == 4
    assert seen["one"] == seen["four"]
    assert next(rows for _, rows, _ in seen["one"]) != list(range(16))


def test_a_run_in_parts_resumes_to_the_same_bits(tmp_path, inputs, monkeypatch):
    settings = ("optim.accumulate=3", "optim.precision=float16", "neck.dropout=0.5")
    whole = run(tmp_path, inputs, "whole", *settings)
    real = train.lr_at

    def stop_at_two(step, *args):
        if step == 2:
            raise KeyboardInterrupt
        return real(step, *args)

    monkeypatch.setattr(train, "lr_at", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, inputs, "parts", *settings, "log.snapshot_minutes=0.0000001")
    monkeypatch.undo()
    resumed = run(tmp_path, inputs, "parts", *settings, resume=True)
    assert all(torch.equal(tensor, resumed.same[name]) for name, tensor in whole.same.items())
    assert all(torch.equal(tensor, resumed.rows[name]) for name, tensor in whole.rows.items())
    assert whole.about["loss_scale"] == resumed.about["loss_scale"] != {}
