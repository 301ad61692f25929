"""A world where the truth is known: a task family in one plugin; docs/scenes.md has what was
learned of it.

world.py         what a scene holds, and how it is drawn from a seed
render.py        its picture, and exactly: owners of pixels, boxes, depth, normals, edges, joints
language.py      captions, questions with their one right answer, reasoning, edits
parse.py         a picture back to a scene
source.py        scenes, scene_entities                    corpora: captioned pictures, a memory bank
instructions.py  scene_instructions                        a corpus for each of the paper's tasks
scores.py        an answer against the truth, as pure functions
protocols.py     scene_task, scene_compositions, scene_entities    what models are asked, and how it is scored
"""
