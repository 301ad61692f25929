# %% [markdown]
# # Your own pictures
#
# This notebook is for whoever has a folder of pictures with captions. It trains a model that draws
# such pictures, describes them, and fills in a part of one.
#
# Every step is a command. Here it is called from Python, so that the notebook shows its result. In
# a terminal, the same words follow `python -m cm3leon.run`, for example
# `python -m cm3leon.run experiment=folder data.path=photos`.

# %% tags=["parameters"]
# Few pictures and few steps, so that a laptop is done within minutes. The last section says what to
# raise.
pictures = 400
tokenizer_steps = 300
steps = 800

# %% [markdown]
# ## A folder
#
# The caption of `name.png` stands in `name.txt` beside it. The pictures here are drawn: circles,
# squares and triangles in four colours. Put your own folder in their place.

# %%
import random
from pathlib import Path

from PIL import Image, ImageDraw

from cm3leon import CM3Leon
from cm3leon.run import main

SHAPES = {
    "circle": lambda draw, box, colour: draw.ellipse(box, fill=colour),
    "square": lambda draw, box, colour: draw.rectangle(box, fill=colour),
    "triangle": lambda draw, box, colour: draw.regular_polygon(
        ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, (box[2] - box[0]) / 2), 3, fill=colour
    ),
}
photos = Path("photos")
photos.mkdir()
chance = random.Random(0)
for number in range(pictures):
    shape = chance.choice(list(SHAPES))
    colour = chance.choice(["red", "green", "blue", "gold"])
    left, top, side = chance.choice([0, 8, 16]), chance.choice([0, 8, 16]), 15
    picture = Image.new("RGB", (32, 32), "white")
    SHAPES[shape](ImageDraw.Draw(picture), (left, top, left + side, top + side), colour)
    picture.save(photos / f"{number:03}.png")
    (photos / f"{number:03}.txt").write_text(f"a {colour} {shape}")
(photos / "notes.png").write_text("not a picture")

# %% [markdown]
# ## Which files can be used
#
# A run is a folder. It goes through stages, which are skipped if they are up to date; `until=`
# stops after the named one. The first stage reads the pictures, and lists the files that it cannot
# use.

# %%
settings = [
    "experiment=folder",
    "data.path=photos",
    "run=runs/photos",
    # Pictures of 32 x 32 pixels become 4 x 4 codes, each made of its own patch. This is quick, and
    # good enough for plain pictures.
    *("image_tokenizer=patches", "image_tokenizer.image_size=32", "image_tokenizer.downsampling=8"),
    *("image_tokenizer.codebook_size=128", "image_tokenizer.code_dim=16"),
    f"image_tokenizer_training.steps={tokenizer_steps}",
    "text_tokenizer.vocab_size=320",
    # Documents are found by the words of their captions, which takes no training.
    "retriever=lexical",
    *("model.layers=4", "model.width=128", "model.head_size=32", "model.seq_len=96"),
    *(f"training.steps={steps}", "training.learning_rate=3e-3"),
    *("training.warmup_steps=20", "image_tokenizer_training.warmup_steps=20"),
]
assert main([*settings, "until=documents"]) == 0
print(Path("runs/photos/documents/skipped.jsonl").read_text())

# %% [markdown]
# ## The image tokenizer
#
# A model can draw only what its image tokenizer can reconstruct. So look at the reconstructions
# before you train anything else. The stage `reconstruction` measures them on pictures that the
# tokenizer was not trained on.

# %%
import json

assert main([*settings, "until=reconstruction"]) == 0
measured = json.loads(Path("runs/photos/reconstruction/figures.json").read_text())
measured["psnr_db"], measured["ssim"]

# %% [markdown]
# ## The model
#
# The same words with a later `until=` continue from there: captions and images become tokens, the
# training documents become a memory bank, and the model is trained on samples with retrieved
# documents in front. Without any `until=`, the run ends with an evaluation and `report.html`.

# %%
assert main([*settings, "until=pretraining"]) == 0

# %% [markdown]
# ## Pictures
#
# Draw, describe and fill in. `retrieve=2` puts the two closest documents of the memory bank into
# the prompt.

# %%
model = CM3Leon.load("runs/photos")
drawn = model.generate("a red circle", n=4, retrieve=2, seed=0)
sheet = Image.new("RGB", (4 * 32, 32))
for column, sample in enumerate(drawn):
    sheet.paste(sample.image, (column * 32, 0))
sheet.resize((4 * 96, 96), Image.Resampling.NEAREST)

# %%
model.caption(photos / "000.png"), (photos / "000.txt").read_text()

# %%
filled = model.infill(photos / "000.png", "a blue square", box=(0, 0, 32, 16), seed=0)
filled.image.resize((96, 96), Image.Resampling.NEAREST)

# %% [markdown]
# ## What to raise
#
# | | here | for photographs |
# |---|---|---|
# | `image_tokenizer` | `patches`, 32 pixels | `vq` and 64 pixels, the experiment's own |
# | `training.steps` | 800 | as long as the validation loss falls |
# | `model` | 4 layers of 128 | a preset: `python -m cm3leon.run --list` |
#
# `python -m cm3leon.run status run=runs/photos` shows how the losses develop. A published image
# tokenizer draws 256 pixels without any training: [tokenizers](../tokenizers.md).
#
# With a few thousand photographs, begin with published weights: [public
# weights](../public_weights.md) shows how to fine-tune a 7B by LoRA. Hundreds of thousands of
# photographs are best packed into tars, from which shards are made: [data](../data.md).
