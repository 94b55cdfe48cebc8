"""Warnings that a run is collapsing, and its one-line summary, from the figures in metrics.jsonl.

Shapes: S images of this rank, K clusters.
"""

from typing import Any

# Thresholds beyond which a run looks collapsed. The closest that healthy runs came to them (docs/reliability.md):
# 0.79 K effective clusters, a largest cluster 3.7 times the even share, a spread of 0.06, three epochs above 0.93 ln K.
CHANCE, CHANCE_EPOCHS = 0.98, 3.0  # of ln K, the loss of guessing; for this many epochs
DIVERGED = 1.5  # of ln K: far worse than guessing
EFFECTIVE = 0.5  # of K; the effective number of clusters is exp(entropy of the sizes)
SHARE, TIMES_EVEN = 0.1, 10.0  # of all images, and times the even share 1 / K: the largest cluster exceeds both
SPREAD = 0.02  # between centroids; their cosines are then about 0.98
SETTLED = 50  # steps (five centroid updates): at first the centroids of a new neck are nearly one point


def warnings(lines: list[dict[str, Any]], K: int, method: str = "odc", head_apart_until: float = 0.0) -> dict[str, str]:
    """What is wrong with a run according to its figures, and what helps.

    Args:
        lines: of metrics.jsonl, the newest last.
        K: number of clusters.
        method: DeepCluster ("dc") stays at chance for other reasons than ODC.
        head_apart_until: epochs in which the network does not learn from the head, whose loss then says nothing of it.

    Returns:
        Keyword of each problem to a sentence or two that explain it; empty for a healthy run.
    """
    now, found = lines[-1], {}
    recent = [line for line in lines if line["epoch"] > now["epoch"] - CHANCE_EPOCHS]
    gentler = "a milder augmentation or a lower learning rate (docs/faq.md)"
    if now["epoch"] <= head_apart_until:
        pass
    elif now["loss_over_ln_k"] > DIVERGED:
        found["diverging"] = (
            f"the loss is {now['loss_over_ln_k']:.1f} ln K, worse than guessing: the learning rate is too high. "
            "Try --set optim.lr at a third of its value, or --set optim.warmup_epochs=1."
        )
    elif now["epoch"] >= head_apart_until + CHANCE_EPOCHS and all(line["loss_over_ln_k"] >= CHANCE for line in recent):
        why = f"the labels carry no signal. Try {gentler}."
        if method == "dc":
            why = (
                "the classifier learns nothing before it is re-initialised. Try --set optim.schedule=step, a higher "
                "--set optim.head_lr, or --set dc.interval=2."
            )
        found["chance"] = f"the loss has stayed at ln K for {CHANCE_EPOCHS:.0f} epochs: {why}"
    if now["epoch"] < 1:  # clusters and centroids still come from K-Means and an untrained neck
        return found
    effective = K ** now["entropy"]
    if effective < EFFECTIVE * K or now["largest_share"] > max(SHARE, TIMES_EVEN / K):
        found["uneven"] = (
            f"the clusters are as uneven as if there were only {effective:,.0f} instead of {K:,}; the largest has "
            f"{now['largest_share']:.0%} of the images. Try fewer --clusters, or {gentler}."
        )
    if now["centroid_spread"] < SPREAD and now["step"] + 1 >= SETTLED:
        found["alike"] = (
            f"the centroids are nearly one point (spread {now['centroid_spread']:.3f}): the features collapse. "
            f"Try {gentler}."
        )
    return found


def summary(figures: dict[str, Any], method: str, *, kept_labels: bool = False, head_apart: bool = False) -> str:
    """Sum up a line of metrics.jsonl as text.

    Args:
        figures: of the line.
        method: for dc without label changes, which only happen between epochs.
        kept_labels: whether the images keep their first labels.
        head_apart: whether the network does not learn from the head.
    """
    moving = "" if method == "dc" else f"labels moving {figures['change_ratio']:.0%} · "
    early = "too early to tell" if figures["centroid_spread"] < SPREAD else "healthy"
    condition = "not learning yet" if figures["loss_over_ln_k"] >= CHANCE and not head_apart else early
    kept = f"NMI with the epoch before {figures['nmi_previous']:.2f} · " if "nmi_previous" in figures else ""
    instances = f"instance loss {figures['instance_loss']:.2f} · " if "instance_loss" in figures else ""
    if kept_labels:  # memory.start_epochs
        moving, kept = "first labels kept · ", ""
    kept += f"kNN {figures['knn']:.1f} · " if "knn" in figures else ""
    return (
        f"loss {figures['loss']:.2f} ({figures['loss_over_ln_k']:.2f} of ln K) · {instances}{moving}{kept}"
        f"clusters {figures['smallest']} … {figures['largest']} · data wait {figures['data_wait']:.0%} · "
        + (", ".join(figures.get("warnings", [])) or condition)
    )
