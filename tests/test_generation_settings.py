"""What a run's generation draws, and the weight of guidance that it chooses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from cm3leon.experiment import load_experiment
from cm3leon.registry import discover
from cm3leon.stages.evaluate import chosen_cfg
from cm3leon.stages.generate import settings
from cm3leon.tokenizers.vocab import Vocab

discover()

VOCAB = Vocab(text_size=40, image_size=16, sentinels=4)


def test_a_run_draws_guided_tasks_at_each_weight_that_their_decoder_has() -> None:
    """Halves by top-p at every weight; captions by text's greedy decoder, and halves by another greedy one, once."""
    words = ["generation.cfg=[1,2]", "generation.documents=[0]", "generation.shuffled_documents=0"]
    tasks = ["tasks=[text_to_image,caption,infill_top,infill_bottom]"]
    chosen = ["task_decoders={infill_bottom: greedy}"]
    run = SimpleNamespace(
        experiment=load_experiment("digits", [*words, *tasks, *chosen]),
        vocab=VOCAB,
        image_tokenizer=SimpleNamespace(grid=4),
    )
    found = [(s.task, s.split, s.cfg) for s in settings(run)]  # type: ignore[arg-type]
    assert found == [
        ("text_to_image", "validation", 1),
        ("text_to_image", "validation", 2),
        ("text_to_image", "held_out", 1),
        ("text_to_image", "held_out", 2),
        ("caption", "held_out", None),
        ("infill_top", "validation", 1),
        ("infill_top", "validation", 2),
        ("infill_top", "held_out", 1),
        ("infill_top", "held_out", 2),
        ("infill_bottom", "held_out", None),
    ]


def test_the_weight_that_is_chosen_is_that_of_text_to_image() -> None:
    def entry(task: str, cfg: float, accuracy: float) -> dict[str, Any]:
        metrics = {"accuracy": {"value": accuracy}}
        return {"task": task, "split": "validation", "cfg": cfg, "metrics": metrics}

    halves = [entry("infill_top", 1.0, 0.99), entry("infill_top", 2.0, 0.5)]
    images = [entry("text_to_image", 1.0, 0.7), entry("text_to_image", 2.0, 0.8)]
    assert chosen_cfg([*halves, *images]) == 2.0
    assert chosen_cfg(halves) is None
