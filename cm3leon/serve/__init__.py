"""A finished run that many ask at a time: one engine in a thread (`engine.py`), the model asked through it
(`service.py`), and OpenAI's endpoints on top (`app.py` and the files that it imports)."""
