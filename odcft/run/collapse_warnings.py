"""The figures of a run and what they say about its health.

Shapes: S images of this rank, K clusters.
"""

from typing import Any

# Where a run looks as if it collapsed. The nearest that healthy runs came (docs/reliability.md) were 0.79 K clusters in
# effect, 3.7 times the even share in the largest, a spread of 0.06, and three epochs above 0.93 ln K.
CHANCE, CHANCE_EPOCHS = 0.98, 3.0  # of ln K, which is what guessing costs
DIVERGED = 1.5  # of ln K: far worse than guessing
EFFECTIVE = 0.5  # of K: exp(entropy) is how many clusters of the same size would be as uneven
SHARE, TIMES_EVEN = 0.1, 10.0  # both: of all images, and of what is its even share
SPREAD = 0.02  # the centroids' cosines are about 0.98 then
SETTLED = (
    50  # steps, in which centroids are renewed five times; those of a new neck are nearly one point, and part later
)


def warnings(lines: list[dict[str, Any]], K: int, method: str = "odc") -> dict[str, str]:
    """What is wrong with a run by its figures, and what helps.

    Args:
        lines: of metrics.jsonl, the newest last.
        K: clusters.
        method: dc's classifiers are at chance for another reason.

    Returns:
        A word for each trouble, and a sentence or two; empty for a healthy run.
    """
    now, found = lines[-1], {}
    lately = [line for line in lines if line["epoch"] > now["epoch"] - CHANCE_EPOCHS]
    gentler = "a milder augmentation or a lower learning rate (docs/small_data.md)"
    if now["loss_over_ln_k"] > DIVERGED:
        found["diverging"] = (
            f"the loss is {now['loss_over_ln_k']:.1f} ln K, worse than guessing: the learning rate is too high. "
            "Try --set optim.lr at a third, or optim.warmup_epochs=1."
        )
    elif now["epoch"] >= CHANCE_EPOCHS and all(line["loss_over_ln_k"] >= CHANCE for line in lately):
        why = f"the labels carry no signal. Try {gentler}."
        if method == "dc":
            why = (
                "a classifier that starts anew learns nothing. Try --set optim.schedule=step, a higher --set "
                "optim.head_lr, or --set dc.interval=2."
            )
        found["chance"] = f"the loss has stayed at ln K for {CHANCE_EPOCHS:.0f} epochs: {why}"
    if now["epoch"] < 1:  # as K-Means and an untrained neck left them
        return found
    effective = K ** now["entropy"]
    if effective < EFFECTIVE * K or now["largest_share"] > max(SHARE, TIMES_EVEN / K):
        found["uneven"] = (
            f"the clusters are as uneven as if there were {effective:,.0f} of them, not {K:,}; the largest has "
            f"{now['largest_share']:.0%} of the images. Try fewer --clusters, or {gentler}."
        )
    if now["centroid_spread"] < SPREAD and now["step"] + 1 >= SETTLED:
        found["alike"] = (
            f"the centroids are nearly one point (spread {now['centroid_spread']:.3f}): the features collapse. "
            f"Try {gentler}."
        )
    return found


def summary(figures: dict[str, Any], method: str) -> str:
    """The figures of a line, in words; dc's labels move between epochs only."""
    moving = "" if method == "dc" else f"labels moving {figures['change_ratio']:.0%} · "
    early = "too early to tell" if figures["centroid_spread"] < SPREAD else "healthy"
    condition = "not learning yet" if figures["loss_over_ln_k"] >= CHANCE else early
    kept = f"NMI with the epoch before {figures['nmi_previous']:.2f} · " if "nmi_previous" in figures else ""
    return (
        f"loss {figures['loss']:.2f} ({figures['loss_over_ln_k']:.2f} of ln K) · {moving}{kept}"
        f"clusters {figures['smallest']} … {figures['largest']} · data wait {figures['data_wait']:.0%} · "
        + (", ".join(figures.get("warnings", [])) or condition)
    )
