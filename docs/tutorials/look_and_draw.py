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
# The steps of [the page](../page.md) in Python: draw with documents chosen one by one, describe, fill in, edit, and
# look into the memory bank. `make demo` makes the run that is asked here, in a few minutes on a laptop; any other
# finished run with a memory bank will do, by the variable `CM3LEON_RUN`.
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
    """Images next to each other, large enough to be looked at."""
    strip = Image.fromarray(np.concatenate([np.asarray(image) for image in images], axis=1))
    return strip.resize((strip.width * scale, strip.height * scale), Image.Resampling.NEAREST)


# %% [markdown]
# ## Draw
#
# What would be retrieved for a text, the closest last, with its score: the inner product with the text.

# %%
prompt = "a handwritten seven"
found = model.documents_for(prompt, 2)
for document in found:
    print(f"row {document.row}, {document.score:.2f}: {document.text}")
beside([document.image for document in found])

# %% [markdown]
# Four samples with both documents before the text, the best by the run's own CLIP first. A seed counts on from sample
# to sample, and each result depends on its own seed alone.

# %%
drawn = model.generate(prompt, n=4, retrieve=2, seed=0)
for image in drawn:
    print(f"seed {image.seed}: {image.score:.3f}")
beside([image.image for image in drawn])

# %% [markdown]
# The same with the closest document alone, and with more guidance by the text.

# %%
alone = model.generate(prompt, n=4, documents=[found[-1].row], seed=0)
guided = model.generate(prompt, n=4, decoder={"name": "top_p", "cfg": 3.0}, seed=0)
beside([image.image for image in (*alone, *guided)], scale=3)

# %% [markdown]
# ## Look
#
# A text for an image. Any image will do: a path, a Pillow image or an array.

# %%
picture = drawn[0].image
print(model.caption(picture, seed=0))

# %% [markdown]
# Which of some texts fits best: their log-likelihoods after the image.

# %%
texts = ["a handwritten seven", "a handwritten two"]
for text, score in zip(texts, model.score(texts=texts, image=picture), strict=True):
    print(f"{score:8.2f}  {text}")

# %% [markdown]
# ## Fill in
#
# The lower half is made anew, the codes of the upper half are kept. A mask of any shape says the same for a brush.

# %%
lower_HW = np.zeros((side, side), bool)
lower_HW[side // 2 :] = True
by_box = model.infill(picture, prompt, box=(0, side // 2, side, side), seed=1)
by_mask = model.infill(picture, prompt, mask=lower_HW, seed=1)
assert np.array_equal(np.asarray(by_box.image), np.asarray(by_mask.image))
beside([picture, by_box.image])

# %% [markdown]
# Or words of the caption, by their characters: the image stays as it is.

# %%
start = prompt.index("seven")
print(model.infill(picture, prompt, words=(start, len(prompt)), seed=1).text)

# %% [markdown]
# ## Edit and ask
#
# Instructions are for runs that were tuned on them (`objective=instruct`). Others refuse them in a sentence.

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
# Documents that are closest to a text, an image, or the mean of both.

# %%
for document in model.search("a seven", picture, count=3):
    print(f"{document.score:.2f}  {document.id}  {document.text}")

# %% [markdown]
# Documents of one's own stand behind those of the bank, for this model in memory alone; the run's folder stays as it
# is. (The command `add` adds for good.)

# %%
with tempfile.TemporaryDirectory() as folder:
    picture.save(Path(folder) / "own.png")
    line = {"image": "own.png", "text": "a seven of my own"}
    (Path(folder) / "own.jsonl").write_text(json.dumps(line) + "\n")
    richer = model.with_documents(Path(folder) / "own.jsonl")
(closest,) = richer.search("a seven of my own", count=1)
print(f"row {closest.row} of {len(richer.run.bank):,}: {closest.text}")
beside([image.image for image in richer.generate(prompt, n=4, documents=[closest.row], seed=0)])
