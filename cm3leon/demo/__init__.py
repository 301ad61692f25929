"""A page in the browser on which a finished run can be tried.

    page.py, library.py, parts.py    gradio's components: tabs, fields, buttons
    entered.py                       the contents of fields, checked
    asking.py                        functions that ask the model, without gradio
    again.py                         the command, and the Python, that make a result again
    own.py                           documents that a browser has added for itself

The model is asked through the shared engine of `cm3leon.serve`.
"""
