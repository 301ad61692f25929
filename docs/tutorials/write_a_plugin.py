# %% [markdown]
# # Write a plugin
#
# This notebook is for whoever wants to add a component without editing the project. Everything that
# YAML chooses by name is a class in a registry. Here we write a new objective, look at what it does
# with one sample, and train with it.

# %% [markdown]
# ## A class with a config
#
# An objective says what the model is trained on: `corrupt` turns a sample into ids, with the weight
# of each in the loss. This one is the paper's CM3 objective, except that the codes of images weigh
# less than text. Its settings are a nested dataclass called `Config`, in which every field has a
# type with its bounds, and a sentence below it.

# %%
from pathlib import Path

Path("lighter.py").write_text(
    '''"""CM3 with another weight for the codes of images."""

from dataclasses import dataclass

import numpy as np

from cm3leon.config import NonNegativeFloat
from cm3leon.objectives.cm3 import CM3
from cm3leon.registry import OBJECTIVES


@OBJECTIVES.register("lighter_images")
class LighterImages(CM3):
    """The CM3 objective, in which codes of images weigh less or more than text."""

    @dataclass(kw_only=True)
    class Config(CM3.Config):
        """Settings of CM3, and the weight of images in the loss."""

        image_weight: NonNegativeFloat = 0.5
        """Weight of an image's codes in the loss; 1 is the paper's objective."""

    def _weights(self, sample):
        weight_T = super()._weights(sample)
        image_T = self.vocab.is_image(sample.ids_T)
        return np.where(image_T, weight_T * self.config.image_weight, weight_T)
'''
)

# %% [markdown]
# ## Found, described and checked
#
# `plugins=` names the file, in YAML or on the command line. The objective is then listed with its
# settings, like the ones that ship.

# %%
from cm3leon.run import main

assert main(["--list", "lighter_images", "plugins=[lighter.py]"]) == 0

# %% [markdown]
# A mistake in its settings is answered with one sentence and exit code 2, before anything begins.

# %%
words = ["experiment=digits_smoke", "plugins=[lighter.py]", "objective=lighter_images"]
assert main([*words, "objective.image_wieght=0.25", "--show"]) == 2

# %% [markdown]
# ## What it does with one sample
#
# The sample is a caption of three pieces and an image of four codes, in a small vocabulary. The
# list shows the kind of each token and its weight in the loss.

# %%
import numpy as np

from cm3leon.registry import OBJECTIVES
from cm3leon.tokenizers.document import lay_out
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Sample, TokenDocument, TokenSegment

vocab = Vocab(text_size=40, image_size=16, sentinels=8)
pair = TokenDocument(
    "a red dog",
    (
        TokenSegment("text", np.array([10, 11, 12])),
        TokenSegment("image", vocab.image_ids(np.array([7, 2, 9, 4]))),
    ),
)
objective = OBJECTIVES.build(
    {"name": "lighter_images", "image_weight": 0.25, "mean_spans": 0.0}, vocab=vocab
)
seen = objective.corrupt(lay_out(Sample(pair), vocab), np.random.default_rng(0), max_tokens=64)
[
    (vocab.kind(int(id_)), float(weight))
    for id_, weight in zip(seen.ids_T, seen.weight_T, strict=True)
]

# %%
assert seen.weight_T[vocab.is_image(seen.ids_T)].tolist() == [0.25] * 4
assert set(seen.weight_T[~vocab.is_image(seen.ids_T)].tolist()) == {1.0}

# %% [markdown]
# ## In an experiment
#
# Settings that belong together can be kept in a file and given as `overrides=`. The run below is
# short, on a fifth of the digits, with parts that need little or no training. Nothing is learned,
# but every stage up to the pretraining works with the objective.

# %%
Path("mine.yaml").write_text(
    """objective: {name: lighter_images, image_weight: 0.25, mean_spans: 2.0}
training.steps: 20
split.held_out: 0.8
augment.versions: 1
retriever: {name: lexical}
image_tokenizer: {name: patches, image_size: 32, downsampling: 8, codebook_size: 128, code_dim: 16}
"""
)
assert main([*words, "overrides=mine.yaml", "until=pretraining", "run=runs/lighter"]) == 0

# %% [markdown]
# The run folder has the whole experiment as it was asked for. The log has the losses of text and of
# images separately, unweighted.

# %%
import json

import yaml

asked = yaml.safe_load(Path("runs/lighter/config.yaml").read_text())["objective"]
last = json.loads(Path("runs/lighter/pretraining/log.jsonl").read_text().splitlines()[-1])
asked, {name: value for name, value in last.items() if "loss" in name}

# %% [markdown]
# ## Where to go on
#
# [Plugins](../plugins.md) goes through every kind of component, the contract tests that check it,
# and how to ship it as a package. [Architecture](../architecture.md) lists what each kind has to
# offer.
