"""A page to try a finished run on: what was entered (`entered.py`), what is asked (`asking.py`), what makes it again
(`again.py`), a browser's own documents (`own.py`), and gradio's blocks (`page.py`, `library.py`, `parts.py`). It stands
on the shared engine of `cm3leon.serve`."""
