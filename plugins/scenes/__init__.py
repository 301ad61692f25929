"""A world where the truth is known: a family of tasks in one plugin.

    world.py         what a scene holds, and how it is drawn from a seed
    render.py        its picture, and exactly what is seen in it: boxes, depth, normals, edges ...
    language.py      captions, questions with their one right answer, reasoning, edits
    parse.py         from a picture back to a scene
    source.py        the corpora scenes (captioned pictures) and scene_entities (a memory bank)
    instructions.py  the corpus scene_instructions, for each of the paper's tasks
    scores.py        answers compared with the truth, as pure functions
    protocols.py     scene_task, scene_compositions and scene_entities: what models are asked, and
                     how it is scored

What was learned of it is in docs/scenes.md.
"""
