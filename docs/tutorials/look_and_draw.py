# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Look and draw
#
# This notebook is for whoever has a finished run and wants to use it from Python. It goes through
# the steps of [the page](../page.md): draw with documents chosen one by one, describe, fill in,
# edit, and look into the memory bank.
#
# `python -m cm3leon.run experiment=digits` makes the run that is used here, `runs/digits`, in [30 to
# 38 minutes](../results.md) on one busy processor core. Any other finished run with a memory bank
# will do: name its folder in the variable `CM3LEON_RUN`.
#
# To open this file as a notebook: `pip install jupytext jupyterlab`, then
# `jupytext --to ipynb docs/tutorials/look_and_draw.py` and `jupyter lab`.

# %%
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from IPython.display import display
from PIL import Image

from cm3leon import CM3Leon
from cm3leon.types import UserError

model = CM3Leon.load(os.environ.get("CM3LEON_RUN", "runs/digits"))
side = model.run.image_tokenizer.image_size
print(
    f"{model.run.folder.name}: images of {side} x {side} pixels, {len(model.run.bank):,} documents"
)


# %%
def beside(images, scale=4):
    """Place images next to each other, enlarged."""
    strip = Image.fromarray(np.concatenate([np.asarray(image) for image in images], axis=1))
    return strip.resize((strip.width * scale, strip.height * scale), Image.Resampling.NEAREST)


# %% [markdown]
# ## Draw
#
# These documents would be retrieved for a text, the closest last. The score is the inner product
# with the text.

# %%
prompt = "a handwritten seven"
found = model.documents_for(prompt, 2)
for document in found:
    print(f"row {document.row}, {document.score:.2f}: {document.text}")
beside([document.image for document in found])

# %% [markdown]
# Draw four samples with both documents before the text. They are ordered by the run's own CLIP, the
# best first. The first sample has the given seed, the next ones the seeds after it, and each result
# depends on its own seed alone.

# %%
drawn = model.generate(prompt, n=4, retrieve=2, seed=0)
for image in drawn:
    print(f"seed {image.seed}: {image.score:.3f}")
beside([image.image for image in drawn])

# %% [markdown]
# Do the same with only the closest document (left), and with more guidance by the text (right).

# %%
alone = model.generate(prompt, n=4, documents=[found[-1].row], seed=0)
guided = model.generate(prompt, n=4, decoder={"name": "top_p", "cfg": 3.0}, seed=0)
beside([image.image for image in (*alone, *guided)], scale=3)

# %% [markdown]
# ## Look
#
# Write a text for an image. The image may be a path, a Pillow image or an array.

# %%
picture = drawn[0].image
print(model.caption(picture, seed=0))

# %% [markdown]
# Find out which of several texts fits best, by their log-likelihoods after the image.

# %%
texts = ["a handwritten seven", "a handwritten two"]
for text, score in zip(texts, model.score(texts=texts, image=picture), strict=True):
    print(f"{score:8.2f}  {text}")

# %% [markdown]
# ## Fill in
#
# The lower half is made anew, and the codes of the upper half are kept. A box names the half here;
# a mask, which may have any shape, gives the same result.

# %%
lower_HW = np.zeros((side, side), bool)
lower_HW[side // 2 :] = True
by_box = model.infill(picture, prompt, box=(0, side // 2, side, side), seed=1)
by_mask = model.infill(picture, prompt, mask=lower_HW, seed=1)
assert np.array_equal(np.asarray(by_box.image), np.asarray(by_mask.image))
beside([picture, by_box.image])

# %% [markdown]
# Words of the caption can be made anew, too. They are named by their characters, and the image
# stays as it is.

# %%
start = prompt.index("seven")
print(model.infill(picture, prompt, words=(start, len(prompt)), seed=1).text)

# %% [markdown]
# ## Edit and ask
#
# Only runs that were tuned on instructions (`objective=instruct`) follow them. Other runs refuse
# with a sentence.

# %%
try:
    edited = model.edit(picture, "make it bold", n=2, seed=0)
    print(model.answer(picture, "what is it?", seed=0))
    display(beside([picture, *(image.image for image in edited)]))
except UserError as error:
    print(error)

# %% [markdown]
# ## The memory bank
#
# Search for the documents that are closest to a text, an image, or, as here, the mean of both.

# %%
for document in model.search("a seven", picture, count=3):
    print(f"{document.score:.2f}  {document.id}  {document.text}")

# %% [markdown]
# You can put documents of your own behind those of the bank. They exist only in the memory of this
# model, and the run's folder stays as it is. (The command `add` adds documents for good.)

# %%
with tempfile.TemporaryDirectory() as folder:
    picture.save(Path(folder) / "own.png")
    line = {"image": "own.png", "text": "a seven of my own"}
    (Path(folder) / "own.jsonl").write_text(json.dumps(line) + "\n")
    richer = model.with_documents(Path(folder) / "own.jsonl")
(closest,) = richer.search("a seven of my own", count=1)
print(f"row {closest.row} of {len(richer.run.bank):,}: {closest.text}")
beside([image.image for image in richer.generate(prompt, n=4, documents=[closest.row], seed=0)])
