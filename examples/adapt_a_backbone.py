# %% [markdown]
# # Adapt a backbone to your images
#
# Open this file in VS Code, Spyder or PyCharm, which show the cells, or turn it into a notebook: `jupytext --to ipynb
# adapt_a_backbone.py`. As it stands it continues from `odcft demo --out demo`; set the three names to use your own.

# %%
import os

import odcft

CKPT = os.environ.get("CKPT", "demo/rotation.pth")  # a checkpoint of almost any origin, or timm:NAME
IMAGES = os.environ.get("IMAGES", "demo/digits")  # images; labels are not read
LABELLED = os.environ.get("LABELLED", "demo/digits")  # some labelled images, only to measure with
OUT = os.environ.get("OUT", "runs/adapted")
EPOCHS = int(os.environ.get("EPOCHS", 10))

# %% [markdown]
# What is in the checkpoint, and what are the images?

# %%
loaded = odcft.load_backbone(CKPT)
print(loaded.backbone.arch, "·", loaded.family, "·", loaded.backbone.input.describe_view())
images = odcft.find_images(IMAGES)
print(f"{len(images):,} images, the first is {images.names[0]}")

# %% [markdown]
# Fine-tune. The recipe for small images fits the digits; a mirrored digit is not a digit, so no flips.

# %%
recipe = odcft.load_recipe("small", {"augment.flip": 0, "optim.batch_size": 32}, preset="gray")
run = odcft.fine_tune(CKPT, IMAGES, OUT, recipe=recipe, epochs=EPOCHS, clusters=20, overwrite=True)
print(f"{run['steps']} steps in {run['seconds']:.0f} s; the backbone is in {run['backbone']}")

# %% [markdown]
# Did it learn something? The loss should fall, and fewer images should change cluster.

# %%
for line in run["metrics"][-5:]:
    print(f"epoch {line['epoch']:.1f}: loss {line['loss']:.2f}, {line['change_ratio']:.0%} of labels moved")

# %% [markdown]
# Is it better than before? This is the only place where labels are read.

# %%
result = odcft.evaluate(OUT, LABELLED, protocol="knn")
print(f"{result['before']['knn']['top1']:.1f} before, {result['knn']['top1']:.1f} after: {result['verdict']}")

# %% [markdown]
# What lies next to the first image now?

# %%
found = odcft.embed(OUT, LABELLED)
features = found["features"] / (found["features"] ** 2).sum(1, keepdims=True) ** 0.5
nearest = (features @ features[0]).argsort()[::-1][1:6]
print(found["paths"][0], "is nearest to", [found["paths"][i] for i in nearest])

# %% [markdown]
# Use it anywhere.

# %%
print(run["load"])
