"""A finished run that serves many clients at a time.

app.py, gate.py           OpenAI's endpoints, keys and limits         the event loop
chat.py, drawing.py       what is asked for, and how it is answered
desk.py                   requests handed to threads, and given up    between the two
service.py                the model, asked by one thread at a time    threads of requests
engine.py                 one engine, shared by all requests          the engine's thread
"""
