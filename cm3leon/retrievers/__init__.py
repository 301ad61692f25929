"""Dense retrieval of documents for a query document (paper section 2.2).

`parts.py` is what is compared, `index.py` how a memory bank is made, `bank.py` how it is searched,
`strategy.py` which of the found documents are used.
"""
